"""Task-based flat regions around any aggregator.

    mtl-jax run experiments/configs/flat_regions_mtl.py:VARIANT

demo    two overlaid digits, a small convolutional network
noisy   the same with 10% wrong training labels
census  income, marriage and education of the Adult census, an MLP
tiny    overlaid digits, too few to mean anything
paper   CelebA, a ViT; not run at scale

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from mtl_jax.multitask import presets

VARIANTS = ("demo", "noisy", "census", "tiny", "paper")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    problem, model, training = {
        "demo": presets.digits,
        "noisy": lambda: presets.digits(noisy=True),
        "census": presets.census,
        "tiny": presets.tiny,
        "paper": presets.faces,
    }[variant]()
    return ConfigDict(
        {
            "system": "flat-regions-mtl",
            "problem": problem,
            "model": model,
            "training": training,
            "seeds": (0, 1) if variant == "tiny" else (0, 1, 2),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "reuse": "same code",
            "study": {
                "radii": (0.05, 0.5)
                if variant in ("demo", "noisy", "census")
                else (0.05,),
                "tuning_steps": {"demo": 5, "noisy": 5, "census": 5}.get(variant, 1),
            },
        }
    )


def sweep():
    """Five seeds, as the results are reported."""
    yield {"seeds": (0, 1, 2, 3, 4)}
