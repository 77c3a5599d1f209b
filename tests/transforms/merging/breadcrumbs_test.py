"""What must hold of Model Breadcrumbs."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

seeds = st.integers(0, 2**31 - 1)
fractions = st.sampled_from([0.0, 0.1, 0.3, 0.75, 1.0])
groups = pytest.mark.parametrize("group", ["row", "leaf"])


def draw(seed, T=2, ties=False):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        x = rng.normal(size=(T, *shape))
        return jnp.asarray(np.round(x) if ties else x, jnp.float32)

    return {"k": leaf(4, 10), "b": leaf(8), "s": leaf()}


def lines(x, group):
    """Groups of one leaf [T, ...] as rows of a matrix."""
    x = np.asarray(x)
    return x.reshape(-1, x.shape[-1]) if group == "row" else x.reshape(len(x), -1)


def counts(n, density, drop_top):
    dropped = math.floor(round(drop_top * n, 9))
    return dropped, min(math.floor(round(density * n, 9)), n - dropped)


def test_keeping_everything_is_task_arithmetic_exactly():
    taus = draw(0)
    got = merging.breadcrumbs(taus, density=1.0, drop_top=0.0)
    jax.tree.map(np.testing.assert_array_equal, got, merging.task_arithmetic(taus))


@groups
@hypothesis.given(seeds, fractions, fractions, st.booleans())
def test_exact_counts_and_the_middle_band(group, seed, density, drop_top, ties):
    taus = draw(seed, ties=ties)
    masks = merging.band_masks(taus, density=density, drop_top=drop_top, group=group)
    for name in ("k", "b"):
        kept, values = lines(masks[name], group), np.abs(lines(taus[name], group))
        dropped, left = counts(values.shape[1], density, drop_top)
        for mask, magnitude in zip(kept, values, strict=True):
            assert mask.sum() == left
            ranked = np.argsort(-magnitude, kind="stable")
            np.testing.assert_array_equal(
                np.sort(np.flatnonzero(mask)), np.sort(ranked[dropped : dropped + left])
            )
    assert masks["s"].all()


def flax_tree(seed, ties=False):
    """Two tasks of a small Flax model, and the same in PyTorch's layout."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        x = rng.normal(size=(2, *shape))
        return jnp.asarray(np.round(2 * x) if ties else x, jnp.float32)

    flax = {
        "dense": {"kernel": leaf(10, 4), "bias": leaf(4)},
        "stacked": {"kernel": leaf(3, 10, 1)},
        "embedding": leaf(3, 10),
    }
    torch = jax.tree.map_with_path(
        lambda path, x: jnp.swapaxes(x, -1, -2) if path[-1].key == "kernel" else x, flax
    )
    return flax, torch


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("order", ["drop_first", "keep_first"])
def test_unit_axis_groups_flax_kernels_as_pytorch_weights(ties, order):
    flax, torch = flax_tree(6, ties)
    options = {"density": 0.5, "drop_top": 0.2, "order": order}
    for merge in (merging.breadcrumbs, merging.band_masks):
        got = merge(flax, axis=merging.unit_axis, **options)
        want = merge(torch, **options)
        for name in ("dense", "stacked"):
            transposed = jnp.swapaxes(got[name]["kernel"], -1, -2)
            np.testing.assert_array_equal(transposed, want[name]["kernel"])
        np.testing.assert_array_equal(got["dense"]["bias"], want["dense"]["bias"])
        np.testing.assert_array_equal(got["embedding"], want["embedding"])
    masks = merging.band_masks(flax, axis=merging.unit_axis, **options)
    kept = {"drop_first": 5, "keep_first": 3}[order]
    assert (masks["dense"]["kernel"].sum(1) == kept).all()
    assert (masks["stacked"]["kernel"].sum(2) == kept).all()


def test_equal_entries_go_by_index_along_the_row():
    taus = {"kernel": jnp.ones((1, 4, 3))}
    mask = merging.band_masks(taus, density=0.5, drop_top=0.25, axis=-2)["kernel"]
    want = np.array([False, True, True, False])[None, :, None]
    np.testing.assert_array_equal(mask, np.broadcast_to(want, (1, 4, 3)))


def test_axis_by_number_path_or_tree():
    taus = {"a": draw(7)["k"], "b": draw(8)["k"]}
    options = {"density": 0.5, "drop_top": 0.1}
    by_path = merging.breadcrumbs(
        taus, axis=lambda path: -2 if path == "a" else -1, **options
    )
    by_tree = merging.breadcrumbs(taus, axis={"a": 0, "b": 1}, **options)
    rows = merging.breadcrumbs(taus, **options)
    units = merging.breadcrumbs(taus, axis=-2, **options)
    jax.tree.map(np.testing.assert_array_equal, by_path, by_tree)
    np.testing.assert_array_equal(by_path["a"], units["a"])
    np.testing.assert_array_equal(by_path["b"], rows["b"])
    assert (units["a"] != rows["a"]).any()
    clean = merging.chain(
        merging.drop_outliers(0.1, axis=-2), merging.keep_top(0.5, axis=-2)
    )
    got = merging.task_arithmetic(clean(taus))
    jax.tree.map(np.testing.assert_array_equal, got, units)


@groups
def test_scale_and_sign_do_not_change_masks(group):
    taus, options = draw(1), {"density": 0.4, "drop_top": 0.2, "group": group}
    base = merging.band_masks(taus, **options)
    for c in (4.0, -0.5):
        other = merging.band_masks(jax.tree.map(lambda x, c=c: c * x, taus), **options)
        jax.tree.map(np.testing.assert_array_equal, other, base)


def test_row_masks_commute_with_row_permutation():
    taus, order = draw(2)["k"], jnp.array([2, 0, 3, 1])
    mask = merging.band_masks({"k": taus}, density=0.4, drop_top=0.1)["k"]
    moved = merging.band_masks({"k": taus[:, order]}, density=0.4, drop_top=0.1)["k"]
    np.testing.assert_array_equal(moved, mask[:, order])


@groups
def test_merging_is_additive_over_tasks(group):
    taus = draw(3, T=3)

    def merge(taus):
        return merging.breadcrumbs(taus, density=0.4, drop_top=0.1, group=group)

    parts = [merge(jax.tree.map(lambda x, t=t: x[t : t + 1], taus)) for t in range(3)]
    total = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merge(taus), total
    )


def test_order_matters():
    taus = {"w": jnp.arange(10.0, 0.0, -1.0)[None]}
    first = merging.band_masks(taus, density=0.5, drop_top=0.2)["w"][0]
    last = merging.band_masks(taus, density=0.5, drop_top=0.2, order="keep_first")["w"][
        0
    ]
    assert np.flatnonzero(first).tolist() == [2, 3, 4, 5, 6]
    assert np.flatnonzero(last).tolist() == [2, 3, 4]
    empty = merging.band_masks(taus, density=0.1, drop_top=0.2, order="keep_first")
    assert not empty["w"].any()


def test_small_groups_lose_nothing_and_one_element_rows_survive():
    taus = {"w": jnp.ones((2, 3, 1)), "e": jnp.ones((2, 0)), "s": jnp.ones(2)}
    got = merging.breadcrumbs(taus, density=1.0, drop_top=0.01)
    assert got["w"].tolist() == [[2.0]] * 3 and got["s"] == 2.0


def test_per_leaf_fractions_by_path_or_tree():
    taus = {"a": jnp.ones((1, 10)), "b": jnp.ones((1, 10))}
    by_path = merging.breadcrumbs(
        taus, density=lambda path: 0.5 if path == "a" else 1.0, drop_top=0.0
    )
    by_tree = merging.breadcrumbs(taus, density={"a": 0.5, "b": 1.0}, drop_top=0.0)
    jax.tree.map(np.testing.assert_array_equal, by_path, by_tree)
    assert by_path["a"].sum() == 5 and by_path["b"].sum() == 10
    with pytest.raises(ValueError, match="density is neither a number"):
        merging.breadcrumbs(taus, density={"a": 0.5})


def test_chain_of_transforms_is_the_method():
    taus = draw(4)
    clean = merging.chain(
        merging.drop_outliers(0.2), merging.keep_top(0.3), merging.scale(0.5)
    )
    want = merging.breadcrumbs(taus, density=0.3, drop_top=0.2)
    got = merging.task_arithmetic(clean(taus))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 0.5 * b, rtol=1e-6), got, want
    )


def test_jit_equals_eager_and_weights_apply():
    taus = draw(5)

    def f(taus):
        return merging.breadcrumbs(taus, weights=jnp.array([2.0, 0.0]))

    jax.tree.map(np.testing.assert_array_equal, jax.jit(f)(taus), f(taus))
    alone = merging.breadcrumbs(jax.tree.map(lambda x: x[:1], taus))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b), f(taus), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "layer"}, "group is 'layer'"),
        ({"order": "any"}, "order is 'any'"),
        ({"drop_top": -0.1}, "drop_top is -0.1"),
        ({"axis": -2}, r"axis of 'w' is -2, wanted one of its 1 axes \(4,\)"),
        ({"axis": 1}, "axis of 'w' is 1, wanted one of its 1 axes"),
        ({"axis": 0.5}, "axis of 'w' is 0.5, wanted an integer"),
        ({"axis": {"v": -1}}, "axis is neither a number"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=f"breadcrumbs: {message}"):
        merging.breadcrumbs({"w": jnp.ones((1, 4))}, **options)
