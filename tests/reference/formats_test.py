"""What every table keeps: dtypes to the bit, tied weights, shards, both ways."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import io

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

BLOCKS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TEXT = {**BLOCKS, "vocab_size": 19, "max_position_embeddings": 32, "pad_token_id": None}
LLAMA = {**TEXT, "num_key_value_heads": 2}
IMAGE = {"image_size": 12, "patch_size": 4, **BLOCKS}
GPT_2 = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
CLIP = {
    "text_config": {**BLOCKS, "vocab_size": 19, "max_position_embeddings": 8},
    "vision_config": IMAGE,
    "projection_dim": 6,
}
T5 = {"vocab_size": 19, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
BART = {
    "vocab_size": 19,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
CASES = {
    "llama": ("LlamaForCausalLM", {**LLAMA, **UNTIED}),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, **TIED}),
    "qwen2": ("Qwen2ForCausalLM", {**LLAMA, **UNTIED}),
    "qwen2-tied": ("Qwen2ForCausalLM", {**LLAMA, **TIED}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 6, **UNTIED}),
    "qwen3-tied": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 6, **TIED}),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 6}),
    "gemma2": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 6}),
    "gpt2": ("GPT2LMHeadModel", GPT_2),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT_2, **UNTIED}),
    "olmoe": ("OlmoeForCausalLM", {**LLAMA, "num_experts": 4, **UNTIED}),
    "olmoe-tied": ("OlmoeForCausalLM", {**LLAMA, "num_experts": 4, **TIED}),
    "bert": ("BertModel", TEXT),
    "vit": ("ViTModel", IMAGE),
    "clip": ("CLIPModel", CLIP),
    "clip-vision": ("CLIPVisionModelWithProjection", {**IMAGE, "projection_dim": 6}),
    "clip-text": ("CLIPTextModelWithProjection", {**TEXT, "projection_dim": 6}),
    "t5": ("T5ForConditionalGeneration", {**T5, **TIED}),
    "t5-untied": ("T5ForConditionalGeneration", {**T5, **UNTIED}),
    "bart": ("BartForConditionalGeneration", BART),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make(case, dtype):
    class_name, options = CASES[case]
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    peer = cls(cls.config_class(**options)).eval()
    for parameter in peer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return peer.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_shards_of_half_precision_come_back_to_the_bit(tmp_path, case, dtype):
    peer = make(case, DTYPES[dtype])
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    shards = list((tmp_path / "theirs").glob("*.safetensors"))
    assert len(shards) > 1
    params = io.load_pretrained(tmp_path / "theirs")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    if case.split("-")[0] in ("llama", "qwen2", "qwen3", "gpt2", "olmoe", "t5"):
        assert ("head" in params) != peer.config.tie_word_embeddings

    config = io.read_config(tmp_path / "theirs")
    table = io.names.of_config(config)
    ours = tmp_path / "ours"
    io.save_pretrained(ours, params, table, config=config, shard_bytes=4096)
    assert len(list(ours.glob("*.safetensors"))) > 1
    back, info = type(peer).from_pretrained(
        ours, output_loading_info=True, dtype=DTYPES[dtype]
    )
    assert {n for n in info["missing_keys"] if "pooler." not in n} == set()
    assert not info["unexpected_keys"]
    found = dict(back.named_parameters())
    for name, parameter in peer.named_parameters():
        if "pooler." not in name:
            assert torch.equal(parameter, found[name]), name
