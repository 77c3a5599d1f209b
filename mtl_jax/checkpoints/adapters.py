"""Adapters of the PEFT library: alone, or added to the checkpoint they belong to."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mtl_jax.checkpoints.source import (
    Source,
    TensorSpec,
    TensorView,
    fingerprint,
    views_of,
)
from mtl_jax.io import safetensors, shards
from mtl_jax.transforms.adapters import lora

__all__ = ["add_adapter", "open_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = 1 << 18  # Entries of the product that are computed at a time.
_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
# Starts from which the base that was trained on is not the base that is on disk.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings that say what was trained or how it began, and nothing about the product.
_IRRELEVANT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
# Settings that the product follows from, or that are looked at below.
_USED = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "modules_to_save",
    "bias",
}


def open_adapter(path: epath.PathLike) -> Source:
    """Opens an adapter as a checkpoint of its factors, under their names in the file.

    Raises:
      FileNotFoundError: without a configuration or weights.
      ValueError: for weights that are not safetensors, or corrupt.
    """
    path = epath.Path(path)
    config = shards.read_json(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise ValueError(
                f"{path / 'adapter_model.bin'}: pickled weights are not read, which "
                "may run any code; convert them to safetensors"
            )
        raise FileNotFoundError(f"no such file: {path / WEIGHTS}")
    files = {WEIGHTS: safetensors.SafetensorsFile(path / WEIGHTS)}
    return Source(
        path,
        views_of(files),
        config=config,
        fingerprint=fingerprint(files, config),
    )


def add_adapter(base: Source, path: epath.PathLike) -> Source:
    r"""The checkpoint `W + s B A`, computed in float32 where it is read.

    The scale s is `alpha / r`, or `alpha / sqrt(r)` where the adapter says so, with its
    patterns of ranks and alphas by module; tensors that were saved whole replace those
    of the base. Names may differ by a prefix that is the same for all.

    Args:
      base: what the adapter was trained on.
      path: folder of the adapter, as the PEFT library saves it.

    Returns:
      The base with views of float32 where the adapter changes it.

    Raises:
      FileNotFoundError: if there is no such adapter.
      ValueError: for anything but a plain LoRA (DoRA, biases, starts that change the
        base, settings that are not known), or naming the tensor that the base lacks or
        has in another shape.
    """
    adapter = open_adapter(path)
    config, where = adapter.config or {}, str(adapter.path)
    _refuse(where, config)
    pairs, saved = _sort(where, adapter)
    rename = _renaming(where, base, [f"{module}.weight" for module in pairs] or saved)
    views: dict[str, TensorView] = dict(base)
    for name, view in saved.items():
        target = rename(name)
        if target in base and base[target].spec.shape != view.spec.shape:
            raise ValueError(
                f"{where}: {name!r} is {view.spec.shape}, {base[target].spec.shape} in "
                f"{base.path}"
            )
        if target not in base and not _is_saved(config, name):
            raise ValueError(f"{where}: {name!r} is of no kind that is known")
        views[target] = view
    for module, factors in pairs.items():
        name = rename(f"{module}.weight")
        views[name] = _changed(where, config, module, factors, name, views[name])
    digest = hashlib.sha256(f"{base.fingerprint}+{adapter.fingerprint}".encode())
    return Source(
        base.path,
        views,
        config=base.config,
        fingerprint=digest.hexdigest()[:32],
        side_files=base.side_files,
        stored={n: base.stored.get(n, view.spec) for n, view in views.items()},
        adapters=(*base.paths[1:], adapter.path),
    )


def _refuse(where, config):
    """Raises for every setting under which the product is not all there is."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: only adapters of peft_type LORA can be added to a checkpoint, "
            f"found {config.get('peft_type')!r}"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{where}: adapters with biases are not supported, found bias "
            f"{config['bias']!r}"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changed the base that it "
            "was trained on; convert it to a plain LoRA first"
        )
    for name, value in config.items():
        if value and name not in _IRRELEVANT | _USED:
            what = "DoRA is" if name == "use_dora" else f"{name} = {value!r} is"
            raise ValueError(f"{where}: {what} not supported")


def _sort(where, adapter):
    """Factors by module, and tensors that were saved whole."""
    pairs: dict[str, dict[str, TensorView]] = {}
    saved: dict[str, TensorView] = {}
    for full, view in adapter.items():
        name = full.removeprefix(_PREFIX)
        for ending, factor in _FACTORS.items():
            if name.endswith(ending):
                pairs.setdefault(name.removesuffix(ending), {})[factor] = view
                break
        else:
            if "lora_" in name or name == full:
                raise ValueError(f"{where}: {full!r} is of no kind that is known")
            name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            saved[name] = view
    for module, factors in pairs.items():
        if set(factors) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise ValueError(
                f"{where}: {module!r} has only the factor {', '.join(factors)}"
            )
    if not pairs and not saved:
        raise ValueError(f"{where}: has no tensors")
    return pairs, saved


def _is_saved(config, name):
    """Whether the configuration says that a tensor was trained whole."""
    parts = name.split(".")
    return any(
        module.split(".") == parts[i : i + module.count(".") + 1]
        for module in config.get("modules_to_save") or ()
        for i in range(len(parts))
    )


def _renaming(where, base, names):
    """The one change of a prefix under which the base has all of these names."""
    names = list(names)
    for depth in range(names[0].count(".")):
        if all(name.split(".", depth)[-1] in base for name in names):
            return lambda name: name.split(".", depth)[-1]
    ends = [n[: -len(names[0])] for n in base if n.endswith(f".{names[0]}")]
    fits = [p for p in ends if all(f"{p}{name}" in base for name in names)]
    if len(fits) == 1:
        return lambda name: f"{fits[0]}{name}"
    missing = [name for name in names if name not in base] or names
    raise ValueError(
        f"{where}: changes {shards.some(missing)}, "
        + (f"which could be in any of {fits}" if fits else f"not in {base.path}")
    )


def _changed(where, config, module, factors, name, view):
    """View of one tensor with its product added."""
    (left, a), (_, b) = sorted(factors.items())
    (rank, *inner), (outer, *rest) = a.spec.shape or (0,), b.spec.shape or (0,)
    if rank < 1 or not rest or rest[0] != rank or math.prod(rest) != rank:
        raise ValueError(
            f"{where}: {module!r} has factors {a.spec.shape} and {b.spec.shape}"
        )
    # Embeddings [vocabulary, width] and some layers are stored as [in, out].
    stored = bool(config.get("fan_in_fan_out")) and len(inner) == 1
    flip = stored or left.startswith("embedding")
    wanted = (*inner, outer) if flip else (outer, *inner)
    if wanted != view.spec.shape:
        raise ValueError(
            f"{where}: the product for {module!r} is {wanted}, but {name!r} is "
            f"{view.spec.shape} (fan_in_fan_out {bool(config.get('fan_in_fan_out'))})"
        )
    if not jnp.issubdtype(view.spec.dtype, jnp.floating):
        raise ValueError(f"{where}: {name!r} is {view.spec.dtype} in the base")
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if said != rank:
        raise ValueError(f"{where}: {module!r} has rank {rank}, {CONFIG} says {said}")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise ValueError(f"{where}: {CONFIG} has no lora_alpha for {module!r}")
    scale = lora.scale(rank, alpha, rslora=bool(config.get("use_rslora")))
    return AddedView(view, a, b, scale, flip)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that ends the name of a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class AddedView:
    """A tensor plus `scale B A`, or its transpose, with two factors in memory at most.

    Args:
      view: the tensor, [out, ...in], or [in, out] if flipped.
      a: [r, ...in].
      b: [out, r] and further axes of length 1.
      scale: of the product.
      flip: whether the transpose is added.
    """

    def __init__(
        self, view: TensorView, a: TensorView, b: TensorView, scale: float, flip: bool
    ):
        self._view, self._a, self._b = view, a, b
        self._scale, self._flip = np.float32(scale), flip
        dtype = np.promote_types(view.spec.dtype, np.float32)
        self.spec = TensorSpec(view.spec.shape, dtype)

    def flat(self, start: int, stop: int) -> np.ndarray:
        """Entries start to stop in row-major order; the same however they are cut."""
        out = self._view.flat(start, stop).astype(self.spec.dtype)
        if not out.size:
            return out
        rank, rows = self._a.spec.shape[0], self.spec.shape[0]
        a = _matrix(self._a, rank)
        b = _matrix(self._b, self._b.spec.shape[0])
        left, right = (a.T, b.T) if self._flip else (b, a)
        width = right.shape[1]
        step = max(1, _BLOCK // width)
        for row in range(start // width // step * step, rows, step):
            begin = row * width
            if begin >= stop:
                break
            product = (left[row : row + step] @ right * self._scale).reshape(-1)
            first, last = max(start, begin), min(stop, begin + product.size)
            out[first - start : last - start] += product[first - begin : last - begin]
        return out

    def whole(self) -> np.ndarray:
        """The tensor."""
        return self.flat(0, self.spec.size).reshape(self.spec.shape)


def _matrix(view, rows):
    return view.whole().astype(np.float32).reshape(rows, -1)
