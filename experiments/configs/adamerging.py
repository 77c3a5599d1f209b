"""AdaMerging.

    mtl-jax run experiments/configs/adamerging.py:VARIANT

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
    steps, batch_size, chunk = {
        "demo": (60, 8, 20),
        "vision": (200, 16, 50),
        "tiny": (8, 4, 4),
    }.get(variant, (500, 32, 50))
    rules = {
        "demo": ("layer-wise", "layer-wise, faster"),
        "tiny": ("layer-wise",),
    }.get(
        variant,
        (
            "task-wise",
            "layer-wise",
            "layer-wise, faster",
            "layer-wise, held out",
            "task-wise++",
        ),
    )
    return ConfigDict(
        {
            "system": "adamerging",
            "suite": suite,
            "experts": experts,
            "modes": ("standard",),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "rules": (*rules, "layer-wise++"),
                "steps": steps,
                "batch_size": batch_size,
                "chunk": chunk,
                "start": 0.3,
                # 500 steps at 1e-3 move a coefficient by at most 0.5: shorter runs
                # take the same way at larger rates.
                "rate": 1e-3 * 500 / steps if variant in ("demo", "vision") else 1e-3,
                "fast_rate": 2e-2 if variant == "demo" else 1e-2,
                "density": 0.2,
                "unseen": 1 if variant in ("tiny", "vision") else 2,
                "noise": 0.3 if variant == "demo" else 0.5,
                "scales": presets.SCALES if variant == "demo" else presets.FINE_SCALES,
                "sparse_scales": presets.SPARSE_SCALES,
                "seed": 0,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
