import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mtl_jax import train
from mtl_jax.train import state as train_state

pytestmark = pytest.mark.fast

PARAMS = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "n": jnp.arange(3)}


def test_split_and_merge_are_inverse():
    trained, frozen = train_state.split(PARAMS, ("^n$", "a/b"))
    assert (trained["a"]["b"], trained["n"], frozen["a"]["w"]) == (None, None, None)
    merged = train_state.merge(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS), strict=True)
    )


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("^n$", "blocks"), "'blocks' matches none of the 3 leaves"),
        ((".*",), "nothing is left to train"),
        ((), "'n' is int32, only floating leaves can be trained"),
    ],
)
def test_split_refuses(frozen, message):
    with pytest.raises(ValueError, match=message):
        train_state.split(PARAMS, frozen)


def test_state_shares_no_buffer_and_has_no_weak_type(toy):
    params = toy.init(jax.random.key(0))
    make = jax.jit(lambda p, k: train_state.init_state(toy.trainable(), p, k, ema=True))
    state = make(params, jax.random.key(1))
    whole = train_state.merge(state.params, state.frozen)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(state))


def test_average_is_float32_and_optimizer_sees_trained_leaves_only(toy):
    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))

    state = train_state.abstract_state(
        toy.trainable(init=init, tx=optax.adam(1.0)), train.make_mesh(), ema=True
    )
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert state.opt_state[0].mu["scale"] is None
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 3 + 1


def test_abstract_state_follows_the_rules(toy):
    mesh = train.make_mesh(4, 2)
    rules = (("kernel$", P("data", "model")), (".*", P()))
    state = train_state.abstract_state(toy.trainable(rules=rules), mesh, ema=True)
    for tree in (state.params, state.ema, state.opt_state[0].mu):
        assert tree["body"]["kernel"].sharding.spec == P("data", "model")
        assert tree["body"]["bias"].sharding.spec == P()
    with pytest.raises(ValueError, match="no rule covers 'body/bias', 'scale'"):
        train_state.abstract_state(toy.trainable(rules=rules[:1]), mesh)
