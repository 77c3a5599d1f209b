"""The chain of spherical interpolations, against explicit vectors in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree

pytestmark = pytest.mark.fast
seeds = st.integers(0, 2**31 - 1)


def arc(u, v, share):
    """S(u, v) on whole vectors."""
    cosine = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if angle < 1e-3:
        return (1 - share) * u + share * v
    return (np.sin((1 - share) * angle) * u + np.sin(share * angle) * v) / np.sin(angle)


def chain(vectors, weights, order):
    """The chain of the definition, with the running mean of weights."""
    result, used = vectors[order[0]], [weights[order[0]]]
    for t in order[1:]:
        result = arc(result, vectors[t], weights[t] / (np.mean(used) + weights[t]))
        used.append(weights[t])
    return result


def draw(seed, count, near=0.0, width=40):
    rng = np.random.default_rng(seed)
    return near * rng.normal(size=width) + rng.normal(size=(count, width))


def kappa(vectors, *args, **options):
    gram = vectors @ vectors.T
    found = merging.slerp_chain_weights(
        jnp.asarray(gram, jnp.float32), *args, **options
    )
    return np.asarray(found, np.float64)


def angle(u, v):
    return np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))


@hypothesis.given(seeds, st.sampled_from([1, 3, 8]), st.sampled_from([0.0, 1.0, 5.0]))
def test_coefficients_reproduce_the_explicit_chain(seed, count, near):
    vectors = draw(seed, count, near)
    rng = np.random.default_rng(seed + 1)
    weights, order = rng.uniform(0.2, 3, count), rng.permutation(count)
    found = kappa(vectors, weights, order=tuple(order.tolist()), scale=1.7)
    want = 1.7 * chain(vectors, weights, order)
    error = np.linalg.norm(found @ vectors - want) / np.linalg.norm(want)
    assert error < 2e-4
    assert (found >= 0).all()


@hypothesis.given(seeds, st.floats(0.1, 10))
def test_only_ratios_of_weights_matter(seed, factor):
    vectors, weights = draw(seed, 4), np.array([1.0, 0.5, 2.0, 0.7])
    same = kappa(vectors, weights * factor)
    np.testing.assert_allclose(same, kappa(vectors, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [1e-6, 0.2, 0.5, 0.9, 1 - 1e-6])
def test_equal_norms_turn_by_the_share_of_the_angle(share):
    u, v = draw(3, 2)
    u, v = 3 * u / np.linalg.norm(u), 3 * v / np.linalg.norm(v)
    found = kappa(np.stack([u, v]), [1 - share, share]) @ np.stack([u, v])
    assert abs(np.linalg.norm(found) - 3) < 1e-5
    if 0.1 < share < 0.95:
        assert abs(angle(u, found) - share * angle(u, v)) < 1e-5
    if share < 1e-3:
        np.testing.assert_allclose(found, u, atol=1e-5)
    if share > 1 - 1e-3:
        np.testing.assert_allclose(found, v, atol=1e-5)


def test_orthogonal_halves():
    np.testing.assert_allclose(kappa(2 * np.eye(2)), [0.70710678] * 2, atol=1e-6)


@pytest.mark.parametrize("other", [1.0, 2.0, -1.0, 0.0, 1 + 1e-7])
def test_no_angle_is_linear_and_has_a_gradient(other):
    """Equal, longer, opposite and zero vectors."""
    gram = jnp.array([[1.0, other], [other, other**2]], jnp.float32)
    weights = jnp.array([1.0, 3.0])
    found = merging.slerp_chain_weights(gram, weights)
    np.testing.assert_allclose(found, [0.25, 0.75], atol=1e-6)
    slopes = jax.grad(lambda g, w: merging.slerp_chain_weights(g, w)[0], (0, 1))
    for slope in slopes(gram, weights):
        assert np.isfinite(slope).all()


def test_equal_weights_give_the_last_task_half_of_the_angle():
    found = kappa(np.eye(3))
    assert found[2] == pytest.approx(np.sin(np.pi / 4), abs=1e-6)
    assert found[0] == pytest.approx(found[1]) and found[0] < found[2]
    moved = kappa(np.eye(3), order=(2, 1, 0))
    np.testing.assert_allclose(moved, found[::-1], atol=1e-6)


def test_the_angle_is_that_of_the_whole_model():
    """Leaf by leaf, as mergekit has it, is another method."""
    taus = {"a": jnp.array([[1.0], [1.0]]), "b": jnp.array([[3.0, 0.0], [0.0, 3.0]])}
    flat = np.array([[1.0, 3, 0], [1, 0, 3]])
    found = merging.slerp_chain(taus, weights=[1.0, 2.0])
    np.testing.assert_allclose(
        np.concatenate([found["a"], found["b"]]), arc(*flat, 2 / 3), rtol=1e-5
    )
    by_leaf = merging.slerp(taus, weights=[1.0, 2.0])
    assert abs(by_leaf["b"] - found["b"]).max() > 0.01


def test_ends_of_the_length():
    taus = {"w": jnp.asarray(draw(0, 1), jnp.float32)}
    base = {"w": jnp.ones(40)}
    whole = tree.add_scaled(base, merging.slerp_chain(taus))
    np.testing.assert_allclose(whole["w"], 1 + taus["w"][0], rtol=1e-6)
    none = tree.add_scaled(base, merging.slerp_chain(taus, scale=0.0))
    assert (none["w"] == base["w"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": (0, 0)}, r"order is \(0, 0\), wanted a permutation"),
        ({"weights": [1.0, -1.0]}, "wanted all of them positive"),
        ({"weights": [1.0]}, r"weights are \(1,\), wanted \(2,\)"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=f"slerp_chain_weights: .*{message}"):
        merging.slerp_chain_weights(jnp.eye(2), **options)
    with pytest.raises(ValueError, match=r"gram is \(2, 3\)"):
        merging.slerp_chain_weights(jnp.ones((2, 3)))
