"""Model Breadcrumbs.

    mtl-jax run experiments/configs/model_breadcrumbs.py:VARIANT

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
    small = variant in ("demo", "tiny")
    return ConfigDict(
        {
            "system": "model-breadcrumbs",
            "suite": suite,
            "experts": experts,
            "modes": ("standard",),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "density": 0.15,
                "drop_top": 0.01,
                "scales": presets.SCALES if small else presets.FINE_SCALES,
                "sparse_scales": presets.SPARSE_SCALES,
                # The growth study: settings frozen on pairs of tasks.
                "growth_sizes": {
                    "demo": (2, 4, 8),
                    "tiny": (2, 3),
                    "vision": (2, 3, 4),
                }.get(variant, (2, 3, 4, 5, 6, 8)),
                "subsets": 3 if small else 10,
                "densities": (0.15,) if small else (0.15, 0.4),
                "drop_tops": (0.01,) if small else (0.0, 0.01, 0.1),
                "seed": 0,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
