import pytest

from mtl_jax.checkpoints import _layers
from mtl_jax.checkpoints._layers import Stack

pytestmark = pytest.mark.fast


def layers(prefix, count, suffixes=("a.weight", "b.weight")):
    return [f"{prefix}{i}.{s}" for i in range(count) for s in suffixes]


CASES = {
    "llama": (layers("model.layers.", 12), {"num_hidden_layers": 12}),
    "gpt2": (layers("h.", 3), {"n_layer": 3}),
    "bert": (layers("bert.encoder.layer.", 2), {"num_hidden_layers": 2}),
    "experts": (
        [f"model.layers.{i}.experts.{j}.w" for i in range(2) for j in range(5)],
        {"num_hidden_layers": 2},
    ),
    # The first block of T5 alone has position biases, and blocks hold numbered layers.
    "t5": (
        [
            *layers("encoder.block.", 2, ("layer.0.q.weight", "layer.1.w.weight")),
            "encoder.block.0.layer.0.bias.weight",
        ],
        {"num_layers": 2},
    ),
    "one": (layers("model.layers.", 1), {"num_hidden_layers": 1}),
    "text": (layers("lm.layers.", 4), {"text_config": {"num_hidden_layers": 4}}),
    "no config": (layers("blocks.", 4), None),
}


@pytest.mark.parametrize("case", CASES)
def test_stacks(case):
    names, config = CASES[case]
    (found,) = _layers.find_stacks(["embed.weight", *names, "norm.weight"], config)
    prefix, _, rest = names[0].partition("0")
    last = max(int(n.removeprefix(prefix).split(".")[0]) for n in names)
    assert found == Stack(prefix, last + 1) and rest


def test_two_stacks():
    names = layers("encoder.block.", 2) + layers("decoder.block.", 3)
    found = _layers.find_stacks(names, {"num_layers": 2, "num_decoder_layers": 3})
    assert found == (Stack("encoder.block.", 2), Stack("decoder.block.", 3))


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (layers("layers.", 3), {"num_hidden_layers": 4}),  # Not what the config says.
        (["layers.1.w", "layers.2.w"], None),  # No layer 0.
        (["layers.0.a", "layers.1.b"], None),  # Nothing repeats.
        (layers("classifier.", 1), None),
        (["w.0", "w.1"], None),  # Lists of parameters, not of layers.
    ],
)
def test_no_stack(names, config):
    assert _layers.find_stacks(names, config) == ()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.11.mlp.up.weight", ("model.layers", 11, "mlp.up.weight")),
        ("encoder.block.0.layer.1.w", ("encoder.block", 0, "layer.1.w")),
        ("blocks_3/mlp/kernel", ("blocks", 3, "mlp/kernel")),
        ("0.weight", ("", 0, "weight")),
        ("conv1.weight", ("", None, "conv1.weight")),
        ("embed.weight", ("", None, "embed.weight")),
    ],
)
def test_numbers_in_names(name, wanted):
    assert _layers.numbered(name, trees=True) == wanted


def test_without_trees_only_points_count():
    assert _layers.numbered("blocks_3/mlp/kernel").layer is None
    assert _layers.numbered("a_1.b.2.w") == ("a_1.b", 2, "w")


def test_place():
    stacks = (Stack("model.layers.", 12),)
    found = _layers.place("model.layers.11.mlp.3.w", stacks)
    assert (found.layer, found.suffix) == (11, "mlp.3.w")
    assert _layers.place("vision.layers.0.w", stacks) is None
    assert _layers.place("model.norm.weight", stacks) is None


BEFORE = """model.embed_tokens.weight bert.embeddings.LayerNorm.bias
transformer.wte.weight transformer.wpe.weight gpt_neox.embed_in.weight
shared.weight conv1.bias transformer.embedding.word_embeddings.weight
visual.patch_embed.proj.weight model.embedding_norm.weight layernorm_pre.bias
decoder.embed_tokens.weight"""
BEHIND = """model.norm.weight lm_head.weight bert.pooler.dense.weight classifier.bias
cls.predictions.decoder.weight transformer.encoder.final_layernorm.weight
transformer.ln_f.weight embed_out.weight score.weight output.weight
backbone.norm_f.weight gpt_neox.final_layer_norm.bias lm_head.decoder.weight
vocab_projector.weight"""


@pytest.mark.parametrize("name", BEFORE.split())
def test_before(name):
    assert _layers.side(name) == "before"


@pytest.mark.parametrize("name", BEHIND.split())
def test_behind(name):
    assert _layers.side(name) == "behind"


def test_neither():
    assert _layers.side("adapter.scale") is None


def test_config_of_a_new_stack():
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 2,
        "layer_types": ["x", "y"],
        "other": [1, 2],
        "text_config": {"vocab_size": 7},
    }
    other = config | {"layer_types": ["u", "v"]}
    stack = Stack("model.layers.", 2)
    new = [(config, 0), (config, 1), (other, 1)]
    found = _layers.restack_config(config, stack, (stack,), new)
    assert found == config | {"num_hidden_layers": 3, "layer_types": ["x", "y", "v"]}
    assert config["num_hidden_layers"] == 2
    with pytest.raises(ValueError, match=r"has no layer_types"):
        _layers.restack_config(config, stack, (stack,), [({}, 0)])


def test_equal_stacks_are_told_apart_by_words():
    config = {"num_layers": 2, "num_decoder_layers": 2}
    stacks = (Stack("encoder.block.", 2), Stack("decoder.block.", 2))
    found = [_layers.count_keys(config, stack, stacks) for stack in stacks]
    assert found == [{("num_layers",)}, {("num_decoder_layers",)}]
    alike = (Stack("a.", 2), Stack("b.", 2))
    with pytest.raises(ValueError, match="cannot be told"):
        _layers.count_keys(config, alike[0], alike)
