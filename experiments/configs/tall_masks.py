"""TALL-masks and Consensus Merging.

    mtl-jax run experiments/configs/tall_masks.py:VARIANT

demo    eight real text tasks, MiniLM
vision  four real image tasks, a small ViT pretrained on rotations
world   synthetic zero-shot world, eight tasks, an MLP
tiny    the same, too small to mean anything
paper   CLIP ViT-L/14, eight image tasks; not run at scale (weights are yours to bring)

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from mtl_jax.zoo import presets

VARIANTS = ("demo", "vision", "world", "tiny", "paper")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    suite, experts = {
        "demo": presets.text,
        "vision": presets.vision,
        "world": presets.world,
        "tiny": lambda: presets.world(tiny=True),
        "paper": presets.clip,
    }[variant]()
    return ConfigDict(
        {
            "system": "tall-masks",
            "suite": suite,
            "experts": experts,
            "modes": ("standard",),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "mask_scales": (0.2, 0.3, 0.4, 0.5, 0.6),
                "scales": presets.SCALES if variant == "demo" else presets.FINE_SCALES,
                "sparse_scales": presets.SPARSE_SCALES,
                "min_tasks": (2,) if variant == "demo" else (1, 2, 3),
                "seed": 0,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
