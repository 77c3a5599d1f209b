"""Rep-MTL.

    mtl-jax run experiments/configs/rep_mtl.py:VARIANT

demo    two overlaid digits, a small convolutional network
noisy   the same with 10% wrong training labels
census  income, marriage and education of the Adult census, an MLP
tiny    overlaid digits, too few to mean anything
paper   CelebA, a ViT; stands for the paper's dense problems, not run at scale

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
            "system": "rep-mtl",
            "problem": problem,
            "model": model,
            "training": training,
            "seeds": (0, 1) if variant == "tiny" else (0, 1, 2),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "reuse": "same code",
            "study": {
                # 0.9 is the centre of the paper's grid, 0.7 to 1.5.
                "weights": (0.1, 0.9)
                if variant in ("demo", "noisy", "census")
                else (0.9,),
                "temperature": 0.1,
                "tuning_steps": {"demo": 5, "noisy": 5, "census": 5}.get(variant, 1),
            },
        }
    )


def sweep():
    """Five seeds, as the results are reported."""
    yield {"seeds": (0, 1, 2, 3, 4)}
