"""Merged folders load in transformers, whatever their architecture."""

import pytest

from mtl_jax.checkpoints import recipe
from mtl_jax.checkpoints.merge import merge

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.reference

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CASES = {  # Class of the config, its options, class of the model.
    "gpt2": (
        "GPT2Config",
        {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 40},
        "GPT2LMHeadModel",
    ),
    "bert": ("BertConfig", SIZES, "BertForMaskedLM"),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8}, "Gemma3ForCausalLM"),
    "mixture": (
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        "Qwen2MoeForCausalLM",
    ),
    "vit": (
        "ViTConfig",
        {**SIZES, "image_size": 8, "patch_size": 4},
        "ViTForImageClassification",
    ),
    "t5": (
        "T5Config",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_heads": 2,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "vocab_size": 40,
        },
        "T5ForConditionalGeneration",
    ),
}
STACK = """\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 3]}]
"""
STACKS = """\
merge_method: passthrough
modules:
  encoder:
    slices:
    - sources: [{model: a, layer_range: [0, 2]}]
    - sources: [{model: b, layer_range: [1, 2]}]
  decoder:
    models: [{model: a}]
"""
LINEAR = "method: linear\nmodels: [a, b]\noptions: {weight: [1, 2]}\n"


@pytest.fixture(params=CASES)
def models(request, tmp_path):
    """Two random models of one architecture, saved by transformers."""
    config, options, kind = CASES[request.param]
    config = getattr(transformers, config)(**options)
    kind = getattr(transformers, kind)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        kind(config).save_pretrained(tmp_path / name)
    return kind, tmp_path, request.param


def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_merged_and_stacked_models_load(models):
    kind, root, name = models
    for text, layers in ((LINEAR, 3), (STACKS if name == "t5" else STACK, 4)):
        out = root / f"out-{layers}"
        merge(recipe.parse_recipe(text, folder=root), out)
        model = load(kind, out)
        if name == "t5":
            assert model.config.num_layers == layers - 1
            assert model.config.num_decoder_layers == 3
        else:
            assert model.config.num_hidden_layers == layers
        if text is LINEAR:
            a, b = (load(kind, root / m).state_dict() for m in "ab")
            for key, value in model.state_dict().items():
                assert value.dtype == a[key].dtype
                torch.testing.assert_close(value, (a[key] + 2 * b[key]) / 3)
