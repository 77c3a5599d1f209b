"""A language model fine-tuned on two domains by low-rank adapters.

    mtl-jax run experiments/configs/lm_demo.py:VARIANT

demo  SmolLM2-135M-Instruct; definitions of phenotypes (HPO), descriptions of skills
      and occupations (ESCO)
nf4   the same on a base in 4 bits
tiny  a random decoder over bytes, two invented languages
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "nf4", "tiny")

_LAYERS = (r"attention/(query|key|value|out)/kernel$", r"mlp/(gate|in|out)/kernel$")


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    tiny = variant == "tiny"
    small = {"width": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 48}
    # Recomputed, layers in 4 bits are decoded one at a time.
    options = {**(small if tiny else {}), "scan": True, "remat": variant == "nf4"}
    return ConfigDict(
        {
            "experiment": "language",
            "title": "Low-rank adapters of a language model",
            "intro": "One adapter for each domain, the base frozen; every adapter is "
            "measured on the test texts of every domain.",
            "model": {
                "name": "random" if tiny else "smollm2",
                "options": options,
                # Leaves that are kept in 4 bits; none = as they are.
                "nf4": (r"layers.*/kernel$",) if variant == "nf4" else (),
            },
            "domains": ("counting", "letters") if tiny else ("hpo_branch", "esco_kind"),
            "packing": {"row_length": 64, "documents": 64 if tiny else 1500},
            "lora": {
                "rules": _LAYERS,
                "rank": 4 if tiny else 8,
                "alpha": 8.0 if tiny else 16.0,
                "mode": "intercept",
            },
            "training": {
                "steps": 20 if tiny else 32,
                "batch_size": 4,
                "optimizer": {
                    "name": "adam",
                    "peak": 2e-2 if tiny else 1e-3,
                    "warmup": 0.1,
                },
            },
            "evaluation": {"rows": 8 if tiny else 16},
            "samples": {
                "prompts": 2 if tiny else 4,
                "prompt_tokens": 6,
                "max_new_tokens": 8 if tiny else 32,
            },
            "seeds": (0, 1),
            "mesh": {"data": -1, "model": 1},
        }
    )
