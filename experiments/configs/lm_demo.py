"""A language model fine-tuned on two domains by low-rank adapters.

    mtl-jax run experiments/configs/lm_demo.py:VARIANT

demo  SmolLM2-135M-Instruct; definitions of phenotypes (HPO), descriptions of skills
      and occupations (ESCO)
nf4   the same on a base in 4 bits
tiny  a random decoder over bytes, two invented languages

Without weights and data, to be compiled for a TPU that is not here:

    mtl-jax preflight experiments/configs/lm_demo.py:llama3_8b_lora --topology v5e:4x4
    mtl-jax preflight experiments/configs/lm_demo.py:llama3_8b_decode --topology v5e:4x4
    mtl-jax preflight experiments/configs/lm_demo.py:llama3_8b_full --topology v5p:4x4x2

llama3_8b_lora    adapters of rank 16 on every projection of a bfloat16 base
llama3_8b_decode  64 rows: prompts of 2,048 tokens, up to 2,048 more
llama3_8b_full    every weight: float32 weights and moments of AdamW, computed in
                  bfloat16
"""

from ml_collections import ConfigDict

LLAMA3_8B = ("llama3_8b_lora", "llama3_8b_decode", "llama3_8b_full")
VARIANTS = ("demo", "nf4", "tiny", *LLAMA3_8B)

_LAYERS = (r"attention/(query|key|value|out)/kernel$", r"mlp/(gate|in|out)/kernel$")
_ADAMW = {
    "name": "adamw",
    "peak": 1e-4,
    "warmup": 0.03,
    "b2": 0.95,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def get_config(variant: str = "demo") -> ConfigDict:
    """The experiment in one of its sizes."""
    if variant in LLAMA3_8B:
        return _llama3_8b(variant)
    tiny = variant == "tiny"
    small = {"width": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 48}
    # Recomputed whole, layers in 4 bits are decoded one at a time.
    remat = "full" if variant == "nf4" else "products"
    options = {**(small if tiny else {}), "scan": True, "remat": remat}
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


_REMAT = {
    "llama3_8b_lora": "products",
    "llama3_8b_decode": "none",
    "llama3_8b_full": "full",
}


def _llama3_8b(variant: str) -> ConfigDict:
    """The shapes of Llama 3 8B; changes of `demo`."""
    config = get_config("demo")
    full = variant == "llama3_8b_full"
    config.model.name = "llama-3-8b"
    config.model.options = {
        "scan": True,
        "remat": _REMAT[variant],
        "attention": "blocked",
        "dtype": "bfloat16",
        "param_dtype": "float32" if full else "bfloat16",
    }
    config.domains = ()
    config.lora.update({"rank": 16, "alpha": 32.0})
    config.training = {"steps": 1000, "batch_size": 16, "optimizer": _ADAMW}
    config.packing.row_length = 2048
    config.mesh = {"data": -1, "model": 4}
    if full:
        config.lora = None
        config.training.batch_size = 64
        config.training.optimizer.peak = 1e-5
        config.packing.row_length = 4096
    if variant == "llama3_8b_decode":
        config.decode = {
            "batch_size": 64,
            "prompt_tokens": 2048,
            "max_new_tokens": 2048,
            "stop": (128001, 128009),
        }
        # One head of keys and values a device.
        config.mesh.model = 8
    return config
