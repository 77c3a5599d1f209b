"""aTLAS: learned anisotropic scaling of task vectors.

    mtl-jax run experiments/configs/atlas.py:VARIANT

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
    size = {
        "demo": {
            "steps": 40,
            "batch_size": 8,
            "shots": (8,),
            "few_steps": 12,
            "adapt_steps": 0,
            "negate_steps": 0,
            "budgets": (),
            "parts": (),
        },
        "vision": {
            "steps": 200,
            "batch_size": 16,
            "few_steps": 60,
            "adapt_steps": 60,
            "negate_steps": 40,
            "budgets": (1,),
        },
        "tiny": {
            "steps": 8,
            "batch_size": 4,
            "shots": (1,),
            "few_steps": 4,
            "few_batch": 8,
            "adapt_steps": 4,
            "negate_steps": 4,
            "budgets": (1,),
        },
    }.get(variant, {})
    return ConfigDict(
        {
            "system": "atlas",
            "suite": suite,
            "experts": experts,
            "modes": ("standard", "linear")
            if variant in ("world", "paper")
            else ("standard",),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "split": "validation",
                "steps": 400,
                "batch_size": 16,
                "optimizer": {"name": "adam", "peak": 1e-2, "decay": False},
                "parts": (4,),
                "shots": (1, 4, 16),
                "few_steps": 100,
                "few_batch": 32,
                "few_optimizer": {"name": "adamw", "peak": 0.1, "weight_decay": 0.1},
                "adapt_steps": 200,
                "views": (0.1, 0.5),
                "negate_steps": 80,
                "control": {
                    "demo": "icd10_chapter",
                    "vision": "digits",
                    "paper": "sun397",
                }.get(variant, "task0"),
                "budgets": (1, 2),
                "scales": presets.SCALES if variant == "demo" else presets.FINE_SCALES,
                "sparse_scales": presets.SPARSE_SCALES,
                "seed": 0,
                **size,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
