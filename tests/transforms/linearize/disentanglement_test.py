import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms import linearize


def scores(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def setup(seed, size=1.0):
    rng = np.random.default_rng(seed)

    def tree(scale):
        return {
            "w": jnp.asarray(scale * rng.normal(size=(4, 6)), jnp.float32),
            "v": jnp.asarray(scale * rng.normal(size=(6, 3)), jnp.float32),
        }

    def batches(count):
        return [
            jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)
            for rows in (8, 8, 5)[:count]
        ]

    return tree(1), tree(size), tree(size), batches(3), batches(2)


def oracle(predict_fn, params0, tau_a, tau_b, batches_a, batches_b, alphas):
    """The definition, one evaluation at a time."""

    def labels(a, b, x):
        moved = jax.tree.map(lambda p, u, v: p + a * u + b * v, params0, tau_a, tau_b)
        return np.argmax(predict_fn(moved, x), -1)

    grid = np.zeros((len(alphas), len(alphas)))
    for i, a in enumerate(alphas):
        for j, b in enumerate(alphas):
            for batches, alone in ((batches_a, (a, 0.0)), (batches_b, (0.0, b))):
                wrong = [labels(*alone, x) != labels(a, b, x) for x in batches]
                grid[i, j] += np.concatenate(wrong).mean()
    return grid


def test_matches_the_definition():
    args = setup(0)
    alphas = [-1.0, 0.0, 0.5, 2.0]
    got = linearize.disentanglement_error(scores, *args, alphas)
    np.testing.assert_allclose(got, oracle(scores, *args, alphas), atol=1e-12)
    assert got.max() > 0.5


@hypothesis.given(st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=3)
def test_zero_where_the_other_coefficient_is_zero(seed):
    params0, tau_a, tau_b, batches_a, batches_b = setup(seed)
    alphas = [0.0, 1.0, -2.0]

    never = lambda p, x: jnp.zeros(x.shape[0], jnp.int32)  # noqa: E731
    a_term = linearize.disentanglement_error(
        (scores, never), params0, tau_a, tau_b, batches_a, batches_b, alphas
    )
    b_term = linearize.disentanglement_error(
        (never, scores), params0, tau_a, tau_b, batches_a, batches_b, alphas
    )
    assert (a_term[:, 0] == 0).all() and (b_term[0] == 0).all()
    assert a_term.max() > 0 and b_term.max() > 0


@pytest.mark.fast
@pytest.mark.parametrize("tangent", [False, True])
def test_exactly_zero_for_a_block_separable_model(tangent):
    def apply_fn(p, x):
        return jnp.tanh(x[:, :2] @ p["a"]) + jnp.tanh(x[:, 2:] @ p["b"])

    rng = np.random.default_rng(0)

    def tree(a, b):
        return {
            "a": jnp.asarray(a * rng.normal(size=(2, 3)), jnp.float32),
            "b": jnp.asarray(b * rng.normal(size=(2, 3)), jnp.float32),
        }

    params0, tau_a, tau_b = tree(1, 1), tree(2, 0), tree(0, 2)
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    predict = linearize.taylor1(apply_fn, params0) if tangent else apply_fn
    alphas = np.linspace(-3, 3, 5)
    error = linearize.disentanglement_error(
        predict,
        params0,
        tau_a,
        tau_b,
        [x.at[:, 2:].set(0)],
        [x.at[:, :2].set(0)],
        alphas,
    )
    np.testing.assert_array_equal(error, 0)


@pytest.mark.fast
def test_integer_labels_are_taken_as_they_are():
    args = setup(1)
    labels = lambda p, x: jnp.argmax(scores(p, x), -1)  # noqa: E731
    np.testing.assert_array_equal(
        linearize.disentanglement_error(labels, *args, [1.0]),
        linearize.disentanglement_error(scores, *args, [1.0]),
    )


@pytest.mark.fast
def test_bad_arguments_are_named():
    params0, tau_a, tau_b, batches_a, _ = setup(0)
    with pytest.raises(ValueError, match="batches_b holds no examples"):
        linearize.disentanglement_error(
            scores, params0, tau_a, tau_b, batches_a, [], [1.0]
        )
    with pytest.raises(ValueError, match="'v' is in params0 but not in tau_b"):
        linearize.disentanglement_error(
            scores, params0, tau_a, {"w": tau_b["w"]}, batches_a, [], [1.0]
        )
    with pytest.raises(ValueError, match="alphas must be"):
        linearize.disentanglement_error(scores, params0, tau_a, tau_b, [], [], 1.0)


@pytest.mark.fast
def test_nonlinear_advantage():
    got = linearize.nonlinear_advantage(np.array([0.9, 0.5]), np.array([0.7, 0.5]), 10)
    np.testing.assert_allclose(got, [0.2 / 0.9, 0])
    with pytest.raises(ValueError, match="num_classes is 1"):
        linearize.nonlinear_advantage(0.9, 0.8, 1)
