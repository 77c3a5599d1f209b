"""Every table, both ways, on parameters of its own backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, tree
from mtl_jax.models.backbones.vit import CLIP_OPTIONS

BLOCKS = {"width": 8, "depth": 3, "num_heads": 2, "mlp_dim": 12}
VIT = {"image_size": 8, "patch_size": 4, **BLOCKS}
CLIP_TEXT = {"vocab_size": 11, "max_positions": 6, "projection": 5, **BLOCKS}
CLIP_CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
CASES = {
    "bert": (io.names.bert, {"vocab_size": 11, "max_positions": 6, **BLOCKS}),
    "vit": (io.names.vit, VIT),
    "clip": (io.names.clip_vision, {**VIT, **CLIP_OPTIONS, "projection": 5}),
    "clip-text": (io.names.clip_text, CLIP_TEXT),
    "clip-whole": (
        io.names.clip,
        {
            "vision_options": {**VIT, "projection": 5},
            "text_options": CLIP_TEXT,
        },
    ),
    "clip-bare": (io.names.clip_vision, {**VIT, **CLIP_OPTIONS}),
}


def abstract(case, **options):
    table, base = CASES[case]
    module = models.build(table.model, **base, **options)
    ids, images = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 8, 8, 3))
    inputs = {"vit": (images,), "clip": (images, ids)}.get(table.model, (ids,))
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def filled(like):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)


def foreign(case, **options):
    table, _ = CASES[case]
    params = filled(abstract(case, **options))
    return params, {k: np.asarray(v) for k, v in table.save(params).items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", CASES)
def test_save_then_load_is_identity(case):
    table, _ = CASES[case]
    params, tensors = foreign(case)
    assert_same(table.load(tensors), params)
    assert_same(table.load(tensors, abstract(case)), params)


@pytest.mark.parametrize("case", CASES)
def test_scanned_parameters_meet_the_same_tensors(case):
    table, _ = CASES[case]
    params, tensors = foreign(case)
    scanned = table.load(tensors, abstract(case, scan=True))
    if case == "clip-whole":
        towers = {k: models.unstack_layers(scanned[k]) for k in ("text", "vision")}
        assert_same({**scanned, **towers}, params)
    else:
        assert_same(models.unstack_layers(scanned), params)
    again = table.save(scanned)
    assert set(again) == set(tensors)
    for name, want in tensors.items():
        np.testing.assert_array_equal(np.asarray(again[name]), want)


@pytest.mark.parametrize("case", CASES)
def test_saved_leaves_announce_shape_and_dtype_truly(case):
    table, _ = CASES[case]
    for name, leaf in table.save(filled(abstract(case))).items():
        array = np.asarray(leaf)
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype), name


@pytest.mark.parametrize("case", CASES)
def test_every_rule_is_used_and_unique(case):
    table, _ = CASES[case]
    for column in ("name", "path"):
        values = [getattr(rule, column) for rule in table.rules]
        assert len(set(values)) == len(values)
    if case != "clip-bare":
        paths = set(tree.paths(abstract(case)))
        for rule in table.rules:
            assert rule.path.replace("{i}", "2") in paths


def test_all_faults_are_listed_at_once():
    table = io.names.bert
    _, tensors = foreign("bert")
    del tensors["encoder.layer.1.output.dense.bias"]
    del tensors["embeddings.LayerNorm.weight"]
    tensors["surprise"] = np.ones(1)
    name = "encoder.layer.2.intermediate.dense.weight"
    tensors[name] = tensors[name][:, :5]
    for like in (abstract("bert"), abstract("bert", scan=True)):
        with pytest.raises(ValueError, match="^here: ") as caught:
            table.load(tensors, like, where="here")
        for part in (
            "missing: 'encoder.layer.1.output.dense.bias' for 'layers_1/mlp/out/bias'",
            "missing: 'embeddings.LayerNorm.weight' for 'embeddings/norm/scale'",
            "unexpected: 'surprise'",
            f"wrong shape: {name!r} gives (5, 12) for 'layers_2/mlp/in/kernel', "
            "which is (8, 12)",
        ):
            assert part in str(caught.value)


def test_without_like_layers_must_still_be_complete():
    _, tensors = foreign("bert")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    with pytest.raises(ValueError, match=r"missing: 'encoder\.layer\.0\.attention"):
        io.names.bert.load(tensors)
    no_layers = {k: v for k, v in tensors.items() if "layer." not in k}
    with pytest.raises(ValueError, match=r"missing: 'encoder\.layer\.0\.output"):
        io.names.bert.load(no_layers)
    with pytest.raises(ValueError, match="missing"):
        io.names.bert.load({})


def test_wrong_number_of_axes_is_named_even_without_like():
    _, tensors = foreign("vit")
    tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"][0]
    with pytest.raises(ValueError, match=r"'embeddings\.cls_token' is \(1, 8\)"):
        io.names.vit.load(tensors)


def test_depth_that_differs_from_like_is_named():
    _, tensors = foreign("bert")
    deeper = abstract("bert", scan=True)
    deeper = jax.tree.map(lambda x: x, deeper)
    deeper["layers"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype), deeper["layers"]
    )
    with pytest.raises(ValueError, match=r"missing: 'encoder\.layer\.3\."):
        io.names.bert.load(tensors, deeper)


def test_layers_beyond_like_are_not_dropped_in_silence():
    _, tensors = foreign("bert")
    like = {k: v for k, v in abstract("bert").items() if k != "layers_2"}
    with pytest.raises(ValueError, match=r"unexpected: 'encoder\.layer\.2\."):
        io.names.bert.load(tensors, like)


def test_prefixes_heads_and_old_spellings_are_understood():
    params, tensors = foreign("bert")
    old = {
        "bert."
        + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in tensors.items()
    }
    old["cls.predictions.bias"] = np.ones(11)
    old["bert.pooler.dense.bias"] = np.ones(8)
    assert_same(io.names.bert.load(old), params)

    params, tensors = foreign("clip-bare")
    bare = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    bare["logit_scale"] = np.ones(())
    bare["text_model.anything"] = np.ones(3)
    assert_same(io.names.clip_vision.load(bare), params)


def test_optional_projection_follows_like():
    _, tensors = foreign("clip")
    bare = io.names.clip_vision.load(tensors, abstract("clip-bare"))
    assert "projection" not in bare
    _, tensors = foreign("clip-bare")
    with pytest.raises(ValueError, match=r"missing: 'visual_projection\.weight'"):
        io.names.clip_vision.load(tensors, abstract("clip"))


def test_the_same_leaf_twice_is_refused():
    _, tensors = foreign("bert")
    tensors["bert.embeddings.LayerNorm.bias"] = np.zeros(8)
    with pytest.raises(ValueError, match="twice the same tensor"):
        io.names.bert.load(tensors)


def test_like_decides_the_dtype_but_not_the_kind():
    _, tensors = foreign("bert")
    half = {k: v.astype(np.float16) for k, v in tensors.items()}
    got = io.names.bert.load(half, abstract("bert"))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(io.names.bert.load(half))} == {
        jnp.dtype("float16")
    }
    half["embeddings.LayerNorm.bias"] = np.zeros(8, np.int32)
    with pytest.raises(ValueError, match="wrong dtype: .*is int32"):
        io.names.bert.load(half, abstract("bert"))


def test_leaves_outside_the_table_are_refused_on_save():
    params = filled(abstract("bert"))
    params["head"] = {"kernel": np.ones(2)}
    with pytest.raises(ValueError, match=r"NameTable\.save: no rule for head/kernel"):
        io.names.bert.save(params)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("table", "config", "message"),
    [
        (io.names.bert, {}, "names.bert: config lacks hidden_size"),
        (
            io.names.bert,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not supported",
        ),
        (io.names.vit, {"qkv_bias": False}, "qkv_bias=False is not supported"),
        (
            io.names.clip_vision,
            {"vision_config": {}},
            "names.clip_vision: config lacks hidden_size",
        ),
        (io.names.clip_text, {"text_config": {}}, "clip_text: config lacks hidden"),
        (io.names.clip, {"vision_config": {}}, "names.clip: config lacks text_config"),
        (
            io.names.clip_text,
            {**CLIP_CONFIG, "eos_token_id": [1, 2]},
            r"eos_token_id=\[1, 2\] is not supported",
        ),
        (
            io.names.clip_text,
            {**CLIP_CONFIG, "hidden_act": "relu"},
            "hidden_act='relu' is not supported",
        ),
    ],
)
def test_configs_are_read_strictly(table, config, message):
    with pytest.raises(ValueError, match=message):
        table.options(config)


def test_stacks_inside_of_a_tree():
    rules = [
        io.names.Rule(f"{name}.{{i}}.w", f"{name}/layers_{{i}}/w")
        for name in ("left", "right")
    ]
    table = io.names.NameTable(model="", rules=tuple(rules), options=dict)
    values = {"left": 3, "right": 2}
    tensors = {
        f"{name}.{i}.w": np.full(2, 10 * len(name) + i, np.float32)
        for name, depth in values.items()
        for i in range(depth)
    }
    unrolled = table.load(tensors)
    assert sorted(unrolled["left"]) == ["layers_0", "layers_1", "layers_2"]
    assert sorted(unrolled["right"]) == ["layers_0", "layers_1"]
    want = {name: models.stack_layers(tower) for name, tower in unrolled.items()}
    scanned = table.load(tensors, want)
    assert_same(scanned, want)
    for params in (unrolled, scanned):
        again = table.save(params)
        assert {k: np.asarray(v).tolist() for k, v in again.items()} == {
            k: v.tolist() for k, v in tensors.items()
        }
    del tensors["left.1.w"]
    with pytest.raises(ValueError, match=r"missing: 'left\.1\.w' for 'left/layers_1/w"):
        table.load(tensors)
