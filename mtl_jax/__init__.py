"""Multi-task learning and model editing in JAX.

Public namespaces load on first use, so that `import mtl_jax` costs little more
than JAX itself and loads neither Flax nor Orbax nor TFDS.
"""

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_NAMESPACES = {
    "adapters": "mtl_jax.transforms.adapters",
    "aggregation": "mtl_jax.transforms.aggregation",
    "bilevel": "mtl_jax.transforms.bilevel",
    "catalog": "mtl_jax.catalog",
    "data": "mtl_jax.data",
    "decoding": "mtl_jax.decoding",
    "io": "mtl_jax.io",
    "kernels": "mtl_jax.kernels",
    "linearize": "mtl_jax.transforms.linearize",
    "losses": "mtl_jax.losses",
    "masking": "mtl_jax.transforms.masking",
    "merging": "mtl_jax.transforms.merging",
    "metrics": "mtl_jax.metrics",
    "models": "mtl_jax.models",
    "quantization": "mtl_jax.transforms.quantization",
    "report": "mtl_jax.report",
    "routing": "mtl_jax.transforms.routing",
    "train": "mtl_jax.train",
    "tree": "mtl_jax.tree",
    "weighting": "mtl_jax.transforms.weighting",
}

__all__ = ["__version__", *_NAMESPACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        module = importlib.import_module(_NAMESPACES[name])
        globals()[name] = module
        return module
    raise AttributeError(f"module 'mtl_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
