import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models import layers


def oracle(query, key, value, bias):
    """softmax(Q K^T / sqrt(d) + bias) V, one head and one row at a time."""
    batch, length, heads, depth = query.shape
    out = np.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                logits = key[b, :, h] @ query[b, i, h] / np.sqrt(depth) + bias[b]
                weights = np.exp(logits - logits.max())
                out[b, i, h] = weights / weights.sum() @ value[b, :, h]
    return out


@pytest.mark.fast
def test_attend_is_the_formula():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4))
    mask = np.arange(5) < np.array([[5], [2]])
    want = oracle(q, k, v, np.where(mask, 0, -np.inf))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    got = layers.attend(q, k, v, layers.mask_bias(jnp.asarray(mask)))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_masked_keys_have_no_influence_at_all(fill):
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    bias = layers.mask_bias(jnp.array([[1, 1, 0, 0]]))
    module = layers.SelfAttention(num_heads=2)
    variables = {"params": fill(module, x)}
    apply = jax.jit(module.apply)
    poisoned = x.at[:, 2:].set(1e4)
    np.testing.assert_array_equal(
        apply(variables, x, bias)[:, :2],
        apply(variables, poisoned, bias)[:, :2],
    )


def test_row_without_active_keys_stays_finite_and_smooth():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    bias = layers.mask_bias(jnp.zeros((1, 3), bool))
    out, grad = jax.jit(
        jax.value_and_grad(lambda x: layers.attend(x, x, x, bias).sum())
    )(x)
    assert jnp.isfinite(out)
    assert jnp.isfinite(grad).all()


def test_logits_are_float32_under_bf16():
    q = k = jnp.full((1, 2, 1, 64), 8.0, jnp.bfloat16)
    k = k.at[0, 1].set(7.96875)
    v = jnp.array([1.0, 0.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    got = layers.attend(q, k, v)
    gap = 8 * 64 * (8 - 7.96875) / 8
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32)[0, 0, 0, 0], 1 / (1 + np.exp(-gap)), rtol=5e-3
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="3 heads for width 8"):
        layers.SelfAttention(num_heads=3).init(jax.random.key(0), jnp.ones((1, 2, 8)))


@pytest.mark.fast
def test_causal_bias_and_key_mask_add_up():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 4, 1, 3)), jnp.float32) for _ in "qkv")
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 1, 1]])
    bias = layers.causal_bias(4) + layers.mask_bias(mask)
    got = layers.attend(q, k, v, bias)
    for b in range(2):
        for i in range(4):
            seen = [j for j in range(i + 1) if mask[b, j]]
            logits = np.array([q[b, i, 0] @ k[b, j, 0] for j in seen]) / 3**0.5
            weights = np.exp(logits) / np.exp(logits).sum()
            want = sum(w * v[b, j, 0] for w, j in zip(weights, seen, strict=True))
            np.testing.assert_allclose(got[b, i, 0], want, atol=1e-5)
