import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms import linearize


def gram(rng, size):
    a = rng.normal(size=(size, size + 2))
    return a @ a.T


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 4))
@hypothesis.settings(max_examples=8)
def test_matches_the_integral_operator(seed, num_tasks):
    """Eigenpairs of f -> K M f found without the symmetric form, in float64."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, num_tasks).tolist()
    kernel = gram(rng, sum(sizes))
    got = linearize.kernel_localisation(jnp.asarray(kernel, jnp.float32), sizes)
    mass = np.concatenate([np.full(n, 1 / (num_tasks * n)) for n in sizes])
    values, phi = np.linalg.eig(kernel * mass[None, :])
    order = np.argsort(-values.real)
    values, phi = values.real[order], phi.real[:, order]
    phi = phi / np.sqrt((mass[:, None] * phi**2).sum(0))
    edges = np.cumsum([0, *sizes])
    energy = np.stack(
        [
            (mass[a:b, None] * phi[a:b] ** 2).sum(0)
            for a, b in zip(edges[:-1], edges[1:], strict=True)
        ],
        1,
    )
    np.testing.assert_allclose(got.eigenvalues, values, rtol=1e-3, atol=1e-4)
    gaps = np.abs(np.diff(values))
    if (gaps > 0.02 * values[0]).all():
        np.testing.assert_allclose(got.energy, energy, atol=5e-3)
    np.testing.assert_allclose(got.energy.sum(1), 1, rtol=1e-5)


@pytest.mark.fast
def test_products_keep_float32_precision():
    """Accelerators take bfloat16 or TF32 passes unless they are told not to."""
    found = jax.make_jaxpr(lambda k: linearize.kernel_localisation(k, [1, 2]))
    products = str(found(jnp.eye(3))).split("dot_general[")[1:]
    assert products
    for product in products:
        assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product


@pytest.mark.fast
def test_score_is_one_for_separate_tasks_and_zero_for_identical_ones():
    rng = np.random.default_rng(0)
    block = gram(rng, 3)
    separate = np.zeros((6, 6))
    separate[:3, :3], separate[3:, 3:] = block, 2.1 * block
    score = linearize.kernel_localisation(jnp.asarray(separate, jnp.float32), [3, 3])
    np.testing.assert_allclose(score.score, 1, atol=1e-4)
    same = np.block([[block, block], [block, block]])
    score = linearize.kernel_localisation(jnp.asarray(same, jnp.float32), [3, 3])
    np.testing.assert_allclose(score.score, 0, atol=1e-4)


def test_uneven_sizes_weigh_tasks_equally():
    """Repeating the inputs of one task changes nothing."""
    rng = np.random.default_rng(1)
    kernel = gram(rng, 4)
    repeat = [0, 0, 0, 1, 1, 1, 2, 3]
    few = linearize.kernel_localisation(jnp.asarray(kernel, jnp.float32), [2, 2])
    many = linearize.kernel_localisation(
        jnp.asarray(kernel[np.ix_(repeat, repeat)], jnp.float32), [6, 2]
    )
    np.testing.assert_allclose(many.eigenvalues[:4], few.eigenvalues, rtol=1e-4)
    np.testing.assert_allclose(many.score, few.score, rtol=1e-4)


def test_ntk_of_a_block_separable_model():
    def apply_fn(p, x):
        return jnp.tanh(x[:, :2] @ p["a"]) + jnp.tanh(x[:, 2:] @ p["b"])

    rng = np.random.default_rng(2)
    params = {
        "a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    first = x.at[:, 2:].set(0)
    second = (1.5 * x).at[:, :2].set(0)
    got = jax.jit(lambda p: linearize.ntk_localisation(apply_fn, p, [first, second]))(
        params
    )
    np.testing.assert_allclose(got.score, 1, atol=1e-4)
    assert got.energy.shape == (8, 2)
    mixed = linearize.ntk_localisation(apply_fn, params, [x, x])
    assert mixed.score < 0.1


@pytest.mark.fast
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"kernel_localisation: .* \[2, 2\]"):
        linearize.kernel_localisation(jnp.eye(3), [2, 2])
    with pytest.raises(ValueError, match="kernel_localisation: "):
        linearize.kernel_localisation(jnp.eye(2), [2, 0])
    with pytest.raises(ValueError, match="ntk_localisation: no tasks"):
        linearize.ntk_localisation(lambda p, x: x, jnp.ones(1), [])
