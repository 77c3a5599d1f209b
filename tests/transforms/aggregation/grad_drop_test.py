import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

pytestmark = pytest.mark.fast


def update(grads, **options):
    tx = aggregation.grad_drop(**options)
    tree = {"w": jnp.asarray(grads, jnp.float32)}
    return np.asarray(tx.update(tree, tx.init({"w": tree["w"][0]}))[0]["w"])


# An even and an odd last axis draw their bits differently.
@pytest.mark.parametrize("width", [20_000, 20_001])
@pytest.mark.parametrize("column", [[3.0, -1.0], [1.0, -2.0, 1.0], [0.1, -3.0, -1.0]])
def test_signs_are_kept_as_often_as_they_are_pure(width, column):
    grads = np.repeat(np.array(column)[:, None], width, 1)
    out = update(grads)
    positive = sum(x for x in column if x > 0)
    negative = sum(x for x in column if x < 0)
    np.testing.assert_allclose(np.unique(out), [negative, positive], rtol=1e-6)
    purity = positive / (positive - negative)
    spread = np.sqrt(purity * (1 - purity) / width)
    assert abs((out > 0).mean() - purity) < 5 * spread
    halves = [(half > 0).mean() for half in np.array_split(out, 2)]
    assert abs(halves[0] - halves[1]) < 5 * np.sqrt(2) * 2 * spread
    assert abs(np.corrcoef(out[: width // 2], out[-(width // 2) :])[0, 1]) < 0.05


def test_pure_coordinates_are_sums():
    grads = np.abs(np.random.default_rng(0).normal(size=(4, 64)))
    grads[:, ::2] *= -1
    np.testing.assert_allclose(update(grads), grads.sum(0), rtol=1e-5)


def test_leaks():
    grads = np.random.default_rng(0).normal(size=(3, 50))
    np.testing.assert_allclose(update(grads, leak=1.0), grads.sum(0), atol=1e-5)
    leak = np.array([0.0, 0.5, 1.0])
    out, chosen = update(grads, leak=leak), update(grads)
    kept = np.where(chosen[None] > 0, grads > 0, grads < 0)
    want = ((leak[:, None] + (1 - leak[:, None]) * kept) * grads).sum(0)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_new_draws_each_step_from_one_seed():
    tx = aggregation.grad_drop(seed=5)
    params = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    grads = jax.tree.map(lambda p: jnp.stack([p + 1, p - 1]), params)
    first, state = tx.update(grads, tx.init(params))
    second, _ = tx.update(grads, state)
    again, _ = tx.update(grads, tx.init(params))
    assert first["a"].tolist() == again["a"].tolist()
    assert first["a"].tolist() != second["a"].tolist()
    assert first["a"].tolist() != first["b"].tolist()


def test_zeros_are_zero():
    assert update(np.zeros((2, 3))).tolist() == [0, 0, 0]


def test_scalars_and_short_precision():
    tx = aggregation.grad_drop()
    grads = {"w": jnp.ones(3, jnp.bfloat16)}
    out, _ = tx.update(grads, tx.init({"w": jnp.zeros((), jnp.bfloat16)}))
    assert out["w"].dtype == jnp.bfloat16
    assert float(out["w"]) == 3


def test_refuses_leaks_that_are_no_shares():
    with pytest.raises(ValueError, match="grad_drop: leak is 1.5"):
        aggregation.grad_drop(leak=1.5)
    with pytest.raises(ValueError, match=r"grad_drop: leak is \(2,\), wanted \(3,\)"):
        update(np.zeros((3, 2)), leak=[0.0, 1.0])


@pytest.mark.parametrize("leak", [0.0, 0.25])
def test_at_features_all_examples_keep_the_same_tasks(leak):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(3, 5, 4000)).astype(np.float32)
    z = rng.normal(size=(5, 4000)).astype(np.float32)
    tx = aggregation.grad_drop(at="features", leak=leak)
    out = tx.update(
        {"z": jnp.asarray(g)}, tx.init(None), features={"z": jnp.asarray(z)}
    )
    out = np.asarray(out[0]["z"], np.float64)
    wished = (g * np.sign(z)).sum(1)
    both = []
    for sign in (1, -1):
        kept = leak + (1 - leak) * (np.sign(wished) == sign)
        both.append((kept[:, None] * g).sum(0))
    is_up, is_down = (np.isclose(out, x, atol=1e-5).all(0) for x in both)
    assert (is_up | is_down).all()
    purity = (1 + wished.sum(0) / np.abs(wished).sum(0)) / 2
    assert abs((is_up & ~is_down).mean() - purity.mean()) < 0.03
    pure = np.isclose(purity, 1) | np.isclose(purity, 0)
    np.testing.assert_allclose(out[:, pure], g.sum(0)[:, pure], atol=1e-5)


def test_features_are_asked_for():
    tx = aggregation.grad_drop(at="features")
    grads = {"z": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match='at="features" needs features, as in update'):
        tx.update(grads, tx.init(None))
    with pytest.raises(ValueError, match="grad_drop: .*z.*"):
        tx.update(grads, tx.init(None), features={"z": jnp.ones((3, 5))})
    with pytest.raises(ValueError, match="grad_drop: at is 'rep', wanted one of"):
        aggregation.grad_drop(at="rep")
