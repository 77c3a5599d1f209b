"""What must hold of reversible model merging."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import adapters, merging

T, R = 4, 3


def draw(seed, tasks=T, rank=R):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [
        {
            "dense": {"kernel": {"a": part(6, rank), "b": part(rank, 6)}},
            "layers": {"kernel": {"a": part(2, 4, rank), "b": part(2, rank, 4)}},
        }
        for _ in range(tasks)
    ]


def positions(loras, path, part):
    """[positions, r, T] in float64."""
    rows = []
    for each in loras:
        x = np.asarray(each[path]["kernel"][part], np.float64)
        x = x if part == "a" else x.swapaxes(-1, -2)
        rows.append(x.reshape(-1, x.shape[-1]))
    return np.stack(rows, -1)


def everywhere():
    return [(path, part) for path in ("dense", "layers") for part in "ab"]


def restored(bank, tasks=T):
    return [merging.rmm_restore(bank, t) for t in range(tasks)]


def close(tree, other, tolerance=1e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), tree, other
    )


@pytest.mark.parametrize(
    ("tasks", "rank", "svd"), [(4, 3, "svd"), (4, 3, "gram"), (3, 5, "svd")]
)
def test_enough_vectors_restore_every_task(tasks, rank, svd):
    loras = draw(0, tasks, rank)
    bank = merging.rmm_basis(loras, min(rank, tasks - 1), svd=svd)
    for want, got in zip(loras, restored(bank, tasks), strict=True):
        close(got, want)
    more = merging.rmm_basis(loras, 6, svd=svd)
    close(merging.rmm_restore(more, 1), loras[1])


@pytest.mark.parametrize(("svd", "p"), [("svd", 0), ("svd", 2), ("gram", 1)])
def test_the_error_is_what_the_spectrum_leaves(svd, p):
    loras = draw(1)
    bank = merging.rmm_basis(loras, p, svd=svd)
    for path, part in everywhere():
        x = positions(loras, path, part)
        left = np.linalg.svd(x - x.mean(-1, keepdims=True), compute_uv=False)[:, p:]
        error = x - positions(restored(bank), path, part)
        np.testing.assert_allclose((error**2).sum((1, 2)), (left**2).sum(1), atol=1e-4)


def test_no_other_basis_of_its_size_does_better():
    loras = draw(2)
    bank = merging.rmm_basis(loras, 1)
    x = positions(loras, "dense", "a")
    found = ((x - positions(restored(bank), "dense", "a")) ** 2).sum()
    rng = np.random.default_rng(0)
    apart = x - x.mean(-1, keepdims=True)
    for _ in range(100):
        w = np.linalg.qr(rng.normal(size=(len(x), R, 1)))[0]
        rest = apart - w @ (w.swapaxes(1, 2) @ apart)
        assert found <= (rest**2).sum() + 1e-4


def test_descent_on_the_same_objective_does_not_win_either():
    loras = draw(15)
    x = jnp.asarray(positions(loras, "dense", "a"), jnp.float32)
    found = (x - positions(restored(merging.rmm_basis(loras, 1)), "dense", "a")) ** 2

    def loss(variables):
        mean, basis, coefficients = variables
        return ((x - mean[..., None] - basis @ coefficients) ** 2).sum()

    @jax.jit
    def descend(variables):
        def step(_, variables):
            grads = jax.grad(loss)(variables)
            return jax.tree.map(lambda v, g: v - 0.02 * g, variables, grads)

        return jax.lax.fori_loop(0, 3000, step, variables)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (x.shape[:2], (*x.shape[:2], 1), (len(x), 1, T))
    start = tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    reached = float(loss(descend(start)))
    assert found.sum() <= reached + 1e-3
    assert reached <= 1.1 * found.sum()  # It did descend.


def test_equal_tasks_need_no_vector_and_tasks_on_a_line_one():
    first, step = draw(3, 2)
    for got in restored(merging.rmm_basis([first] * 3, 0), 3):
        close(got, first, 1e-6)
    line = [
        jax.tree.map(lambda a, b, t=t: a + t * b, first, step) for t in (0.0, 1.0, -2.0)
    ]
    for got, want in zip(restored(merging.rmm_basis(line, 1), 3), line, strict=True):
        close(got, want)


def test_no_vectors_are_means_of_the_factors():
    loras = draw(4)
    want = jax.tree.map(lambda *xs: sum(xs) / T, *loras)
    close(merging.rmm_restore(merging.rmm_basis(loras, 0), 2), want, 1e-6)


def test_order_permutes_coefficients_alone():
    loras, order = draw(5), [2, 0, 3, 1]
    bank = merging.rmm_basis(loras, 2)
    other = merging.rmm_basis([loras[i] for i in order], 2)
    close(other.mean, bank.mean, 1e-6)
    for t, i in enumerate(order):
        close(merging.rmm_restore(other, t), merging.rmm_restore(bank, i))

    def span(w):
        return w @ w.swapaxes(-1, -2)

    close(jax.tree.map(span, other.basis), jax.tree.map(span, bank.basis))


def test_a_gauge_of_all_tasks_changes_no_product():
    loras = draw(6)
    turn = jnp.asarray(
        np.linalg.qr(np.random.default_rng(1).normal(size=(R, R)))[0], jnp.float32
    )

    def turned(each):
        return {
            name: {
                "kernel": {"a": x["kernel"]["a"] @ turn, "b": turn.T @ x["kernel"]["b"]}
            }
            for name, x in each.items()
        }

    for p in (0, 1, 2):
        bank = merging.rmm_basis(loras, p)
        other = merging.rmm_basis([turned(each) for each in loras], p)
        for t in range(T):
            one, two = (merging.rmm_restore(b, t) for b in (bank, other))
            close(
                adapters.lora.delta(one, alpha=1.0),
                adapters.lora.delta(two, alpha=1.0),
                1e-3,
            )


def test_smaller_ranks_are_padded():
    loras = [draw(7, 1, 3)[0], draw(8, 1, 2)[0]]
    bank = merging.rmm_basis(loras, 1)
    assert bank.mean["dense"]["kernel"]["a"].shape == (6, 3)
    got, want = merging.rmm_restore(bank, 1), loras[1]
    product = got["dense"]["kernel"]["a"] @ got["dense"]["kernel"]["b"]
    want = want["dense"]["kernel"]["a"] @ want["dense"]["kernel"]["b"]
    np.testing.assert_allclose(product, want, atol=1e-4)


def test_the_bank_stores_what_the_cost_says():
    for p in (0, 1, 2):
        bank = merging.rmm_basis(draw(9), p)
        stored = sum(x.size for x in jax.tree.leaves(bank))
        whole = sum(x.size for x in jax.tree.leaves(draw(9)))
        assert stored / whole == pytest.approx(merging.rmm_cost(R, T, p))
    for r, n in ((16, 8), (4, 3), (2, 9)):
        for p in range(n):
            assert (merging.rmm_cost(r, n, p) < 1) == (p < r * (n - 1) / (r + n))


def test_errors_are_told_without_a_fit():
    loras = draw(12)
    errors = merging.rmm_errors(loras)
    for path, part in everywhere():
        told = errors[path]["kernel"][part]
        assert told.shape == (min(R, T) + 1,) and (np.diff(told) <= 0).all()
        x = positions(loras, path, part)
        for p in range(R + 1):
            found = x - positions(restored(merging.rmm_basis(loras, p)), path, part)
            np.testing.assert_allclose(told[p], (found**2).sum(), rtol=1e-4, atol=1e-3)


def test_factors_may_have_bases_of_their_own():
    loras = draw(13)
    counts = {"dense": {"a": 0, "b": 2}, "layers": {"a": 1, "b": 3}}
    p = {name: {"kernel": each} for name, each in counts.items()}
    bank = merging.rmm_basis(loras, p)
    for path, part in everywhere():
        count = p[path]["kernel"][part]
        assert bank.coefficients[path]["kernel"][part].shape[-1] == count
        same = merging.rmm_basis(loras, count)
        for one, other in zip(restored(bank), restored(same), strict=True):
            close(one[path]["kernel"][part], other[path]["kernel"][part], 1e-5)


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8, 1.2])
def test_the_chosen_bases_lose_least_of_their_size(budget):
    loras = draw(14)
    whole = sum(x.size for x in jax.tree.leaves(loras))
    errors = [np.asarray(e) for e in jax.tree.leaves(merging.rmm_errors(loras))]
    rows = [x.size // R for x in jax.tree.leaves(loras[0])]

    def size(counts):
        return sum(n * (p * (R + T) + R) for n, p in zip(rows, counts, strict=True))

    def loss(counts):
        return sum(e[p] for e, p in zip(errors, counts, strict=True))

    chosen = jax.tree.leaves(merging.rmm_choose(loras, budget))
    assert size(chosen) <= budget * whole
    every = list(itertools.product(range(R + 1), repeat=len(rows)))
    best = min(loss(c) for c in every if size(c) <= size(chosen))
    assert loss(chosen) <= best * 1.02 + 1e-3
    if budget == 0.25:  # The means fit, nothing else.
        assert chosen == [0] * len(rows)


def test_traced_tasks_and_dtypes():
    loras = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), each) for each in draw(10)]
    bank = jax.jit(lambda *xs: merging.rmm_basis(xs, 2))(*loras)
    got = jax.jit(merging.rmm_restore)(bank, jnp.asarray(3))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((bank, got)))
    close(
        *jax.tree.map(
            lambda x: x.astype(jnp.float32), (got, merging.rmm_restore(bank, 3))
        )
    )


def test_refuses_by_name():
    loras = draw(11, 2)
    with pytest.raises(ValueError, match="rmm_basis: p is -1"):
        merging.rmm_basis(loras, -1)
    with pytest.raises(ValueError, match="rmm_basis: no adapters"):
        merging.rmm_basis([], 1)
    with pytest.raises(ValueError, match="rmm_basis: p is neither a number nor a tree"):
        merging.rmm_basis(loras, {"dense": 1})
    with pytest.raises(ValueError, match="rmm_choose: budget is 0.4, wanted at least"):
        merging.rmm_choose(loras, 0.4)
    with pytest.raises(ValueError, match="rmm_errors: no adapters"):
        merging.rmm_errors([])
    with pytest.raises(ValueError, match="rmm_basis: 'layers/kernel/a' is not in both"):
        merging.rmm_basis([loras[0], {"dense": loras[1]["dense"]}], 1)
    bad = jax.tree.map(lambda x: x * jnp.nan, loras[1])
    with pytest.raises(ValueError, match="adapter 1: 'dense/kernel/a' holds NaN"):
        merging.rmm_basis([loras[0], bad], 1)
    with pytest.raises(ValueError, match="rmm_restore: task is 2, the bank has 2"):
        merging.rmm_restore(merging.rmm_basis(loras, 1), 2)
    with pytest.raises(ValueError, match="rmm_cost: rank is 0"):
        merging.rmm_cost(0, 1, 1)
