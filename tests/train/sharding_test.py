import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import train
from mtl_jax.train import sharding

pytestmark = pytest.mark.fast

PARAMS = {"a": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "b": jnp.ones(())}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, {"data": 8, "model": 1}),
        ({"model": 2}, {"data": 4, "model": 2}),
        ({"data": 2, "model": -1}, {"data": 2, "model": 4}),
        ({"data": 2, "model": 2, "expert": 2}, {"data": 2, "model": 2, "expert": 2}),
        ({"data": 1, "expert": -1}, {"data": 1, "model": 1, "expert": 8}),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = train.make_mesh(**sizes)
    assert dict(mesh.shape) == shape
    assert list(mesh.shape) == list(shape)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 3}, "want a multiple of 3 devices, found 8"),
        ({"data": 2, "model": 2}, "want 4 devices, found 8"),
        ({"data": 0}, "axis 'data' wants a positive size or -1, found 0"),
        ({"data": -1, "model": -1}, "only one axis may be -1"),
    ],
)
def test_mesh_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        train.make_mesh(**sizes)


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"\['data'\] are not of type Auto"):
        sharding.check_mesh("f", mesh)


def test_mesh_without_data_axis_is_refused():
    with pytest.raises(ValueError, match="wants an axis 'data', found"):
        sharding.check_mesh("f", Mesh(np.array(jax.devices()), ("x",)))


def test_first_matching_rule_wins():
    rules = ((r"kernel$", P("data", "model")), (r"a/", P("model")), (r".*", P()))
    specs = train.specs_from_rules(PARAMS, rules)
    assert specs == {"a": {"kernel": P("data", "model"), "bias": P("model")}, "b": P()}


def test_uncovered_leaves_are_listed():
    with pytest.raises(ValueError, match="no rule covers 'a/bias', 'b'; rules are"):
        train.specs_from_rules(PARAMS, (("kernel", P()),))


def test_spec_longer_than_leaf():
    with pytest.raises(ValueError, match="'a/bias' has 1 dimensions, rule 'bias'"):
        train.specs_from_rules(PARAMS, (("bias", P(None, "model")), (".*", P())))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("expert"), "'a/kernel' wants mesh axis 'expert', found axes"),
        (P(("data", "model")), r"dimension 0 of 'a/kernel' \(4, 8\) does not divide"),
    ],
)
def test_specs_must_fit(spec, message):
    mesh = train.make_mesh(4, 2)
    specs = train.specs_from_rules(PARAMS, (("kernel", spec), (".*", P())))
    with pytest.raises(ValueError, match=message):
        sharding.shardings(mesh, PARAMS, specs)


def test_optimizer_state_is_placed_like_its_parameters():
    specs = train.specs_from_rules(PARAMS, (("kernel", P("data", "model")), ("", P())))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    placed = sharding.like_params(tx.init(PARAMS), PARAMS, specs)
    adam = placed[1][0]
    assert adam.mu == adam.nu == specs
    assert adam.count == P()


def test_leading_axes_of_a_copy_stay_whole_and_other_shapes_are_replicated():
    specs = {"w": P("model", None)}
    params = {"w": jnp.ones((4, 2))}
    tree = {"tasks": {"w": jnp.ones((3, 4, 2))}, "rows": {"w": jnp.ones(4)}}
    placed = sharding.like_params(tree, params, specs)
    assert placed == {"tasks": {"w": P(None, "model", None)}, "rows": {"w": P()}}


def test_longest_path_decides():
    params = {"w": jnp.ones(4), "a": {"w": jnp.ones(4)}}
    specs = {"w": P("data"), "a": {"w": P("model")}}
    assert sharding.like_params({"mu": params}, params, specs) == {"mu": specs}


def test_batch_is_split_over_data_and_scalars_are_not():
    mesh = train.make_mesh(4, 2)
    batch = train.shard_batch(mesh, {"x": np.arange(8.0), "t": np.int32(3)})
    assert batch["x"].sharding == NamedSharding(mesh, P("data"))
    assert batch["t"].sharding.is_fully_replicated
    np.testing.assert_array_equal(batch["x"], np.arange(8.0))


@pytest.mark.parametrize(
    ("batch", "accumulate", "message"),
    [
        ({"x": np.ones((6, 2))}, 1, "'x' has 6 examples.*4 parts of mesh axis 'data'"),
        ({"x": np.ones((4, 2))}, 2, "times 2 accumulated microbatches"),
        ({"x": np.ones(4), "y": np.ones(8)}, 1, "'y' has 8 examples, 'x' has 4"),
        ({"s": np.array(["a"] * 4)}, 1, "'s' wants a numeric array, found an array of"),
        ({"s": "text"}, 1, "'s' wants a numeric array"),
        ({"x": np.ones((0, 2))}, 1, "holds no examples"),
        ({}, 1, "holds no examples"),
    ],
)
def test_bad_batches(batch, accumulate, message):
    with pytest.raises(ValueError, match=message):
        train.shard_batch(train.make_mesh(4, 2), batch, accumulate=accumulate)
