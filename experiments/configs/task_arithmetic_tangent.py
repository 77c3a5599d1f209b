"""Task arithmetic in the tangent space.

    mtl-jax run experiments/configs/task_arithmetic_tangent.py:VARIANT

demo    four real text tasks, MiniLM
vision  four real image tasks, a small ViT pretrained on rotations
world   synthetic zero-shot world, eight tasks, an MLP
tiny    the same, too small to mean anything
paper   CLIP ViT-L/14, eight image tasks; not run at scale (weights are yours to bring)

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from mtl_jax.zoo import presets

VARIANTS = ("demo", "vision", "world", "tiny", "paper")
_TEXT = ("sentiment_product", "sentiment_tweets", "icd10_chapter", "esco_kind")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    suite, experts = {
        "demo": lambda: presets.text(_TEXT),
        "vision": presets.vision,
        "world": presets.world,
        "tiny": lambda: presets.world(tiny=True),
        "paper": presets.clip,
    }[variant]()
    control, first, second = {
        "demo": ("icd10_chapter", "sentiment_tweets", "esco_kind"),
        "vision": ("digits", "mnist5k", "easy_vqa_shape"),
        "paper": ("sun397", "mnist", "eurosat"),
    }.get(variant, ("task0", "task1", "task2"))
    steps = 10 if variant == "demo" else 20
    grid = tuple(round(i / steps, 2) for i in range(steps + 1))
    return ConfigDict(
        {
            "system": "task-arithmetic-tangent",
            "suite": suite,
            "experts": experts,
            "modes": ("standard", "linear"),
            "mesh": {"data": -1, "model": 1},
            "remember": True,
            "checkpoint_every": 500 if variant == "paper" else None,
            "study": {
                "scales": grid,
                "negation_scales": grid,
                "control": control,
                "pair": (first, second),
                "alphas": (-1.0, 0.0, 1.0)
                if variant == "demo"
                else (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0),
                "kernel_inputs": 8 if variant in ("demo", "tiny") else 32,
                "kernel_probes": 4,
                "seed": 0,
            },
        }
    )


def sweep():
    """Seeds of the data order."""
    for seed in range(3):
        yield {"experts.seed": seed}
