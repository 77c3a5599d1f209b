"""Dynamic logit fusion.

    mtl-jax run experiments/configs/dynamic_logits_fusion.py:VARIANT
    mtl-jax preflight experiments/configs/dynamic_logits_fusion.py:paper

demo   SmolLM2-135M-Instruct, steered by 20 of its 30 layers: distilled from all of
       them, then tuned on definitions of phenotypes (HPO) and descriptions of skills
       and occupations (ESCO)
world  invented strings with four questions, decoders trained here
tiny   the same, too small to mean anything
paper  the shapes of LLaMA-2-13B and four experts of TinyLlama's; for preflight

Numbers, seeds and times are in experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "world", "tiny", "paper")
_ONE = {"data": 1, "model": 1}


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    tiny = variant == "tiny"
    models = {"demo": _texts, "paper": _shapes}.get(variant, lambda: _strings(tiny))
    return ConfigDict(
        {
            "system": "dynamic-logits-fusion",
            "models": models(),
            "seeds": {"tiny": (0, 1), "world": (0, 1, 2, 3, 4)}.get(variant, (0,)),
            "mesh": {"data": 4, "model": 4} if variant == "paper" else _ONE,
            "study": {
                "alphas": (1.0,) if tiny else (0.5, 1.0, 1.5),
                "high": 2.0,
                "step": 0.1,
                # The large model fine-tuned, too: what there is to reach.
                "tuned": variant in ("world", "tiny"),
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
        # Of three choices of ten layers to leave out, what training texts miss least.
        "layers": tuple(i for i in range(30) if i not in (4, 5, *range(12, 20))),
        "documents": 1200,
        "row_length": 64,
        "batch_size": 4,
        "small_steps": 24,
        "expert_steps": 30,
        "rate": 3e-4,
        "expert_rate": 3e-4,
        "test_rows": 12,
    }


def _shapes() -> dict:
    options = {
        "scan": True,
        "attention": "blocked",
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
    }
    tiny_llama = {
        "width": 2048,
        "depth": 22,
        "num_heads": 32,
        "num_kv_heads": 4,
        "mlp_dim": 5632,
        "max_positions": 2048,
    }
    return {
        "name": "outline",
        "large": {"name": "llama-2-13b", **options},
        "small": {"name": "llama-2-7b", **options, **tiny_llama},
        "experts": 4,
        "batch_size": 32,
        "decode": {
            "batch_size": 32,
            "prompt_tokens": 512,
            "max_new_tokens": 256,
            "stop": (2,),
        },
    }


def sweep():
    """Five seeds, as the results are reported."""
    yield {"seeds": (0, 1, 2, 3, 4)}
