import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import placement

pytestmark = pytest.mark.fast


@pytest.fixture
def mesh():
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


def constraints(mesh, fn, *shapes):
    """Specs of the constraints that a program holds, in order."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jaxpr = jax.make_jaxpr(fn)(*inputs)
    return [
        eqn.params["sharding"].spec
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "sharding_constraint"
    ]


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((8, 2))
    assert placement.parts(8) == 1
    assert placement.keep_split(x, "data") is x
    assert placement.keep_by_rules({"x": x}, ((".", P("data")),))["x"] is x


@pytest.mark.parametrize(
    ("size", "axis", "parts"),
    [(8, "data", 4), (6, "data", 1), (6, "model", 2), (8, "expert", 1)],
)
def test_parts_divide(mesh, size, axis, parts):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert placement.parts(size, axis) == parts


def test_what_cannot_be_split_is_left_alone(mesh):
    def keep(*axes):
        return lambda x: placement.keep_split(x, *axes)

    assert constraints(mesh, keep("data"), (8, 2)) == [P("data")]
    assert constraints(mesh, keep("data"), (6, 2)) == []
    assert constraints(mesh, keep("data", None, "model"), (8, 5, 4)) == [
        P("data", None, "model")
    ]
    assert constraints(mesh, keep("data", None, "model"), (8, 5, 3)) == [
        P("data", None, P.UNCONSTRAINED)
    ]
    assert constraints(mesh, keep("expert", "model"), (8, 4)) == [
        P(P.UNCONSTRAINED, "model")
    ]


def test_inside_shard_map_the_axis_is_not_ours(mesh):
    def inner(x):
        assert placement.parts(8) == 1
        return placement.keep_split(x, "data")

    mapped = jax.shard_map(inner, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(mapped, jnp.ones((32, 2))).shape == (32, 2)


def test_values_stay_and_lie_as_asked(mesh):
    x = jnp.arange(32.0).reshape(8, 4)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        whole = jax.device_put(x, NamedSharding(mesh, P()))
        y = jax.jit(lambda x: placement.keep_split(x, "data", "model"))(whole)
    assert y.sharding.spec == P("data", "model")
    assert jnp.array_equal(x, y)


def test_rules_place_the_leaves_they_name(mesh):
    rules = (("key$", P(None, "data")), ("length", P("data")))
    leaves = {"key": (3, 8), "length": (8,), "other": (8,)}

    def keep(*arrays):
        tree = dict(zip(leaves, arrays, strict=True))
        return placement.keep_by_rules(tree, rules)

    found = constraints(mesh, keep, *leaves.values())
    assert found == [P(None, "data"), P("data")]
