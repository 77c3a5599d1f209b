import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def averages(tx, grams):
    state, out = tx.rule.init(), []
    for gram in grams:
        w, state = tx.rule.weigh(gram, state)
        out.append(np.asarray(w))
    return out


@pytest.fixture
def grams():
    grads = np.random.default_rng(0).normal(size=(4, 3, 8))
    return jnp.asarray(grads @ grads.transpose(0, 2, 1), jnp.float32)


@pytest.mark.parametrize("initial", [None, [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_is_the_moving_average(grams, decay, initial):
    tx = aggregation.cr_mogm(aggregation.imtl_g(), 3, decay=decay, initial=initial)
    want = None if initial is None else np.array(initial)
    for gram, found in zip(grams, averages(tx, grams), strict=True):
        new = np.asarray(aggregation.weights.imtl_g(gram), np.float64)
        want = new if want is None else decay * want + (1 - decay) * new
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_decay_may_follow_a_schedule(grams):
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    tx = aggregation.cr_mogm(aggregation.imtl_g(), 3, decay=schedule)
    new = [np.asarray(aggregation.weights.imtl_g(g)) for g in grams]
    found = averages(tx, grams)
    np.testing.assert_allclose(found[1], (new[0] + new[1]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[3], found[1], rtol=1e-6)


def test_keeps_the_state_of_the_method(grams):
    tx = aggregation.cr_mogm(aggregation.random(seed=3), 3, decay=0.0)
    found = averages(tx, grams)
    alone = averages(aggregation.random(seed=3), grams)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_goes_under_jit_in_a_chain():
    tx = optax.chain(aggregation.cr_mogm(aggregation.mean(), 2), optax.sgd(1.0))
    grads = {"w": jnp.eye(2)}
    out, _ = jax.jit(tx.update)(grads, tx.init({"w": jnp.zeros(2)}))
    assert out["w"].tolist() == [-0.5, -0.5]


def test_refuses_what_it_cannot_average():
    with pytest.raises(ValueError, match="cr_mogm: wanted a method with weights"):
        aggregation.cr_mogm(aggregation.trimmed_mean(), 3)
    with pytest.raises(ValueError, match="cr_mogm: decay is 1.5"):
        aggregation.cr_mogm(aggregation.mean(), 3, decay=1.5)
    with pytest.raises(ValueError, match=r"initial is \(2,\), wanted \(3,\)"):
        aggregation.cr_mogm(aggregation.mean(), 3, initial=[1.0, 2.0])
