"""Merging language models that live on a mesh, without gathering a leaf.

    mtl-jax run experiments/configs/mesh_merge.py:demo
    mtl-jax preflight experiments/configs/mesh_merge.py:llama3_70b --topology v5p:4x4x4

demo        four models of SmolLM2-135M's shape, on the devices that there are
llama3_70b  eight models of Llama 3 70B's shape, in bfloat16; the threshold of each
            runs over the whole model
tiny        the same, too small to mean anything
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "llama3_70b", "tiny")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    options = {"scan": True, "param_dtype": "bfloat16"}
    model, count = {
        "demo": ({"name": "smollm2-135m", "options": options}, 4),
        "llama3_70b": ({"name": "llama-3-70b", "options": options}, 8),
        "tiny": (
            {
                "name": "decoder",
                "options": {
                    **options,
                    "vocab_size": 64,
                    "width": 32,
                    "depth": 2,
                    "num_heads": 2,
                    "num_kv_heads": 2,
                    "mlp_dim": 64,
                    "max_positions": 16,
                },
            },
            3,
        ),
    }[variant]
    return ConfigDict(
        {
            "experiment": "mesh_merge",
            "title": "Merging on a mesh",
            "intro": "TIES over sharded task vectors of a language model. Thresholds "
            "are found by counting, so that no leaf is gathered.",
            "model": model,
            "merge": {
                "rule": "ties",
                "models": count,
                "options": {"density": 0.2, "scope": "global"},
            },
            "repeats": 1 if variant == "tiny" else 5,
            "mesh": {"data": -1, "model": 4 if variant == "llama3_70b" else 1},
        }
    )
