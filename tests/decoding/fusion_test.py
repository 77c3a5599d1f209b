"""Fusion of logits, against sums over the vocabulary in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import decoding
from mtl_jax.decoding import _fusion

pytestmark = pytest.mark.fast
B, V = 3, 50
GRID = np.arange(21) / 10
seeds = st.integers(0, 2**31 - 1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    there = p > 0
    p, q = np.where(there, p, 1), np.where(there, q, 1)
    return np.where(there, p * np.log(p / q), 0).sum(-1)


def draw(seed, models, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(models, B, V)) * scale


def f32(x):
    return jnp.asarray(x, jnp.float32)


def pairs(large, d, alphas):
    """[B, N] both divergences, by summation."""
    p = softmax(large)
    moved = [softmax(large + a * d) for a in alphas]
    forward, backward = [kl(m, p) for m in moved], [kl(p, m) for m in moved]
    return np.stack(forward, 1), np.stack(backward, 1)


def brute(large, small, experts, alphas=GRID):
    """All experts and steps; the lowest objective, then the lowest index."""
    q, qs = softmax(small), softmax(experts)
    targets = [(kl(e, q), kl(q, e)) for e in qs]
    table = []
    for e in experts:
        forward, backward = pairs(large, e - small, alphas)
        table.append(
            sum(
                (forward - a[:, None]) ** 2 + (backward - b[:, None]) ** 2
                for a, b in targets
            )
        )
    return np.stack(table, 1), targets


def solve(large, small, experts, **options):
    directions = f32(experts) - f32(small)[None]
    targets = decoding.expert_targets(f32(small), f32(experts))
    return decoding.solve_alpha(f32(large), directions, targets, **options)


@hypothesis.given(seeds, st.sampled_from([0.3, 2.0, 8.0]))
def test_divergences_equal_direct_summation(seed, scale):
    large, d = draw(seed, 2, scale)
    found = decoding.logit_kl_stats(f32(large), f32(d), f32(GRID))
    want = pairs(np.float64(f32(large)), np.float64(f32(d)), GRID)
    for got, exact in zip(found[:2], want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-6)
        assert (np.diff(got, axis=1) >= -1e-5).all()
        np.testing.assert_array_equal(got[:, 0] < 1e-6, True)


def test_many_blocks_and_moments(monkeypatch):
    """A vocabulary that fills no whole number of blocks; the maximum in the last."""
    monkeypatch.setattr(_fusion, "_BLOCK", 16)
    large, d = draw(1, 2)
    d[:, -1] += 30
    found = decoding.logit_kl_stats(f32(large), f32(d), f32([[0.5], [1], [2]]))
    for row, s in enumerate((0.5, 1.0, 2.0)):
        forward, backward = pairs(large[row : row + 1], d[row : row + 1], [s])
        np.testing.assert_allclose(found.forward[row], forward[0], rtol=1e-4)
        np.testing.assert_allclose(found.backward[row], backward[0], rtol=1e-4)
        p, moved = softmax(large[row]), softmax(large[row] + s * d[row])
        mean = moved @ d[row]
        np.testing.assert_allclose(found.slope[row], mean - p @ d[row], rtol=1e-4)
        spread = moved @ (d[row] - mean) ** 2
        np.testing.assert_allclose(found.variance[row], spread, rtol=1e-3, atol=1e-4)


def test_tokens_that_do_not_exist():
    large, d = draw(2, 2)
    whole = decoding.logit_kl_stats(f32(large[:, :40]), f32(d[:, :40]), f32(GRID))
    large[:, 40:], d[:, 40:] = -np.inf, np.nan
    found = decoding.logit_kl_stats(f32(large), f32(d), f32(GRID))
    for got, want in zip(found, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    models = [f32(large), f32(large), f32(large)]
    fused, record = decoding.DynamicFusion()(tuple(models))
    np.testing.assert_array_equal(fused, models[0])
    assert not np.isnan(record["loss"]).any()


def test_targets_are_the_divergences_of_the_experts():
    small, *experts = draw(3, 4)
    found = decoding.expert_targets(f32(small), f32(experts))
    for t, expert in enumerate(experts):
        q, moved = softmax(small), softmax(expert)
        np.testing.assert_allclose(found.forward[t], kl(moved, q), rtol=1e-5)
        np.testing.assert_allclose(found.backward[t], kl(q, moved), rtol=1e-5)


@hypothesis.given(seeds, st.sampled_from([1, 3]))
def test_the_grid_is_searched_as_by_brute_force(seed, count):
    large, small, *experts = draw(seed, 2 + count, 1.5)
    found = solve(large, small, np.stack(experts))
    table, targets = brute(large, small, np.stack(experts))
    for row in range(B):
        t, a = int(found.expert[row]), round(float(found.alpha[row]) * 10)
        best = table[row].min()
        assert table[row, t, a] <= best + 1e-4 * max(1, best)
        lowest = table[row].min(1)
        assert bool(found.tied[row]) == (np.sum(lowest - lowest.min() < 1e-3) > 1)
    # The objective is the squared distance to the mean target, and a constant.
    a, b = (np.mean(x, 0)[:, None] for x in zip(*targets, strict=True))
    forward, backward = pairs(large, experts[0] - small, GRID)
    near = count * ((forward - a) ** 2 + (backward - b) ** 2)
    constant = table[:, 0] - near
    assert np.ptp(constant, axis=1).max() < 1e-9 * max(1, np.abs(table).max())


@pytest.mark.parametrize("method", ["grid", "bisect"])
def test_the_minimum_lies_between_the_matching_steps(method):
    for seed in range(4):
        large, small, expert = draw(seed, 3, 1.0)
        found = solve(large, small, expert[None], method=method)
        fine = np.linspace(0, 2, 2001)
        forward, backward = pairs(large, expert - small, fine)
        q, moved = softmax(small), softmax(expert)
        roots = np.sort(
            [
                fine[np.abs(forward - kl(moved, q)[:, None]).argmin(1)],
                fine[np.abs(backward - kl(q, moved)[:, None]).argmin(1)],
            ],
            axis=0,
        )
        room = 0.1 if method == "grid" else 0.002
        assert (found.alpha >= roots[0] - room).all()
        assert (found.alpha <= roots[1] + room).all()
        if method == "bisect":
            table, _ = brute(large, small, expert[None], fine)
            np.testing.assert_allclose(found.loss, table[:, 0].min(1), atol=1e-4)


def test_equal_large_and_small_models_go_all_the_way():
    large, expert = draw(5, 2)
    found = solve(large, large, expert[None])
    np.testing.assert_array_equal(found.alpha, np.ones(B, np.float32))
    assert (found.loss < 1e-9).all() and not found.tied.any()
    bisected = solve(large, large, expert[None], method="bisect")
    np.testing.assert_allclose(bisected.alpha, 1, atol=1e-3)


def test_constants_change_nothing():
    models = draw(6, 4)
    shift = np.array([7.0, -30.0, 3.0, 100.0])[:, None, None]
    fused, record = (
        decoding.DynamicFusion()(tuple(f32(models))),
        decoding.DynamicFusion()(tuple(f32(models + shift))),
    )
    np.testing.assert_array_equal(fused[1]["alpha"], record[1]["alpha"])
    np.testing.assert_array_equal(fused[1]["expert"], record[1]["expert"])
    np.testing.assert_allclose(softmax(fused[0]), softmax(record[0]), atol=1e-4)


def test_no_step_and_one_step():
    large, small, expert = (f32(x) for x in draw(7, 3))
    same, record = decoding.DynamicFusion()((large, small, small, small))
    np.testing.assert_array_equal(same, large)
    np.testing.assert_array_equal(record["alpha"], np.zeros(B))
    assert record["tied"].all() and (record["expert"] == 0).all()
    directions = (expert - small)[None]
    ones, first = jnp.ones(B), jnp.zeros(B, jnp.int32)
    proxy = decoding.StaticFusion(1.0)((large, small, expert))
    np.testing.assert_array_equal(
        decoding.fuse_logits(large, directions, ones, first), proxy
    )
    np.testing.assert_array_equal(proxy, large + (expert - small))


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def one():
        return {
            "embed": f32(rng.normal(size=(7, 4))),
            "out": f32(2 * rng.normal(size=(4, 7))),
        }

    return tuple(one() for _ in range(4))


PROMPTS = [[1, 2, 3], [4], [5, 6, 1, 2]]


def test_rows_are_solved_on_their_own(recurrent, weights, naive):
    """All models read the fused tokens; one row alone or with others is the same."""
    model = decoding.fused([recurrent()] * 4, decoding.DynamicFusion())
    found = decoding.generate(model, weights, PROMPTS, max_new_tokens=6, stop=3)
    records = jax.device_get(found.records)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step in range(int(found.lengths[row])):
            logits = [naive(params, ids)[None] for params in weights]
            table, _ = brute(logits[0], logits[1], np.stack(logits[2:]))
            t, a = np.unravel_index(table[0].argmin(), table[0].shape)
            assert records["alpha"][step, row] == pytest.approx(GRID[a], abs=1e-6)
            assert records["expert"][step, row] == t
            token = np.argmax(logits[0] + GRID[a] * (logits[2 + t] - logits[1]), axis=1)
            assert found.tokens[row, step] == token[0]
            ids.append(int(token[0]))
        alone = decoding.generate(model, weights, [prompt], max_new_tokens=6, stop=3)
        assert alone.rows(stop=True) == [found.rows(stop=True)[row]]
    assert len(np.unique(records["alpha"][0])) > 1


def test_what_is_refused():
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"fusion: wanted a large .*found 2 models"):
        decoding.StaticFusion()((x, x))
    with pytest.raises(ValueError, match=r"logit_kl_stats: .*\(2, 4\) and \(4, 2\)"):
        decoding.logit_kl_stats(x, x.T, jnp.ones(1))
    with pytest.raises(ValueError, match=r"alphas are \(3, 1\), wanted \[N\] or \[2"):
        decoding.logit_kl_stats(x, x, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="expert_targets: wanted small"):
        decoding.expert_targets(x, x)
    targets = decoding.expert_targets(x, x[None])
    for options, message in (
        ({"method": "newton"}, "method is 'newton', wanted one of"),
        ({"step": 3.0}, "wanted 0 < step=3.0 <= high=2.0"),
    ):
        with pytest.raises(ValueError, match=f"solve_alpha: {message}"):
            decoding.solve_alpha(x, x[None], targets, **options)
