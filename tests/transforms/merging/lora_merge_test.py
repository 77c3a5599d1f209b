"""Adapters merged in product space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import adapters, merging


def draw(seed, ranks=(2, 3, 1)):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [
        {
            "dense": {"kernel": {"a": part(7, r), "b": part(r, 5)}},
            "layers": {"kernel": {"a": part(2, 4, r), "b": part(2, r, 6)}},
        }
        for r in ranks
    ]


def product(adapter):
    return {
        name: np.asarray(x["kernel"]["a"], np.float64)
        @ np.asarray(x["kernel"]["b"], np.float64)
        for name, x in adapter.items()
    }


def total(loras, weights, alphas, root=False):
    """sum_t w_t alpha_t / r_t a_t b_t in float64."""
    out = {}
    for each, w, alpha in zip(loras, weights, alphas, strict=True):
        for name, x in product(each).items():
            rank = each[name]["kernel"]["a"].shape[-1]
            scale = alpha / (np.sqrt(rank) if root else rank)
            out[name] = out.get(name, 0) + w * scale * x
    return out


def short(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_the_sum_of_products(rslora):
    loras, weights, alphas = draw(0), [1.0, -0.5, 2.0], [4.0, 2.0, 1.0]
    got = merging.lora_cat(loras, weights=weights, alpha=alphas, rslora=rslora)
    want = total(loras, weights, alphas, rslora)
    for name, x in product(got).items():
        np.testing.assert_allclose(x, want[name], atol=1e-5)
    back = adapters.lora.delta(got, alpha=6.0)
    np.testing.assert_allclose(back["dense"]["kernel"], want["dense"], atol=1e-5)


def test_cat_has_no_cross_terms_where_sums_of_factors_do():
    loras = draw(1, (2, 2))
    want = total(loras, [1, 1], [2.0, 2.0])["dense"]
    summed = product(jax.tree.map(jnp.add, *loras))["dense"]
    got = product(merging.lora_cat(loras, alpha=2.0))["dense"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(summed - want).max() > 0.1


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_svd_is_the_best_of_its_rank(rank):
    loras = draw(2)
    got = merging.lora_svd(loras, rank=rank, weights=[1.0, 2.0, -1.0], alpha=2.0)
    want = total(loras, [1.0, 2.0, -1.0], [2.0] * 3)
    for name, x in product(got).items():
        np.testing.assert_allclose(x, short(want[name], rank), atol=1e-4)
        assert got[name]["kernel"]["a"].shape[-1] == rank
        assert got[name]["kernel"]["b"].shape[-2] == rank


def test_factors_share_the_strength():
    got = merging.lora_svd(draw(3), rank=3, alpha=1.0)["dense"]["kernel"]
    left, right = got["a"].T @ got["a"], got["b"] @ got["b"].T
    np.testing.assert_allclose(left, right, atol=1e-4)
    np.testing.assert_allclose(left, np.diag(np.diag(left)), atol=1e-4)


def test_no_product_is_formed():
    """The matrix [in, out] would be the largest array of the program."""
    size = 64
    loras = [{"w": {"a": jnp.ones((size, 1)), "b": jnp.ones((1, size))}}] * 2
    text = str(
        jax.make_jaxpr(lambda *x: merging.lora_svd(x, rank=1, alpha=1.0))(*loras)
    )
    assert f"[{size},{size}]" not in text and f"[{size},2]" in text


def test_zero_one_opposite_and_dtypes():
    loras = draw(4, (2, 2))
    zero = jax.tree.map(jnp.zeros_like, loras[0])
    got = merging.lora_svd([zero, zero], rank=2, alpha=1.0)
    assert all(np.array_equal(x, 0 * x) for x in jax.tree.leaves(got))
    alone = merging.lora_svd(loras[:1], rank=2, alpha=2.0)
    for name, x in product(alone).items():
        np.testing.assert_allclose(x, product(loras[0])[name], atol=1e-4)
    gone = merging.lora_svd([loras[0]] * 2, rank=2, weights=[1.0, -1.0], alpha=1.0)
    assert max(np.abs(x).max() for x in product(gone).values()) < 1e-4
    narrow = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), each) for each in loras]
    for merge in (merging.lora_cat, lambda *a, **k: merging.lora_svd(*a, rank=3, **k)):
        leaves = jax.tree.leaves(jax.jit(lambda *x, f=merge: f(x, alpha=1.0))(*narrow))
        assert all(x.dtype == jnp.bfloat16 for x in leaves)


def test_order_of_tasks_changes_nothing():
    loras = draw(5)
    one = product(merging.lora_svd(loras, rank=2, alpha=1.0))
    two = product(merging.lora_svd(loras[::-1], rank=2, alpha=1.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)


def test_refuses_by_name():
    loras = draw(6)
    with pytest.raises(ValueError, match="lora_svd: rank is 0"):
        merging.lora_svd(loras, rank=0, alpha=1.0)
    with pytest.raises(ValueError, match="is not adapted by both 0 and 1"):
        merging.lora_cat([loras[0], {"dense": loras[1]["dense"]}], alpha=1.0)
    with pytest.raises(ValueError, match="2 weights"):
        merging.lora_cat(loras, weights=[1.0, 1.0], alpha=1.0)
    with pytest.raises(ValueError, match="0 adapters"):
        merging.lora_cat([], alpha=1.0)
    bad = jax.tree.map(lambda x: x * jnp.nan, loras[1])
    with pytest.raises(ValueError, match="lora_cat: adapter 1: 'dense/kernel/a' holds"):
        merging.lora_cat([loras[0], bad], alpha=1.0)
