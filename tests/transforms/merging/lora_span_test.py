"""Merges of adapters in their span, against the rule on whole products."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import adapters, merging

RANKS, EQUAL, ALPHAS = (1, 2, 1), (2, 2, 2), (2.0, 1.0, 3.0)
SHAPES = {"one": ((), 9, 7), "layers": ((2,), 8, 10)}


def every(name, shape):
    """All leaves are matrices in their last two axes."""
    del name, shape
    return True


def draw(seed, ranks=RANKS, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return [
        {
            name: {"kernel": {"a": part(*lead, m, r), "b": part(*lead, r, n)}}
            for name, (lead, m, n) in SHAPES.items()
        }
        for r in ranks
    ]


def products(loras, alphas=ALPHAS):
    """Task vectors [T, ..., in, out] in float64."""
    return {
        name: np.stack(
            [
                alpha
                / lora[name]["kernel"]["a"].shape[-1]
                * np.asarray(lora[name]["kernel"]["a"], np.float64)
                @ np.asarray(lora[name]["kernel"]["b"], np.float64)
                for lora, alpha in zip(loras, alphas, strict=True)
            ]
        )
        for name in SHAPES
    }


def product(lora):
    return {name: x[0] for name, x in products([lora], [rank_of(lora)]).items()}


def rank_of(lora):
    return lora["one"]["kernel"]["a"].shape[-1]


def test_sums_are_sums_of_products():
    loras, weights = draw(0), np.array([1.0, -0.5, 2.0])
    got = merging.lora_span(
        loras, merging.task_arithmetic, alpha=ALPHAS, weights=weights
    )
    for name, x in product(got).items():
        want = np.tensordot(weights, products(loras)[name], 1)
        np.testing.assert_allclose(x, want, atol=1e-4)
    assert rank_of(got) == sum(RANKS)


@pytest.mark.parametrize("side", ["both", "in", "out"])
def test_a_truncated_svd_is_that_of_the_whole_product(side):
    """A rule written here, in float64 of whole matrices: the best of rank 2."""

    def best(taus, weights=None, key=None):
        del weights, key
        return jax.tree.map(lambda x: short(jnp.sum(x, 0), jnp), taus)

    def short(x, np_):
        u, s, vt = np_.linalg.svd(x, full_matrices=False)
        return (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]

    loras = draw(1)
    got = product(merging.lora_span(loras, best, alpha=ALPHAS, side=side))
    for name, x in got.items():
        want = short(products(loras)[name].sum(0), np)
        np.testing.assert_allclose(x, want, atol=1e-4)


RULES = {
    "tsv_merge": functools.partial(merging.tsv_merge, matrices=every),
    "svc": functools.partial(merging.svc, matrices=every),
    "opcm": functools.partial(merging.opcm, matrices=every),
    "model_stock": merging.model_stock,
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_turn_are_those_of_the_whole(name):
    # Equal ranks of at most side / T, so that `tsv_merge` cuts nothing off.
    loras, rule = draw(2, EQUAL), RULES[name]
    taus = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), products(loras))
    got = product(merging.lora_span(loras, rule, alpha=ALPHAS))
    want = rule(taus)
    for leaf, x in got.items():
        np.testing.assert_allclose(x, want[leaf], atol=2e-4)


def test_knots_in_the_span_of_the_outputs_is_knots():
    rule = functools.partial(
        merging.knots, matrices=every, rank=sum(RANKS), layout="in_out"
    )
    loras = draw(3)
    taus = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), products(loras))
    got = product(merging.lora_span(loras, rule, alpha=ALPHAS, side="out"))
    for name, want in rule(taus).items():
        np.testing.assert_allclose(got[name], want, atol=2e-4)
    other = product(merging.lora_span(loras, rule, alpha=ALPHAS, side="both"))
    assert np.abs(other["one"] - got["one"]).max() > 1e-2


def test_iso_has_the_directions_of_the_whole_and_the_mean_of_its_own_values():
    rule = functools.partial(merging.iso_c, matrices=every)
    loras = draw(4)
    got = product(merging.lora_span(loras, rule, alpha=ALPHAS))
    for name, x in products(loras).items():
        u, s, vt = np.linalg.svd(x.sum(0), full_matrices=False)
        r = sum(RANKS)
        want = s[..., :r].mean(-1)[..., None, None] * u[..., :r] @ vt[..., :r, :]
        np.testing.assert_allclose(got[name], want, atol=2e-3)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.integers(0, 2**31 - 1), st.permutations(range(3)))
def test_order_of_tasks_does_not_count(seed, order):
    loras = draw(seed, EQUAL)
    turned = [loras[t] for t in order]
    span = functools.partial(
        merging.lora_span, rule=merging.task_arithmetic, alpha=2.0, side="both"
    )
    one, other = product(span(loras)), product(span(turned))
    for name in SHAPES:
        np.testing.assert_allclose(one[name], other[name], atol=1e-3)


def test_more_rank_than_sides():
    """Where the ranks add up to more than a side, Q is square and nothing is lost."""
    loras = [*draw(5), *draw(6), *draw(7)]
    alphas = ALPHAS * 3
    got = merging.lora_span(loras, merging.task_arithmetic, alpha=alphas)
    want = products(loras, alphas)["one"].sum(0)
    np.testing.assert_allclose(product(got)["one"], want, atol=1e-4)


@pytest.mark.parametrize("side", ["both", "in", "out"])
def test_one_alpha_fits_leaves_of_all_sizes(side):
    """The span of a narrow leaf is smaller; its rank, and so its scale, is not."""
    shapes, loras = {"wide": (9, 8), "narrow": (9, 3), "short": (2, 8)}, []
    for t, r in enumerate(RANKS):
        rng = np.random.default_rng(t)
        loras.append(
            {
                name: {
                    "a": jnp.asarray(rng.normal(size=(m, r)), jnp.float32),
                    "b": jnp.asarray(rng.normal(size=(r, n)), jnp.float32),
                }
                for name, (m, n) in shapes.items()
            }
        )
    got = merging.lora_span(loras, merging.average, alpha=ALPHAS, side=side)
    whole = adapters.lora.delta(got, alpha=float(sum(RANKS)))
    for name in shapes:
        want = sum(
            alpha / r * np.asarray(each[name]["a"]) @ np.asarray(each[name]["b"])
            for each, alpha, r in zip(loras, ALPHAS, RANKS, strict=True)
        )
        np.testing.assert_allclose(whole[name], want / len(loras), atol=1e-4)


def test_dtypes_stay_and_scales_count():
    loras = draw(8, dtype=jnp.bfloat16)
    got = merging.lora_span(loras, merging.task_arithmetic, alpha=4.0, rslora=True)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    want = sum(
        np.asarray(adapters.lora.delta(x, alpha=4.0, rslora=True)["one"]["kernel"])
        for x in loras
    )
    x = product(got)["one"]
    assert np.linalg.norm(x - want) < 0.02 * np.linalg.norm(want)


def test_zeros_stay_zeros():
    loras = jax.tree.map(jnp.zeros_like, draw(9))
    got = merging.lora_span(loras, RULES["tsv_merge"], alpha=1.0)
    assert not any(np.abs(x).max() for x in product(got).values())


def test_refusals():
    loras = draw(10)
    span = functools.partial(merging.lora_span, rule=merging.average, alpha=1.0)
    with pytest.raises(ValueError, match="side is 'up', wanted one of"):
        span(loras, side="up")
    with pytest.raises(ValueError, match="0 adapters"):
        span([])
    with pytest.raises(ValueError, match="'one/kernel' is not adapted by both"):
        span([loras[0], {"layers": loras[1]["layers"]}])
    broken = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), loras[1])
    with pytest.raises(ValueError, match="adapter 1.*layers/kernel/a"):
        span([loras[0], broken])

    def transposed(taus, weights=None, key=None):
        del weights, key
        return jax.tree.map(lambda x: jnp.swapaxes(x[0], -1, -2)[..., :1], taus)

    with pytest.raises(ValueError, match=r"the rule's 'layers/kernel' is \(2, 4, 1\)"):
        merging.lora_span(loras, transposed, alpha=1.0)
