"""What every Gramian method owes, by table: each row names what is promised of it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation

weights = aggregation.weights
COUNT = 4
KEY = jax.random.key(7)
FIXED = jnp.array([0.1, 0.2, 0.3, 0.4])

# Names of the promises.
CONFLICT_FREE = "no task gets worse"
WHERE_INDEPENDENT = "no task gets worse where gradients are independent"
PERMUTES = "the order of the tasks does not matter"
WHERE_UNTIED = "the order of the tasks does not matter where there are no ties"
LINEAR = "linear in the length of each gradient"
STATIONARY = "zero where a positive combination vanishes"
SCALE_FREE = "a common factor changes no weight"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as a function of the Gramian, and its promises."""

    weigh: Callable
    make: Callable[[], aggregation.Aggregator]
    owes: frozenset = frozenset()
    fewest: int = 1
    needs_cross: bool = False


def method(weigh, make, *owes, **more):
    return Method(weigh, make, frozenset(owes), **more)


A = aggregation
METHODS = {
    "aligned_mtl": method(weights.aligned_mtl, A.aligned_mtl, PERMUTES, SCALE_FREE),
    "cagrad": method(weights.cagrad, A.cagrad, PERMUTES, SCALE_FREE),
    "config": method(
        weights.config,
        A.config,
        PERMUTES,
        SCALE_FREE,
        WHERE_INDEPENDENT,
    ),
    "constant": method(
        lambda g: weights.constant(g, FIXED[: len(g)]),
        lambda: A.constant(FIXED),
        LINEAR,
        SCALE_FREE,
    ),
    "dual_proj": method(
        functools.partial(weights.dual_proj, regularization=1e-6),
        A.dual_proj,
        PERMUTES,
        SCALE_FREE,
        STATIONARY,
        CONFLICT_FREE,
    ),
    "fair_grad": method(weights.fair_grad, A.fair_grad, PERMUTES, WHERE_INDEPENDENT),
    "grad_vac": method(
        lambda g: weights.grad_vac(g, KEY, jnp.full(g.shape, 0.2)),
        lambda: A.grad_vac(COUNT),
        SCALE_FREE,
    ),
    "imtl_g": method(weights.imtl_g, A.imtl_g, PERMUTES, SCALE_FREE),
    "krum": method(weights.krum, A.krum, WHERE_UNTIED, SCALE_FREE, fewest=3),
    "mean": method(weights.mean, A.mean, PERMUTES, LINEAR, SCALE_FREE),
    "mgda": method(
        weights.mgda, A.mgda, PERMUTES, SCALE_FREE, STATIONARY, CONFLICT_FREE
    ),
    "modo": method(weights.modo, lambda: A.modo(COUNT), PERMUTES, needs_cross=True),
    "nash_mtl": method(
        weights.nash_mtl, lambda: A.nash_mtl(COUNT), PERMUTES, WHERE_INDEPENDENT
    ),
    "pcgrad": method(lambda g: weights.pcgrad(g, KEY), A.pcgrad, SCALE_FREE),
    "random": method(lambda g: weights.random(g, KEY), A.random, LINEAR, SCALE_FREE),
    "sdm_grad": method(
        weights.sdm_grad,
        lambda: A.sdm_grad(COUNT),
        WHERE_UNTIED,
        SCALE_FREE,
        needs_cross=True,
    ),
    "sum": method(weights.sum, A.sum, PERMUTES, LINEAR, SCALE_FREE),
    "upgrad": method(
        functools.partial(weights.upgrad, regularization=1e-6),
        A.upgrad,
        PERMUTES,
        LINEAR,
        SCALE_FREE,
        STATIONARY,
        CONFLICT_FREE,
    ),
}
# The same method under settings that promise more.
METHODS["cagrad_wide"] = method(
    lambda g: weights.cagrad(g, 1.0), lambda: A.cagrad(1.0), WHERE_INDEPENDENT
)


def by_name(promise=None):
    names = [n for n, m in METHODS.items() if promise is None or promise in m.owes]
    return pytest.mark.parametrize("name", names)


@functools.cache
def compiled(name):
    return jax.jit(METHODS[name].weigh)


@functools.cache
def jacobians():
    """Task gradients by kind, [4, 12] float64."""
    rng = np.random.default_rng(11)
    mild = rng.normal(size=(COUNT, 12))
    shared = rng.normal(size=12)
    flat = rng.normal(size=(COUNT, 2)) @ rng.normal(size=(2, 12))
    closed = mild.copy()
    closed[-1] = -(mild[0] + 2 * mild[1] + 0.5 * mild[2])
    zero_row, twice = mild.copy(), mild.copy()
    zero_row[1] = 0
    twice[2] = twice[0]
    signs = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    return {
        "mild": mild,
        "agreeing": mild + 3 * shared,
        "conflicting": mild + 3 * signs * shared,
        "uneven": mild * np.array([[1e-3], [1.0], [30.0], [1e2]]),
        "rank two": flat,
        "one direction": np.array([[1.0], [2.0], [-1.0], [0.5]]) * shared,
        "stationary": closed,
        "opposite pairs": np.stack([mild[0], -mild[0], mild[1], -mild[1]]),
        "a zero": zero_row,
        "all zero": np.zeros((COUNT, 12)),
        "a repeat": twice,
        "all equal": np.repeat(mild[:1], COUNT, 0),
    }


INDEPENDENT = ("mild", "agreeing", "conflicting", "uneven")
VANISHING = ("stationary", "opposite pairs", "all zero")


def by_kind(kinds=None):
    return pytest.mark.parametrize("kind", kinds or list(jacobians()))


def gram_of(g):
    return jnp.asarray(g @ g.T, jnp.float32)


def direction(name, g):
    return np.asarray(compiled(name)(gram_of(g)), float) @ g


def test_the_table_is_complete():
    assert set(METHODS) - {"cagrad_wide"} == set(weights.__all__)


@by_name(CONFLICT_FREE)
@by_kind()
def test_no_task_gets_worse(name, kind):
    g = jacobians()[kind]
    d = direction(name, g)
    lengths = np.linalg.norm(g, axis=1)
    assert (g @ d >= -1e-3 * lengths * lengths.max()).all()


@by_name(WHERE_INDEPENDENT)
@by_kind(INDEPENDENT)
def test_no_task_gets_worse_where_gradients_are_independent(name, kind):
    g = jacobians()[kind]
    d = direction(name, g)
    reach = np.linalg.norm(g, axis=1) * np.linalg.norm(d)
    assert (g @ d >= -1e-4 * reach).all()


@by_name(PERMUTES)
@by_kind()
def test_the_order_of_the_tasks_does_not_matter(name, kind):
    g = jacobians()[kind]
    want = direction(name, g)
    size = np.linalg.norm(g, axis=1).max() + np.linalg.norm(want)
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        np.testing.assert_allclose(direction(name, g[order]), want, atol=2e-3 * size)


@by_name(WHERE_UNTIED)
@by_kind(INDEPENDENT)
def test_the_order_does_not_matter_where_there_are_no_ties(name, kind):
    g = jacobians()[kind]
    got, want = direction(name, g[[3, 1, 0, 2]]), direction(name, g)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(g).max())


@by_name(LINEAR)
@by_kind(("mild", "agreeing", "conflicting"))
def test_linear_in_the_length_of_each_gradient(name, kind):
    """d(diag(a + b) J) = d(diag(a) J) + d(diag(b) J)."""
    g = jacobians()[kind]
    a = np.array([[1.0], [2.0], [0.5], [1.0]])
    b = np.array([[1.0], [1.0], [1.5], [3.0]])
    whole = direction(name, (a + b) * g)
    parts = direction(name, a * g) + direction(name, b * g)
    np.testing.assert_allclose(whole, parts, atol=2e-3 * np.abs(whole).max())


@by_name(STATIONARY)
@by_kind(VANISHING)
def test_zero_where_a_positive_combination_vanishes(name, kind):
    g = jacobians()[kind]
    longest = np.linalg.norm(g, axis=1).max()
    assert np.linalg.norm(direction(name, g)) <= 2e-3 * longest


@by_name(SCALE_FREE)
@by_kind(("mild", "uneven", "a zero"))
def test_a_common_factor_changes_no_weight(name, kind):
    g = jacobians()[kind]
    want = compiled(name)(gram_of(g))
    for factor in (2.0**-40, 2.0**40):
        got = compiled(name)(gram_of(factor * g))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@by_name()
@by_kind()
def test_finite_over_scales(name, kind):
    g = jacobians()[kind]
    for factor in (1e-15, 1e-6, 1.0, 1e6, 1e15):
        w = compiled(name)(gram_of(factor * g))
        assert w.shape == (COUNT,)
        assert w.dtype == jnp.float32
        assert np.isfinite(w).all(), factor
        with np.errstate(over="raise"):
            assert np.isfinite(
                (np.asarray(w)[:, None] * np.float32(factor * g)).sum(0)
            ).all()


@by_name()
def test_finite_over_scales_within(name):
    g = jacobians()["mild"] * np.array([[1e-15], [1e-6], [1.0], [1e15]])
    assert np.isfinite(compiled(name)(gram_of(g))).all()


@by_name()
def test_one_task(name):
    if METHODS[name].fewest > 1:
        with pytest.raises(ValueError, match=name):
            METHODS[name].weigh(jnp.ones((1, 1)))
        return
    w = compiled(name)(jnp.full((1, 1), 4.0))
    assert w.shape == (1,)
    assert w[0] > 0


@by_name()
def test_no_tasks_are_refused(name):
    with pytest.raises(ValueError, match=r"gram is \(0, 0\)"):
        METHODS[name].weigh(jnp.zeros((0, 0)))


@by_name()
def test_batches_of_gramians(name):
    kinds = ("mild", "conflicting", "uneven")
    batch = jnp.stack([gram_of(jacobians()[kind]) for kind in kinds])
    many = jax.jit(jax.vmap(METHODS[name].weigh))(batch)
    for got, gram in zip(many, batch, strict=True):
        want = compiled(name)(gram)
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


@functools.cache
def updater(name, dtype):
    """One jitted update over a tree of two leaves, and its state."""
    tx = METHODS[name].make()
    params = {"a": jnp.zeros((2, 3), dtype), "b": jnp.zeros(6, dtype)}
    return jax.jit(tx.update), tx.init(params)


def tree_of(g, dtype):
    g = jnp.asarray(g, dtype)
    return {"a": g[:, :6].reshape(-1, 2, 3), "b": g[:, 6:]}


def extra_of(name, tree):
    """The cross-batch Gramian, for methods that need one."""
    if not METHODS[name].needs_cross:
        return {}
    flat = np.concatenate(
        [np.asarray(x, float).reshape(COUNT, -1) for x in tree.values()], 1
    )
    return {"cross_gram": gram_of(flat)}


@by_name()
def test_half_precision_leaves(name):
    """As in float32 on the same numbers, rounded once at the end."""
    tree = tree_of(jacobians()["conflicting"], jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    got = run(name, tree)[0]
    want = run(name, wide)[0]
    for leaf, reference in zip(got.values(), want.values(), strict=True):
        assert leaf.dtype == jnp.bfloat16
        size = float(jnp.abs(reference).max()) + 1e-3
        np.testing.assert_allclose(
            np.asarray(leaf, float), reference, rtol=2**-7, atol=2**-8 * size
        )


def run(name, tree):
    update, state = updater(name, tree["a"].dtype.name)
    return update(tree, state, **extra_of(name, tree))


@by_name()
def test_steps_do_not_recompile(name):
    update, state = updater(name, "float32")
    for kind in ("mild", "conflicting", "a zero"):
        tree = tree_of(jacobians()[kind], jnp.float32)
        _, state = update(tree, state, **extra_of(name, tree))
    assert update._cache_size() == 1


@by_name()
def test_a_nan_is_reported(name):
    g = jacobians()["mild"].copy()
    g[1, 3] = np.nan
    updates, state = run(name, tree_of(g, jnp.float32))
    assert not state.finite
    flat = np.concatenate([np.ravel(x) for x in updates.values()])
    assert not np.isfinite(flat).all()


@by_name()
def test_weights_never_leave_the_device(name):
    count = max(COUNT, METHODS[name].fewest)
    text = str(jax.make_jaxpr(METHODS[name].weigh)(jnp.eye(count)))
    assert "callback" not in text


@pytest.mark.parametrize("name", ["mgda", "modo", "sdm_grad"])
def test_weights_are_on_the_simplex(name):
    for kind, g in jacobians().items():
        found = np.asarray(METHODS[name].weigh(gram_of(g)))
        assert (found >= -1e-6).all(), kind
        assert found.sum() == pytest.approx(1, abs=1e-4), kind


@pytest.mark.parametrize(("name", "share"), [("pcgrad", 1), ("upgrad", 1 / COUNT)])
def test_without_conflicts_it_is_the_sum_or_the_mean(name, share):
    g = np.abs(np.random.default_rng(0).normal(size=(COUNT, 12)))
    found = METHODS[name].weigh(gram_of(g))
    np.testing.assert_allclose(found, np.full(COUNT, share), rtol=1e-3)
