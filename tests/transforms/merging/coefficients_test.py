"""Coefficients of task vectors: what the layouts have in common, and the chain rule."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree

pytestmark = pytest.mark.fast
T = 3
seeds = st.integers(0, 2**31 - 1)
few = hypothesis.settings(max_examples=6)


def draw(seed, dtype=np.float32):
    """Base and task tree of two matrices and a vector; step counters stay."""
    rng = np.random.default_rng(seed)
    shapes = {"block0": {"w": (4, 5), "b": (5,)}, "block1": {"w": (4, 5)}}
    base = jax.tree.map(
        lambda s: rng.normal(size=s).astype(dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    taus = jax.tree.map(lambda x: rng.normal(size=(T, *x.shape)).astype(dtype), base)
    base["step"], taus["step"] = np.int32(7), np.zeros(T, np.int32)
    return base, taus


def coefficients(seed, taus, parts=None):
    rng = np.random.default_rng((seed, 1))
    shape = (T,) if parts is None else (T, parts)
    return jax.tree.map(lambda _: rng.normal(size=shape).astype(np.float32), taus)


def close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, want
    )


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@hypothesis.given(seeds)
def test_is_the_sum_that_it_says(seed):
    base, taus = draw(seed)
    coeffs = coefficients(seed, taus)

    def oracle(b, x, c):
        if b.dtype == np.int32:
            return b
        return b + np.tensordot(c.astype(np.float64), x.astype(np.float64), 1)

    found = merging.compose(base, taus, coeffs)
    close(found, jax.tree.map(oracle, base, taus, coeffs))
    assert found["step"] == 7 and found["step"].dtype == jnp.int32


@hypothesis.given(seeds, st.sampled_from([0.0, 0.25, 0.5, 2.0]))
def test_equal_coefficients_are_task_arithmetic(seed, value):
    """Bit for bit, where the number is a power of two; any other to rounding."""
    base, taus = draw(seed)
    want = tree.add_scaled(base, merging.task_arithmetic(taus), value)
    for kind in ("task", "leaf"):
        coeffs = merging.init_coefficients(taus, value, kind=kind)
        same(merging.compose(base, taus, coeffs), want)
    close(
        merging.compose(base, taus, merging.init_coefficients(taus, 0.3)),
        tree.add_scaled(base, merging.task_arithmetic(taus), 0.3),
    )


@hypothesis.given(seeds)
def test_zero_is_the_base_and_one_hot_an_expert(seed):
    base, taus = draw(seed)
    same(merging.compose(base, taus, jnp.zeros(T)), base)
    for task in range(T):
        expert = jax.tree.map(lambda b, x, t=task: b + x[t], base, taus)
        close(merging.compose(base, taus, jnp.eye(T)[task]), expert)


@few
@hypothesis.given(seeds, st.sampled_from([1, 4]))
def test_equal_parts_are_leaves(seed, parts):
    base, taus = draw(seed)
    where = merging.partition(base, parts, key=jax.random.key(seed))
    coeffs = coefficients(seed, taus)
    tied = jax.tree.map(lambda c: jnp.repeat(c[:, None], parts, 1), coeffs)
    found = merging.compose(base, taus, tied, parts=where)
    close(found, merging.compose(base, taus, coeffs))


@few
@hypothesis.given(seeds)
def test_parts_divide_every_entry(seed):
    """Each entry belongs to one part, and leaves of equal shape to other ones."""
    base, taus = draw(seed)
    where = merging.partition(base, 3, key=jax.random.key(seed))
    where = jax.tree.map(np.asarray, where)
    indicators = [jax.tree.map(lambda p, k=k: p == k, where) for k in range(3)]
    total = jax.tree.map(lambda *x: sum(p.astype(np.int32) for p in x), *indicators)
    assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(total))
    assert not np.array_equal(where["block0"]["w"], where["block1"]["w"])
    coeffs = coefficients(seed, taus, parts=3)
    found = merging.compose(base, taus, coeffs, parts=where)["block0"]["w"]
    b, x, p, c = (t["block0"]["w"] for t in (base, taus, where, coeffs))
    terms = [c[:, k] @ (x * (p == k)).reshape(T, -1) for k in range(3)]
    want = b + np.sum(terms, 0).reshape(b.shape)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@jax.jit
def quadratic(targets, params):
    """A loss whose slopes are known: half the squared distance."""
    return 0.5 * sum(
        jnp.sum((p - t) ** 2)
        for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(targets), strict=True)
        if jnp.issubdtype(p.dtype, jnp.floating)
    )


@few
@hypothesis.given(seeds)
def test_slopes_are_inner_products(seed):
    """Of autodiff through the merge, and of float64 sums."""
    base, taus = draw(seed)
    targets, _ = draw(seed + 1)
    coeffs = coefficients(seed, taus)
    params = merging.compose(base, taus, coeffs)
    slopes = jax.tree.map(lambda p, t: p - t, params, targets)
    found = merging.coefficient_grads(taus, slopes)
    found.pop("step")
    by_hand = jax.tree.map(
        lambda x, g: np.tensordot(
            x.reshape(T, -1).astype(np.float64), np.asarray(g, np.float64).ravel(), 1
        ),
        taus,
        slopes,
    )
    by_hand.pop("step")
    close(found, by_hand, rtol=1e-4, atol=1e-4)

    def loss(free):
        rows = {**free, "step": coeffs["step"]}
        return quadratic(targets, merging.compose(base, taus, rows))

    free = {name: x for name, x in coeffs.items() if name != "step"}
    close(jax.grad(loss)(free), found, rtol=1e-4, atol=1e-4)


@few
@hypothesis.given(seeds)
def test_slopes_of_parts_are_inner_products(seed):
    base, taus = draw(seed)
    targets, _ = draw(seed + 1)
    where = merging.partition(base, 2, key=jax.random.key(seed))
    rows = coefficients(seed, taus, parts=2)

    def loss(w):
        inner = {**rows, "block1": {"w": w}}
        return quadratic(targets, merging.compose(base, taus, inner, parts=where))

    params = merging.compose(base, taus, rows, parts=where)
    slopes = jax.tree.map(lambda p, t: p - t, params, targets)
    want = jax.grad(loss)(rows["block1"]["w"])
    for options in ({}, {"num_parts": 2}):
        found = merging.coefficient_grads(taus, slopes, parts=where, **options)
        close(found["block1"]["w"], want, rtol=1e-4, atol=1e-4)


@few
@hypothesis.given(seeds)
def test_tied_leaves_are_task_wise(seed):
    """Same model; the slopes of a shared row are the sum over its leaves."""
    base, taus = draw(seed)
    targets, _ = draw(seed + 1)
    row = jnp.asarray(np.random.default_rng(seed).normal(size=T), jnp.float32)
    shared = merging.compose(base, taus, row)
    same(merging.compose(base, taus, jax.tree.map(lambda _: row, taus)), shared)
    slopes = jax.tree.map(lambda p, t: p - t, shared, targets)
    by_leaf = merging.coefficient_grads(taus, slopes)
    want = jax.grad(lambda c: quadratic(targets, merging.compose(base, taus, c)))(row)
    close(sum(jax.tree.leaves(by_leaf)), want, rtol=1e-4, atol=1e-4)


def test_a_group_shares_its_row():
    base, taus = draw(0)

    def group(name):
        return name.split("/")[0]

    coeffs = merging.init_coefficients(taus, 0.5, group=group)
    assert set(coeffs) == {"block0", "block1", "step"}
    coeffs["block1"] = jnp.array([1.0, 0.0, 0.0])
    found = merging.compose(base, taus, coeffs, group=group)
    b, x = base["block1"]["w"], taus["block1"]["w"]
    np.testing.assert_allclose(found["block1"]["w"], b + x[0], rtol=1e-6)
    b, x = base["block0"]["b"], taus["block0"]["b"]
    np.testing.assert_allclose(found["block0"]["b"], b + 0.5 * x.sum(0), rtol=1e-6)


def test_a_clip_passes_nothing_outside_of_its_range():
    base, taus = draw(0)
    targets, _ = draw(1)

    def loss(c):
        return quadratic(targets, merging.compose(base, taus, jnp.clip(c, 0, 1)))

    slopes = jax.grad(loss)(jnp.array([-0.1, 0.5, 1.2]))
    assert slopes[0] == 0 and slopes[2] == 0 and slopes[1] != 0


def test_narrow_task_vectors_are_summed_wide():
    """bfloat16 terms in a float32 sum: rounding of the sum to bfloat16 would show."""
    base = {"w": jnp.zeros(1)}
    taus = {"w": jnp.array([[1.0], [2.0**-10]], jnp.bfloat16)}
    assert float(merging.compose(base, taus, jnp.ones(2))["w"][0]) == 1 + 2.0**-10
    narrow = merging.compose({"w": jnp.zeros(1, jnp.bfloat16)}, taus, jnp.ones(2))
    assert narrow["w"].dtype == jnp.bfloat16


def test_low_rank_task_vectors_are_their_products():
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    loras = [
        {
            "w": {
                "a": jnp.asarray(rng.normal(size=(6, r)), jnp.float32),
                "b": jnp.asarray(rng.normal(size=(r, 5)), jnp.float32),
            }
        }
        for r in (1, 2, 2)
    ]
    coeffs = np.array([0.3, -0.5, 1.5], np.float32)
    dense = {"w": jnp.stack([x["w"]["a"] @ x["w"]["b"] for x in loras])}
    factors = merging.lora_cat(loras, alpha=[1.0, 2.0, 2.0], weights=coeffs)["w"]
    np.testing.assert_allclose(
        merging.compose(base, dense, coeffs)["w"],
        base["w"] + factors["a"] @ factors["b"],
        rtol=1e-5,
        atol=1e-5,
    )


@hypothesis.given(seeds)
def test_the_whole_budget_is_the_whole_method(seed):
    base, taus = draw(seed)
    slopes = coefficients(seed, taus)
    blocks = merging.select_blocks(slopes, T)
    taken = merging.take_blocks(taus, blocks)
    same(taken, taus)
    want = merging.compose(base, taus, slopes)
    same(merging.compose(base, taken, slopes), want)


@hypothesis.given(seeds, st.integers(1, T))
def test_blocks_have_the_largest_slopes(seed, budget):
    _, taus = draw(seed)
    slopes = coefficients(seed, taus, parts=2)
    blocks = merging.select_blocks(slopes, budget)
    want = jax.tree.map(
        lambda g: np.sort(np.argsort(-np.abs(g).sum(1), kind="stable")[:budget]), slopes
    )
    same(blocks, want)
    whole = merging.select_blocks(slopes, budget, scope="global")
    total = sum(np.abs(g).sum(1) for g in jax.tree.leaves(slopes))
    for index in jax.tree.leaves(whole):
        np.testing.assert_array_equal(index, np.sort(np.argsort(-total)[:budget]))


def test_one_block_each_mixes_sources():
    slopes = {"a": jnp.array([1.0, -3.0, 2.0]), "b": jnp.array([0.0, 1.0, 5.0])}
    taus = jax.tree.map(lambda _: jnp.arange(6.0).reshape(3, 2), slopes)
    mixed = merging.take_blocks(taus, merging.select_blocks(slopes, 1))
    assert mixed["a"].tolist() == [[2.0, 3.0]] and mixed["b"].tolist() == [[4.0, 5.0]]


BASE = {"w": jnp.zeros((2, 3))}
TAUS = {"w": jnp.zeros((T, 2, 3))}
PART = jnp.zeros((2, 3), jnp.int32)


def grads_of(part, num_parts=None):
    grads = {"w": jnp.ones((2, 3))}
    return merging.coefficient_grads(
        TAUS, grads, parts={"w": part}, num_parts=num_parts
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merging.compose({"v": BASE["w"]}, TAUS, jnp.zeros(T)), "'v' is in ba"),
        (lambda: merging.compose({"w": jnp.zeros(4)}, TAUS, jnp.zeros(T)), "'w'"),
        (lambda: merging.compose(BASE, TAUS, jnp.zeros(2)), r"'w' are \(2,\), wanted"),
        (lambda: merging.compose(BASE, TAUS, {"v": jnp.zeros(T)}), "neither"),
        (
            lambda: merging.compose(BASE, TAUS, {"g": jnp.zeros(T)}, group=str),
            r"coeffs are \['g'\], wanted \['w'\]",
        ),
        (
            lambda: merging.compose(
                BASE, TAUS, {"w": jnp.zeros((T, 1))}, parts={"w": PART + 1}
            ),
            "'w' are 1 to 1, there are 1",
        ),
        (
            lambda: merging.compose(
                BASE, TAUS, {"w": jnp.zeros((T, 1))}, parts={"w": PART[0]}
            ),
            r"int32\[3\], wanted integers \[2, 3\]",
        ),
        (lambda: merging.init_coefficients(TAUS, kind="row"), "kind is 'row'"),
        (lambda: merging.init_coefficients(TAUS, kind="task", parts=2), "one of"),
        (lambda: merging.init_coefficients(TAUS, parts=0), "parts is 0"),
        (lambda: merging.partition(BASE, 0, key=jax.random.key(0)), "parts is 0"),
        (lambda: merging.coefficient_grads(TAUS, {"v": PART}), "'w' is in taus"),
        (lambda: grads_of(PART + 1, 1), "grads: parts of 'w' are 1 to 1, there are 1"),
        (lambda: grads_of(PART, 0), "num_parts is 0"),
        (lambda: grads_of(PART[0]), r"int32\[3\], wanted integers \[2, 3\]"),
        (lambda: jax.jit(grads_of)(PART), "parts are traced, which wants num_parts"),
        (lambda: merging.select_blocks({"w": jnp.zeros(T)}, 4), "there are 3 tasks"),
        (
            lambda: merging.select_blocks({"w": jnp.array([0, jnp.nan])}, 1),
            "select_blocks: 'w'",
        ),
        (
            lambda: merging.select_blocks({"w": jnp.zeros(T)}, 1, scope="x"),
            "scope is 'x'",
        ),
        (lambda: merging.take_blocks(TAUS, {"v": PART}), "blocks"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_leaves_on_one_device_have_the_same_slopes(monkeypatch):
    """There the products are formed by slices, of T rows with one."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, 300, 200)).astype(np.float32)
    g = rng.normal(size=(300, 200)).astype(np.float32)
    found = merging.coefficient_grads({"w": x}, {"w": g})["w"]
    want = np.tensordot(x.astype(np.float64), g.astype(np.float64), 2)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-2)
