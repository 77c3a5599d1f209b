"""Self Positioning of embedding models.

    mtl-jax run experiments/configs/self_positioning.py:VARIANT
    mtl-jax preflight experiments/configs/self_positioning.py:paper

demo   MiniLM, its upper two layers: names and definitions of phenotypes (HPO) against
       sentences of product reviews, ten to one
world  invented documents with topic and meaning, a small transformer, ten to one
tiny   the same, too small to mean anything
paper  all layers of MiniLM, 32,000 probe pairs, batches of 1,024; not run

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "world", "tiny", "paper")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    tiny = variant == "tiny"
    texts = variant in ("demo", "paper")
    options = {
        "demo": {"sizes": (960, 96), "probe": 96, "test": 160, "lower": 4},
        "paper": {
            "sizes": (160000, 16000),
            "probe": 16000,
            "test": 1000,
            "lower": 0,
            "length": 128,
        },
        "world": {"sizes": (9600, 960), "probe": 256, "test": 300},
        "tiny": {
            "sizes": (80, 16),
            "probe": 16,
            "test": 24,
            "pretrain_steps": 4,
            "width": 16,
            "depth": 1,
        },
    }[variant]
    small = variant == "demo"
    return ConfigDict(
        {
            "system": "self-positioning",
            "study_kind": "embedding",
            "material": {"name": "minilm" if texts else "invented", "options": options},
            "training": {
                "batch_size": {"tiny": 8, "demo": 24, "world": 48, "paper": 1024}[
                    variant
                ],
                "temperature": 0.05,
                "rate": 1e-4 if texts else 1e-3,
            },
            "seeds": (0, 1) if tiny else (0,) if texts else (0, 1, 2, 3, 4),
            "mesh": {"data": -1 if variant == "paper" else 1, "model": 1},
            "study": {
                "rate": 0.05,
                "steps": 3 if tiny else 24 if small else 100,
                "norm_penalty": 0.01,
                "norm_penalties": (0.0, 0.05, 0.5),
                "probe_batches": 1 if tiny else 2 if small else 4,
                "shares": (0.1, 0.3, 0.5, 0.7, 0.9),
                "lengths": (0.5, 0.75, 1.0, 1.25, 1.5),
                # With two groups it is the same search.
                "pairwise": False,
            },
        }
    )


def sweep():
    """Five seeds, as the results are reported."""
    yield {"seeds": (0, 1, 2, 3, 4)}
