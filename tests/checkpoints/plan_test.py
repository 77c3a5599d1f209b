import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import _inputs, _plan, recipe
from mtl_jax.checkpoints.source import TensorSpec

pytestmark = pytest.mark.fast

UP = "model.layers.{}.mlp.up_proj.weight"
TIES = "merge_method: ties\nbase_model: base\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory, save_llama):
    """Two-layer `base`, `a`, `b`; three-layer `deep`; one of another width."""
    root = tmp_path_factory.mktemp("models")
    tensors = {name: save_llama(root / name, i) for i, name in enumerate("ab")}
    tensors["base"] = save_llama(root / "base", 9)
    tensors["deep"] = save_llama(root / "deep", 3, layers=3)
    save_llama(root / "typed", 3, layers=3, layer_types=["x", "y", "z"])
    save_llama(root / "wide", 4, dim=18)
    save_llama(root / "less", 5, drop=("model.norm.weight", UP.format(1)))
    save_llama(root / "more", 5, extra={"extra.scale": np.ones(2, np.float32)})
    save_llama(root / "large", 6, rows=30)
    save_llama(root / "bare", 6, rows=30, tokens={})
    save_llama(root / "wrong", 7, num_hidden_layers=5)
    ids = np.arange(4)
    save_llama(root / "ids", 8, extra={"model.position_ids": ids})
    return root, tensors


@pytest.fixture(scope="module")
def plan(models):
    def make(text, dtype=None):
        read = recipe.parse_recipe(text, name="r", folder=models[0])
        return _plan.make_plan(read, _inputs.open_inputs(read), dtype)

    return make


def jobs(found):
    return {job.name: job for job in found.jobs}


def test_models_gradients_and_filters(plan, models):
    found = plan(
        TIES
        + "models:\n- {model: a, parameters: {weight: [0, 1]}}\n- {model: b}\n"
        + "parameters:\n  weight: [{filter: up_proj, value: 3}, {value: 2}]\n"
        + "  density: 0.5\n"
    )
    made = jobs(found)
    assert set(made) == set(models[1]["base"])
    # t = 0 in the first layer and outside of layers, 1 in the last.
    assert made[UP.format(0)].options["weight"] == (0, 3)
    assert made[UP.format(1)].options["weight"] == (1, 3)
    assert made["lm_head.weight"].options["weight"] == (0, 2)
    job = made[UP.format(1)]
    assert job.options["density"] == (0.5, 0.5) and job.models == ("a", "b")
    np.testing.assert_array_equal(job.base.whole(), models[1]["base"][job.name])
    np.testing.assert_array_equal(job.experts[1].whole(), models[1]["b"][job.name])
    assert job.spec == TensorSpec((32, 16), np.dtype(ml_dtypes.bfloat16))
    nbytes = sum(t.nbytes for t in models[1]["base"].values())
    assert (found.write_bytes, found.read_bytes) == (nbytes, 3 * nbytes)


@pytest.mark.parametrize(
    ("more", "option", "wanted"),
    [
        ("", None, "bfloat16"),
        ("dtype: float16", None, "float16"),
        ("dtype: float16\nout_dtype: float32", None, "float32"),
        ("dtype: float16", "float32", "float32"),
    ],
)
def test_dtypes(plan, more, option, wanted):
    text = "merge_method: linear\nmodels: [a]\nparameters: {weight: 1}\n"
    assert {j.spec.dtype.name for j in plan(text + more, option).jobs} == {wanted}


def test_integers_keep_their_dtype(plan):
    text = "merge_method: passthrough\nmodels: [ids]\ndtype: float32"
    found = jobs(plan(text))
    assert found["model.position_ids"].spec.dtype == np.int64
    assert found["lm_head.weight"].spec.dtype == np.float32


def test_the_base_among_the_models_is_no_expert(plan):
    text = TIES + "models: [base, a]\nparameters: {weight: 1}"
    assert {job.models for job in plan(text).jobs} == {("a",)}


def test_a_base_that_the_rule_does_not_take_is_a_model(plan):
    head = "merge_method: linear\nbase_model: base\nmodels: [a]\n"
    found = plan(head + "parameters: {weight: 1}")
    assert {job.models for job in found.jobs} == {("a", "base")}
    assert {job.base for job in found.jobs} == {None}
    assert "base is one more model" in found.notes[0]
    with pytest.raises(ValueError, match="weight of base is not given"):
        plan(head.replace("[a]", "[{model: a, parameters: {weight: 1}}]"))


def test_slices(plan, models):
    found = plan(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: deep, layer_range: [0, 2]}]\n"
        "- sources: [{model: a, layer_range: [0, 2], parameters: {scale: [1, 3]}}]\n"
    )
    made, tensors = jobs(found), models[1]
    wanted = [("deep", 0), ("deep", 1), ("a", 0), ("a", 1)]
    for new, (model, layer) in enumerate(wanted):
        view = made[UP.format(new)].experts[0]
        np.testing.assert_array_equal(view.whole(), tensors[model][UP.format(layer)])
    # t runs over each slice.
    scales = [made[UP.format(i)].options["scale"] for i in range(4)]
    assert scales == [(None,), (None,), (1,), (3,)]
    # Before the layers: of the first slice; behind them: of the last.
    for name, model in (
        ("model.embed_tokens.weight", "deep"),
        ("model.norm.weight", "a"),
        ("lm_head.weight", "a"),
    ):
        np.testing.assert_array_equal(
            made[name].experts[0].whole(), tensors[model][name]
        )
    assert len(made) == 4 * 9 + 3
    assert found.config["num_hidden_layers"] == 4


def test_slices_merge_layers_of_other_places(plan, models):
    found = plan(
        "merge_method: slerp\nbase_model: a\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 2]}\n  - {model: deep, layer_range: [1, 3]}\n"
        "parameters: {t: [0, 1]}"
    )
    job = jobs(found)[UP.format(1)]
    np.testing.assert_array_equal(
        job.experts[0].whole(), models[1]["deep"][UP.format(2)]
    )
    np.testing.assert_array_equal(job.base.whole(), models[1]["a"][UP.format(1)])
    assert job.options["t"] == 1 and jobs(found)["lm_head.weight"].options["t"] == 0


def test_a_slice_of_one_layer_is_at_the_end_of_gradients(plan):
    found = plan(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [1, 2], parameters: {scale: [2, 5]}}]"
    )
    assert jobs(found)[UP.format(0)].options["scale"] == (5,)


def test_modules(plan):
    text = "merge_method: linear\nparameters: {weight: 1}\nmodules:\n"
    whole = plan(text + "  default: {models: [a, b]}")
    assert len(whole.jobs) == 21
    split = plan(
        text + "  mlp: {models: [a], parameters: {weight: 2}}\n"
        "  decoder: {models: [a, b]}"
    )
    made = jobs(split)
    assert len(made) == 21
    assert made[UP.format(0)].options["weight"] == (2,)
    assert made["lm_head.weight"].options["weight"] == (1, 1)
    with pytest.raises(ValueError, match="belong to none of mlp"):
        plan(text + "  mlp: {models: [a]}\n  norm: {models: [a]}")


def test_config_lists_follow_layers(plan):
    found = plan(
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: typed, layer_range: [0, 1]}]\n"
        "- sources: [{model: typed, layer_range: [0, 3]}]\n"
    )
    assert found.config["layer_types"] == ["x", "x", "y", "z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TIES + "models: [a, less]\nparameters: {weight: 1}",
            r"less lacks 'model.(norm|layers.1.mlp.up_proj).weight', 'model.\w+",
        ),
        (
            TIES + "models: [a, more]\nparameters: {weight: 1}",
            "a lacks 'extra.scale'; base lacks 'extra.scale'",
        ),
        (
            TIES + "models: [wide]\nparameters: {weight: 1}",
            r"'lm_head.weight' is \[24, 18\] in wide, \[24, 16\] in base.*"
            "15 more shapes differ$",
        ),
        (
            TIES + "models: [deep]\nparameters: {weight: 1}",
            r"base lacks 'model.layers.2",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [b, deep]\nparameters: {t: 1}",
            "there are 2 models beside the base",
        ),
        (
            "merge_method: slerp\nbase_model: base\nslices:\n- sources:"
            " [{model: a, layer_range: [0, 2]}]\nparameters: {t: 1}",
            "there is no base",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            "- sources: [{model: a, layer_range: [1, 3]}]",
            r"slices\[0\]\.sources\[0\]: a has no layer model\.layers\.2",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            "- sources: [{model: wrong, layer_range: [0, 2]}]",
            r"show model\.layers\.0 to 1, but its config\.json says "
            "num_hidden_layers 5",
        ),
        (
            "merge_method: linear\nmodels: [wrong]\nparameters: {weight: [0, 1]}",
            "lists of values change over layers; the tensors of wrong show",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            "- sources: [{model: a, layer_range: [0, 1]}]\n"
            "- sources: [{model: more, layer_range: [0, 1]}]",
            "whether 'extra.scale' stands before the layers or behind",
        ),
        (
            TIES + "models: [a]\nparameters: {weight: 1, density: 2}",
            "option 'density' is 2, wanted 0 to 1",
        ),
        (
            "merge_method: ties\nmodels: [a]\nparameters: {weight: 1}",
            "there is no base",
        ),
    ],
)
def test_what_does_not_fit(plan, text, message):
    with pytest.raises(ValueError, match=message):
        plan(text)


def test_other_vocabularies_are_told_the_way_out(plan):
    with pytest.raises(ValueError, match="tokenizers of base and large differ"):
        plan(TIES + "models: [large]\nparameters: {weight: 1}")
    with pytest.raises(ValueError, match=r"\[30, 16\] in bare.*tokenizer_source"):
        plan(TIES + "models: [bare]\nparameters: {weight: 1}")
