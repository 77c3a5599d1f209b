"""What must hold of TALL-masks and Consensus merging."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

seeds = st.integers(0, 2**31 - 1)


def draw(seed, T=3, zeros=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, 24)) * (rng.random((T, 24)) < 0.7 if zeros else 1)
    x = jnp.asarray(x, jnp.float32)
    return {"a": x[:, :20].reshape(T, 4, 5), "b": x[:, 20:]}


def flat(tree_):
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree_)]
    return np.concatenate([x.ravel() for x in leaves])


def task(taus, t):
    return jax.tree.map(lambda x: x[t], taus)


@hypothesis.given(seeds, st.floats(0.1, 2.0))
def test_one_task_is_reconstructed_exactly(seed, scale):
    taus = draw(seed, T=1)
    mask = merging.tall_masks(taus, scale=scale)
    np.testing.assert_array_equal(flat(mask), flat(taus) != 0)
    delta = merging.restore_delta(merging.task_arithmetic(taus), task(mask, 0))
    np.testing.assert_array_equal(flat(delta), flat(task(taus, 0)))


@hypothesis.given(seeds)
def test_masks_are_nested_in_scale(seed):
    taus = draw(seed)

    def at(scale):
        return flat(merging.tall_masks(taus, scale=scale))

    np.testing.assert_array_equal(at(0.0), flat(taus) != 0)
    masks = [at(scale) for scale in (0.0, 0.2, 0.6, 1.0, 5.0)]
    for wide, narrow in zip(masks, masks[1:], strict=False):
        assert not np.any(narrow & ~wide)
    merged = jax.tree.map(lambda x: x[0] + 0.0, taus)
    far = merging.tall_masks(taus, merged, scale=1e30)
    same = jax.tree.map(lambda x, m: (x == m) & (x != 0), taus, _stacked(merged, 3))
    np.testing.assert_array_equal(flat(far), flat(same))


def _stacked(merged, T):
    return jax.tree.map(lambda m: jnp.stack([m] * T), merged)


@hypothesis.given(seeds, st.floats(0.01, 10.0))
def test_disjoint_supports_are_recovered(seed, scale):
    owner = np.random.default_rng(seed).integers(0, 3, 24)
    taus = draw(seed, zeros=False)
    only = jnp.asarray(owner[None] == np.arange(3)[:, None])
    only = {"a": only[:, :20].reshape(3, 4, 5), "b": only[:, 20:]}
    taus = jax.tree.map(lambda x, o: jnp.where(o, x, 0), taus, only)
    merged = merging.task_arithmetic(taus)
    masks = merging.tall_masks(taus, scale=scale)
    for t in range(3):
        delta = merging.restore_delta(merged, task(masks, t))
        np.testing.assert_array_equal(flat(delta), flat(task(taus, t)))
    kept = merging.consensus(taus, masks=masks, min_tasks=1)
    np.testing.assert_array_equal(flat(kept), flat(merged))


@pytest.mark.parametrize(("T", "scale"), [(8, 0.4), (20, 0.4), (2, 1.0)])
def test_gaussian_density(T, scale):
    taus = {"w": jax.random.normal(jax.random.key(0), (T, 4000))}
    stats = merging.mask_statistics(merging.tall_masks(taus, scale=scale))
    want = 2 / np.pi * np.arctan(1 / (scale * np.sqrt(T - 1)))
    np.testing.assert_allclose(stats.density.mean(), want, atol=0.015)


@hypothesis.given(seeds)
def test_consensus_from_everything_to_nothing(seed):
    taus = draw(seed)
    merged = merging.task_arithmetic(taus)

    def at(k, taus=taus):
        return merging.consensus(taus, scale=0.4, min_tasks=k)

    np.testing.assert_array_equal(flat(at(0)), flat(merged))
    assert not flat(at(4)).any()
    kept = [np.count_nonzero(flat(at(k))) for k in range(5)]
    assert kept == sorted(kept, reverse=True)
    shuffled = jax.tree.map(lambda x: x[jnp.array([1, 2, 0])], taus)
    np.testing.assert_allclose(flat(at(2, shuffled)), flat(at(2)), rtol=1e-5)


@hypothesis.given(seeds)
def test_scale_one_picks_the_nearer_of_base_and_merged(seed):
    taus = draw(seed)
    merged = merging.task_arithmetic(taus)
    masks = merging.tall_masks(taus, scale=1.0)
    for t in range(3):
        tau, m = flat(task(taus, t)), flat(merged)
        error = np.abs(flat(merging.restore_delta(merged, task(masks, t))) - tau)
        np.testing.assert_array_equal(error, np.minimum(np.abs(m - tau), np.abs(tau)))


def test_one_scale_per_task_and_strictness():
    taus = {"w": jnp.array([[1.0, 1.0], [2.0, 1.0]])}
    masks = merging.tall_masks(taus, scale=jnp.array([0.0, 1.0]))["w"]
    assert masks.tolist() == [[True, True], [True, False]]


def test_a_ties_merge_can_be_masked():
    taus = draw(0)
    merged = merging.ties(taus, density=0.4, reduce="sum")
    masks = merging.tall_masks(taus, merged, scale=0.4)
    want = np.abs(np.asarray(taus["b"])) > 0.4 * np.abs(
        np.asarray(merged["b"]) - np.asarray(taus["b"])
    )
    np.testing.assert_array_equal(masks["b"], want)


def test_statistics_by_hand():
    masks = {
        "w": jnp.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool),
        "e": jnp.ones((2, 0), bool),
    }
    stats = merging.mask_statistics(masks)
    assert stats.histogram.tolist() == [1, 2, 1]
    np.testing.assert_allclose(stats.iou, [[1, 1 / 3], [1 / 3, 1]], rtol=1e-6)
    assert stats.density.tolist() == [0.5, 0.5]
    assert merging.mask_counts(masks)["w"].dtype == jnp.int8
    many = merging.mask_counts({"w": jnp.ones((130, 1), bool)})["w"]
    assert many.tolist() == [130]
    empty = merging.mask_statistics({"w": jnp.zeros((2, 3), bool)})
    assert empty.iou.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_magnitude_masks_have_exact_density(scope):
    taus = jax.tree.map(jnp.round, draw(1))
    masks = merging.magnitude_masks(taus, density=0.5, scope=scope)
    for t in range(3):
        assert flat(task(masks, t)).sum() == 12


def test_compression_matches_the_papers_totals():
    cost = merging.compression_bits(88_000_000, 20, frozen=26_000_000)
    assert [round(bits / 1e9, 1) for bits in cost] == [57.2, 8.2]


def test_refusals():
    taus = draw(2)
    with pytest.raises(ValueError, match=r"scale is \(2,\)"):
        merging.tall_masks(taus, scale=jnp.ones(2))
    with pytest.raises(ValueError, match=r"tall_masks: 'b' is \(1,\) in merged"):
        merged = merging.task_arithmetic(taus) | {"b": jnp.ones(1)}
        merging.tall_masks(taus, merged, scale=1.0)
    with pytest.raises(ValueError, match="either masks or scale"):
        merging.consensus(taus)
    merged = merging.task_arithmetic(taus)
    mask = jax.tree.map(lambda x: x > 0, merged)
    with pytest.raises(ValueError, match="restore_delta: 'b' is floating in mask"):
        merging.restore_delta(merged, mask | {"b": jnp.ones(4)})
