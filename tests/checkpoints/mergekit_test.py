import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax.checkpoints import mergekit, recipe
from mtl_jax.checkpoints._schema import Conditional, Slice

pytestmark = pytest.mark.fast

NUMBERS = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@hypothesis.given(NUMBERS, st.floats(0, 1))
def test_gradients_are_piecewise_linear(points, t):
    """Points lie evenly over the layers; NumPy's interpolation is the oracle."""
    found = mergekit.evaluate(tuple(points), "x", t)
    wanted = np.interp(t, np.linspace(0, 1, len(points)), points)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("t", "wanted"), [(0, "a"), (0.49, "a"), (0.5, "b"), (0.99, "b"), (1, "c")]
)
def test_words_change_in_steps(t, wanted):
    assert mergekit.evaluate(("a", "b", "c"), "x", t) == wanted


def test_flags_change_in_steps():
    assert mergekit.evaluate((True, False), "x", 0.9) is True
    assert mergekit.evaluate((True, False), "x", 1.0) is False


def test_the_first_filter_that_fits():
    setting = (
        Conditional("mlp", (0.0, 1.0)),
        Conditional("self_attn", 2.0),
        Conditional("*", 3.0),
        Conditional(None, 4.0),
    )
    assert mergekit.evaluate(setting, "h.0.mlp.w", 0.25) == 0.25
    assert mergekit.evaluate(setting, "h.0.self_attn.q", 0.25) == 2.0
    assert mergekit.evaluate(setting, "norm", 0.25) == 3.0
    assert mergekit.evaluate(setting[:2], "norm", 0.25) is None


@pytest.fixture
def read(tmp_path, monkeypatch):
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda text: recipe.parse_recipe(text, name="r")


def scope_of(found):
    module = found.modules[0]
    part = module.slices[0] if module.slices else Slice(module.models, None, {}, "m")
    return mergekit.Scope(found, module, part)


def test_inner_levels_come_first(read):
    found = read(
        "merge_method: ties\nbase_model: base\n"
        "modules:\n  default:\n    parameters: {weight: 2, density: 0.2}\n"
        "    slices:\n    - parameters: {weight: [{filter: mlp, value: 3}]}\n"
        "      sources:\n"
        "      - {model: a, layer_range: [0, 2],"
        " parameters: {weight: [{filter: gate, value: 4}]}}\n"
        "      - {model: b, layer_range: [0, 2]}\n"
        "parameters: {weight: 1, density: 0.1, lambda: 0.5}\n"
    )
    scope = scope_of(found)
    a, b = scope.part.sources
    # Source, slice, module, recipe: the first that has a value for the tensor.
    assert scope.find("weight", "mlp.gate", 0, a) == 4
    assert scope.find("weight", "mlp.gate", 0, b) == 3
    assert scope.find("weight", "mlp.up", 0, a) == 3
    assert scope.find("weight", "norm", 0, a) == 2
    assert scope.find("density", "norm", 0, a) == 0.2
    assert scope.find("lambda", "norm", 0) == 0.5
    assert scope.find("normalize", "norm", 0) is None


def test_options_for_a_tensor(read):
    found = read(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: {weight: 1, density: 1}}\n- b\n"
        "parameters: {weight: [2, 4], normalize: 0, int8_mask: true}\n"
    )
    rule = mergekit.find_rule(found.method, "r")
    mergekit.check_parameters(found, rule)
    experts = [(entry, "x") for entry in found.modules[0].models]
    options = mergekit.options_for(scope_of(found), rule, "x", experts, 0.5)
    assert options["weight"] == (1, 3.0) and options["density"] == (1, 1.0)
    assert options["normalize"] is False and options["lambda"] == 1.0
    assert "int8_mask" not in options


def test_names_of_inputs_choose_values(read):
    """Values of a model are by the name that the tensor has in it."""
    found = read(
        "merge_method: linear\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 1]}\n  - {model: b, layer_range: [5, 6]}\n"
        "parameters: {weight: [{filter: h.5., value: 7}, {value: 1}]}"
    )
    rule = mergekit.find_rule("linear", "r")
    a, b = found.modules[0].slices[0].sources
    experts = [(a, "h.0.w"), (b, "h.5.w")]
    options = mergekit.options_for(scope_of(found), rule, "h.0.w", experts, 1.0)
    assert options["weight"] == (1, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tis\nmodels: [a]", r"unknown merge_method 'tis'.*'ties'"),
        (
            "merge_method: ties\nbase_model: base\nmodels: [a]\n"
            "parameters: {densty: 1}",
            r"r: parameters: ties has no parameter 'densty'; did you mean 'density'",
        ),
        (
            "merge_method: linear\nmodels:\n- {model: a, parameters: {density: 1}}",
            r"models\[0\]\.parameters: linear has no parameter 'density'",
        ),
        (
            "merge_method: linear\nmodels: [a]\nparameters: {int8_mask: true}",
            "linear has no parameter 'int8_mask'",
        ),
        (
            "merge_method: ties\nbase_model: base\nmodels:\n"
            "- {model: a, parameters: {normalize: 1}}",
            "has one normalize for all models",
        ),
        (
            "merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 1]}],"
            " parameters: {tt: 1}}]",
            r"slices\[0\]\.parameters: slerp has no parameter 'tt'",
        ),
    ],
)
def test_unknown_names(read, text, message):
    found = read(text)
    with pytest.raises(ValueError, match=message):
        mergekit.check_parameters(found, mergekit.find_rule(found.method, found.name))


def test_missing_values_are_named(read):
    found = read("merge_method: linear\nmodels: [a]")
    rule = mergekit.find_rule("linear", "r")
    experts = [(found.modules[0].models[0], "x")]
    with pytest.raises(ValueError, match=r"weight of a is not given for 'x'"):
        mergekit.options_for(scope_of(found), rule, "x", experts, 0)


def test_gradients_are_noticed(read):
    head = "merge_method: ties\nbase_model: base\nmodels: [a]\n"
    assert mergekit.has_gradient(read(head + "parameters: {weight: [1, 2]}"))
    nested = "parameters: {weight: [{filter: x, value: [1, 2]}]}"
    assert mergekit.has_gradient(read(head + nested))
    assert not mergekit.has_gradient(
        read(head + "parameters: {weight: [{filter: x, value: 1}, {value: 2}]}")
    )
