"""Reversible model merging of low-rank adapters.

    mtl-jax run experiments/configs/reversible_model_merging.py:VARIANT

demo    eight real text tasks, MiniLM
vision  four real image tasks, a small ViT pretrained on rotations
world   synthetic zero-shot world, eight tasks, an MLP
lora    the same, with experts that are trained as adapters
tiny    the same, too small to mean anything
paper   CLIP ViT-L/14, eight image tasks; not run at scale (weights are yours to bring)

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from mtl_jax.zoo import presets

VARIANTS = ("demo", "vision", "world", "lora", "tiny", "paper")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    suite, experts = {
        "demo": presets.text,
        "vision": presets.vision,
        "world": presets.world,
        "lora": presets.world,
        "tiny": lambda: presets.world(tiny=True),
        "paper": presets.clip,
    }[variant]()
    quick = variant in ("demo", "tiny")
    scales = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    if variant == "lora":
        suite["options"]["lora"] = {"rank": 8, "alpha": 16.0}
        experts["optimizer"]["peak"] = 5e-3
        scales = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    return ConfigDict(
        {
            "system": "reversible-model-merging",
            "suite": suite,
            "experts": experts,
            "modes": ("standard",),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "rank": 8 if variant == "lora" else 16,
                # To this rank full task vectors are cut; None: they are adapters.
                "cut": None if variant == "lora" else 16,
                "svd": "gram" if variant in ("demo", "paper") else "svd",
                "sizes": (0, 1) if quick else (0, 1, 2),
                "curve": (0, 1, 3, 7) if quick else tuple(range(8)),
                "density": 0.2,
                # Of products of mean factors, T^2 for those of sums; of trained
                # adapters they multiply both factors, T for sums.
                "factor_scales": scales[1::2] if quick else scales,
                "scales": presets.SCALES if quick else presets.FINE_SCALES,
                "sparse_scales": presets.SPARSE_SCALES,
                "iso_scales": (0.5, 1.0, 1.5) if quick else (0.5, 1.0, 1.5, 2.0, 3.0),
                "seed": 0,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
