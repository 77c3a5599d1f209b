"""Dynamic logit fusion.

    mtl-jax run experiments/configs/dynamic_logits_fusion.py:VARIANT

demo   SmolLM2-135M-Instruct, steered by copies of its first layers that are tuned on
       definitions of phenotypes (HPO) and descriptions of skills and occupations (ESCO)
world  invented strings with four questions, decoders trained here
tiny   the same, too small to mean anything
paper  the shapes of LLaMA-2-13B and TinyLlama; not run at scale

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "world", "tiny", "paper")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    texts = variant in ("demo", "paper")
    return ConfigDict(
        {
            "system": "dynamic-logits-fusion",
            "models": _texts() if texts else _strings(variant == "tiny"),
            "seeds": {"tiny": (0, 1), "world": (0, 1, 2, 3, 4)}.get(variant, (0,)),
            "mesh": {"data": 1, "model": 1},
            "study": {
                "alphas": (1.0,) if variant == "tiny" else (0.5, 1.0, 1.5),
                "high": 2.0,
                "step": 0.1,
                # The large model fine-tuned, too: what there is to reach.
                "tuned": not texts,
            },
        }
    )


def _strings(tiny: bool) -> dict:
    if tiny:
        sizes = {
            "small": {"width": 16, "depth": 1},
            "large": {"width": 16, "depth": 2},
            "test": 8,
        }
        steps = ("small_steps", "large_steps", "expert_steps", "tuned_steps")
        return {**_strings(False), **sizes, **dict.fromkeys(steps, 4), "batch_size": 8}
    return {
        "name": "strings",
        "small": {"width": 32, "depth": 2},
        "large": {"width": 64, "depth": 2},
        "small_steps": 300,
        "large_steps": 700,
        "expert_steps": 60,
        "tuned_steps": 60,
        "longest": 5,
        "batch_size": 64,
        "rate": 3e-3,
        "test": 128,
    }


def _texts() -> dict:
    return {
        "name": "texts",
        "domains": ("hpo_branch", "esco_kind"),
        "depth": 4,
        "documents": 1200,
        "row_length": 64,
        "batch_size": 4,
        "small_steps": 60,
        "expert_steps": 32,
        "rate": 1e-3,
        "test_rows": 8,
    }


def sweep():
    """Five seeds, as the results are reported."""
    yield {"seeds": (0, 1, 2, 3, 4)}
