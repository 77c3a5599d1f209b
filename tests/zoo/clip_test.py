import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, zoo
from mtl_jax.models import heads


@pytest.mark.fast
def test_without_weights_parameters_are_shapes():
    encoder = zoo.clip(model="clip-vit-l/14")
    leaves = jax.tree.leaves(encoder.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert 303e6 < sum(leaf.size for leaf in leaves) < 305e6
    with pytest.raises(ValueError, match=r"suite\.options\.base\.weights"):
        zoo.require_weights(encoder, ["mnist", "svhn"])


@pytest.mark.fast
def test_heads_come_from_a_file_of_class_embeddings():
    from mtl_jax import data

    encoder = zoo.clip(model="clip-vit-b/32")
    with pytest.raises(ValueError, match="'mnist' needs class embeddings"):
        encoder.prototypes(data.get("mnist"), {})


CONFIG = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 5,
    "vision_config": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "image_size": 8,
        "patch_size": 4,
    },
    "text_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 29,
        "max_position_embeddings": 9,
        "eos_token_id": 28,
    },
}
TEXTS = {
    "pets": heads.fill_templates(["cat", "dog", "ant"], ["a {}", "see {}"]),
    "one": [["b"], ["cc"]],
}


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint; a tokenizer of letters that ends texts by token 28."""
    tokenizers = pytest.importorskip("tokenizers")
    table = io.names.clip
    module = models.build(table.model, **table.options(CONFIG))
    inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 9), jnp.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
    io.save_pretrained(tmp_path, params, table, config=CONFIG)
    letters = {c: i for i, c in enumerate(" abcdefghijklmnopqrstuvwxyz")}
    out = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**letters, "?": 27, "<end>": 28}, unk_token="?")
    )
    pre = tokenizers.pre_tokenizers
    out.pre_tokenizer = pre.Split(tokenizers.Regex("."), behavior="isolated")
    out.save(str(tmp_path / "plain.json"))
    out.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 28)]
    )
    out.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_heads_are_made_by_the_text_tower(folder):
    found = zoo.text_heads(folder, TEXTS)
    table = io.names.clip_text
    module = models.build(table.model, **table.options(CONFIG))
    params = io.load_pretrained(folder, table)
    apply = jax.jit(lambda ids: module.apply({"params": params}, ids))
    for task, classes in TEXTS.items():
        for row, texts in zip(found[task], classes, strict=True):
            units = []
            for text in texts:
                ids = [0 if c == " " else ord(c) - 96 for c in text]
                ids = np.array([(ids + [28] + 9 * [0])[:9]], np.int32)
                x = np.asarray(apply(ids), np.float64)[0]
                units.append(x / np.linalg.norm(x))
            want = np.mean(units, axis=0)
            np.testing.assert_allclose(row, want / np.linalg.norm(want), atol=1e-5)


def test_texts_that_do_not_fit_are_named(folder):
    for classes, message in (
        ([["a"], ["b", "c"]], r"'t' has classes of \[1, 2\] texts"),
        ([], r"'t' has classes of \[\] texts"),
        ([["a" * 9]], "has 10 tokens, wanted 1 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.text_heads(folder, {"t": classes})
    (folder / "plain.json").rename(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="gives 'a' no end token 28"):
        zoo.text_heads(folder, {"t": [["a"]]})
