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
    tenths = tuple(round(0.1 * i, 1) for i in range(1, 11))
    suite, experts = {
        "demo": presets.text,
        "vision": presets.vision,
        "world": presets.world,
        "tiny": lambda: presets.world(tiny=True),
        "paper": presets.clip,
    }[variant]()
    coarse = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
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
                "scales": coarse if variant == "demo" else tenths,
                # Means of few entries: TIES and breadcrumbs want larger strengths.
                "sparse_scales": (0.3, 0.5, 0.7, 1.0, 1.3, 1.6),
                "min_tasks": (2,) if variant == "demo" else (1, 2, 3),
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
