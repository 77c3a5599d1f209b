"""LiNeS: which leaf belongs to which layer, and what it is scaled by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def delta(count):
    return {
        "embed": {"table": jnp.ones((2, 3))},
        **{f"blocks_{i}": {"kernel": jnp.ones((2, 2))} for i in range(count)},
        "head": jnp.ones(4, jnp.bfloat16),
        "step": jnp.ones(1, jnp.int32),
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_linear_in_depth_and_alpha_elsewhere(count):
    alpha, beta = 0.25, 0.5
    got = merging.lines(delta(count), first=alpha, last=alpha + beta)
    for i in range(count):
        want = alpha + beta * i / max(count - 1, 1)
        np.testing.assert_allclose(got[f"blocks_{i}"]["kernel"], want, rtol=1e-6)
    np.testing.assert_array_equal(got["embed"]["table"], alpha)
    assert got["head"].dtype == jnp.bfloat16 and float(got["head"][0]) == alpha
    assert got["step"].tolist() == [1]


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("blocks/3/attention/kernel", 3),
        ("model.layers.10.mlp.weight", 10),
        ("encoder.block.2.layer.1.weight", 2),
        ("layers_7/norm", 7),
        ("0/kernel", 0),
        ("conv_1x1/kernel", None),
        ("head2/bias", None),
    ],
)
def test_names_of_layers(path, index):
    assert merging.layer_index(path) == index


def test_stacked_layers_are_scaled_along_their_axis():
    flat = {f"blocks/{i}": jnp.full((2, 3), 1.0 + i) for i in range(4)}
    want = merging.lines(flat, first=0.1, last=0.9)
    tree = {
        "blocks": {"kernel": jnp.stack(list(flat.values())), "n": jnp.ones(4)},
        "head": jnp.ones(2),
    }
    options = {"first": 0.1, "last": 0.9, "stacked": "^blocks"}
    got = jax.jit(lambda tree: merging.lines(tree, **options))(tree)
    kernels = jnp.stack(list(want.values()))
    np.testing.assert_allclose(got["blocks"]["kernel"], kernels, rtol=1e-5)
    scales = [0.1, 0.1 + 0.8 / 3, 1.9 / 3, 0.9]
    np.testing.assert_allclose(got["blocks"]["n"], scales, rtol=1e-5)
    np.testing.assert_allclose(got["head"], 0.1, rtol=1e-5)


def test_composes_with_a_merge_and_own_rules():
    taus = {"low": jnp.ones((2, 3)), "high": jnp.ones((2, 3))}
    merged = merging.task_arithmetic(taus)
    got = merging.lines(merged, first=0.0, last=1.0, layer={"low": 0, "high": 1}.get)
    assert got["low"].tolist() == [0.0] * 3 and got["high"].tolist() == [2.0] * 3
    deep = merging.lines(
        merged, first=0.0, last=1.0, layer={"low": 1, "high": 2}.get, num_layers=5
    )
    np.testing.assert_allclose([deep["low"][0], deep["high"][0]], [0.5, 1.0], 1e-5)
    same = merging.lines(merged, first=1.0, last=1.0, layer=lambda _: 0)
    np.testing.assert_array_equal(same["low"], merged["low"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": "x"}, "first is 'x', wanted a number"),
        ({"last": None}, "last is None, wanted a number"),
        ({"layer": lambda _: None}, "no leaf is in a layer; there are a_0"),
        ({"layer": lambda _: -1}, "'a_0' is in layer -1, there are 0"),
        ({"num_layers": 1}, "'b_1' is in layer 1, there are 1"),
        ({"stacked": "nothing"}, "stacked is 'nothing', which no leaf matches"),
        ({"stacked": "a", "num_layers": 3}, "'a_0' stacks 2 layers, there are 3"),
    ],
)
def test_refuses_by_name(options, message):
    given = {"a_0": jnp.ones(2), "b_1": jnp.ones(2)}
    with pytest.raises(ValueError, match=f"lines: {message}"):
        merging.lines(given, **{"first": 0.0, "last": 1.0, **options})
