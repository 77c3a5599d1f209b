"""Small checkpoint folders, in the layout of decoders and of encoder-decoders."""

import json

import ml_dtypes
import numpy as np
import pytest

from mtl_jax.io import safetensors


def _tokenizer(tokens):
    """A tokenizer.json with these tokens; those in angle brackets are added ones."""
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for t, i in tokens.items()
        if t.startswith("<")
    ]
    plain = {t: i for t, i in tokens.items() if not t.startswith("<")}
    model = {"type": "WordLevel", "vocab": plain, "unk_token": next(iter(plain))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


@pytest.fixture(scope="session")
def save_tokenizer():
    """`save_tokenizer(folder, tokens)`: token -> id."""

    def save(folder, tokens, **config):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(tokens)))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return save


@pytest.fixture(scope="session")
def save_llama(save_tokenizer):
    """`save_llama(folder, seed, ...)`: a two-layer decoder; returns its tensors."""

    def save(
        folder,
        seed=0,
        *,
        near=None,
        layers=2,
        dim=16,
        rows=24,
        dtype=ml_dtypes.bfloat16,
        tokens=None,
        drop=(),
        extra=None,
        **config,
    ):
        inner = {
            "input_layernorm.weight": (dim,),
            "mlp.down_proj.weight": (dim, 2 * dim),
            "mlp.gate_proj.weight": (2 * dim, dim),
            "mlp.up_proj.weight": (2 * dim, dim),
            "post_attention_layernorm.weight": (dim,),
            "self_attn.k_proj.weight": (dim, dim),
            "self_attn.o_proj.weight": (dim, dim),
            "self_attn.q_proj.weight": (dim, dim),
            "self_attn.v_proj.weight": (dim, dim),
        }
        shapes = {
            "model.embed_tokens.weight": (rows, dim),
            "lm_head.weight": (rows, dim),
            "model.norm.weight": (dim,),
        }
        for i in range(layers):
            shapes |= {f"model.layers.{i}.{k}": s for k, s in inner.items()}
        rng = np.random.default_rng(seed)
        tensors = {}
        for name, shape in shapes.items():
            values = rng.normal(size=shape)
            if near is not None:
                values = near[name].astype(np.float64) + 0.1 * values
            tensors[name] = values.astype(dtype)
        tensors = {k: v for k, v in tensors.items() if k not in drop} | (extra or {})
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.save(
            folder / "model.safetensors", tensors, metadata={"format": "pt"}
        )
        settings = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": dim,
            "intermediate_size": 2 * dim,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": rows,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "torch_dtype": np.dtype(dtype).name,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **config,
        }
        (folder / "config.json").write_text(json.dumps(settings))
        if tokens is None:
            tokens = {"a": 0, "<s>": 1, "</s>": 2}
            tokens |= {f"w{i}": i for i in range(3, rows)}
        if tokens:
            save_tokenizer(folder, tokens)
        return tensors

    return save
