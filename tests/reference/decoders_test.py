"""Small random language models, written by transformers and read here, and back."""

import jax
import numpy as np
import pytest

from mtl_jax import io, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

LLAMA = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
GPT_2 = {
    "vocab_size": 19,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "initializer_range": 0.3,
}
HEAD_6 = {**LLAMA, "head_dim": 6}
CASES = {
    "llama": ("LlamaForCausalLM", "llama", LLAMA),
    "llama-one-kv": (
        "LlamaForCausalLM",
        "llama",
        {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    ),
    "llama-bias": (
        "LlamaForCausalLM",
        "llama",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama-3": ("LlamaForCausalLM", "llama", {**LLAMA, "rope_parameters": LLAMA_3}),
    "llama-linear": (
        "LlamaForCausalLM",
        "llama",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 100.0,
            },
        },
    ),
    "smollm2": (
        "LlamaForCausalLM",
        "llama",
        {**LLAMA, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", LLAMA),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "qwen2",
        {
            **LLAMA,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", HEAD_6),
    "qwen3-tied": (
        "Qwen3ForCausalLM",
        "qwen3",
        {**HEAD_6, "tie_word_embeddings": True},
    ),
    "gemma": ("GemmaForCausalLM", "gemma", HEAD_6),
    "gemma2": (
        "Gemma2ForCausalLM",
        "gemma2",
        {
            **HEAD_6,
            "sliding_window": 3,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT_2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        "gpt2",
        {**GPT_2, "tie_word_embeddings": False},
    ),
    "gpt2-relu": (
        "GPT2LMHeadModel",
        "gpt2",
        {
            **GPT_2,
            "activation_function": "relu",
            "n_inner": 20,
            "scale_attn_weights": False,
        },
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        "olmoe",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe-normalized": (
        "OlmoeForCausalLM",
        "olmoe",
        {**LLAMA, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
}

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 19, (3, 9)).astype(np.int32)
LENGTHS = np.array([[9], [6], [1]])
RIGHT = (np.arange(9) < LENGTHS).astype(np.int32)
LEFT = RIGHT[:, ::-1].copy()


def make(class_name, options):
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    config = cls.config_class(**options, attn_implementation="eager")
    peer = cls(config).eval()
    for parameter in peer.parameters():  # Biases and norms start trivial.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return peer


def read(folder, table, **more):
    """(module, params) of a checkpoint folder, through abstract parameters."""
    options = table.options(io.read_config(folder))
    module = models.build(table.model, **options, **more)
    like = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    return module, io.load_pretrained(folder, table, like)


def theirs(peer, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return peer(
            input_ids=torch.tensor(IDS, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_peer(tmp_path, case, scan):
    class_name, name, options = CASES[case]
    peer = make(class_name, options)
    peer.save_pretrained(tmp_path)
    module, params = read(tmp_path, getattr(io.names, name), scan=scan)
    apply = jax.jit(lambda p, segments: module.apply({"params": p}, IDS, segments))
    for mask in (np.ones_like(IDS), RIGHT, LEFT):
        got, want = apply(params, mask), theirs(peer, mask)
        real = mask.astype(bool)
        assert np.max(np.abs(want[real])) > 0.5
        np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_the_peer_reads(tmp_path, case):
    class_name, name, options = CASES[case]
    table = getattr(io.names, name)
    peer = make(class_name, options)
    peer.save_pretrained(tmp_path / "theirs")
    module, params = read(tmp_path / "theirs", table, scan=True)
    params = jax.tree.map(lambda x: 1.01 * x, params)  # Numbers of our own.
    want = jax.jit(lambda p: module.apply({"params": p}, IDS, RIGHT))(params)
    config = io.read_config(tmp_path / "theirs")
    io.save_pretrained(tmp_path / "ours", params, table, config=config)
    back, info = type(peer).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    real = RIGHT.astype(bool)
    np.testing.assert_allclose(theirs(back.eval(), RIGHT)[real], want[real], atol=1e-4)


def test_a_base_model_without_its_head_is_read(tmp_path):
    peer = make("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    peer.model.save_pretrained(tmp_path)
    module, params = read(tmp_path, io.names.llama)
    got = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    np.testing.assert_allclose(got, theirs(peer, np.ones_like(IDS)), atol=1e-4)


def test_shards_are_joined(tmp_path):
    peer = make("OlmoeForCausalLM", CASES["olmoe"][2])
    peer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    module, params = read(tmp_path, io.names.olmoe)
    got = jax.jit(lambda p: module.apply({"params": p}, IDS))(params)
    np.testing.assert_allclose(got, theirs(peer, np.ones_like(IDS)), atol=1e-4)
