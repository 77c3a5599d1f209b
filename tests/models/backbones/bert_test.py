import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models, tree


def tiny(**options):
    return models.Bert(
        vocab_size=13,
        width=8,
        depth=1,
        num_heads=2,
        mlp_dim=12,
        max_positions=6,
        **options,
    )


def run(module, params, *inputs, **options):
    apply = functools.partial(module.apply, **options)
    return jax.jit(apply)({"params": params}, *inputs)


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
TYPES = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]], np.int32)


def norm(x, p, eps=1e-12):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def oracle(params, ids, mask, types):
    """Embeddings and one post-norm layer in float64, example by example."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    e, layer = p["embeddings"], p["layers_0"]
    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    embedded, out = [], []
    for row, active, kind in zip(ids, mask, types, strict=True):
        x = e["word"]["embedding"][row] + e["token_type"]["embedding"][kind]
        x = norm(x + e["position"]["embedding"][: len(row)], e["norm"])
        embedded.append(x)
        a = layer["attention"]
        q, k, v = (dense(x, a[n]) for n in ("query", "key", "value"))
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            logits = q[:, h] @ k[:, h].T / 2 + np.where(active, 0, -np.inf)
            w = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(w / w.sum(-1, keepdims=True) @ v[:, h])
        x = norm(
            x + dense(np.concatenate(heads, -1), a["out"]), layer["norm_attention"]
        )
        y = dense(gelu(dense(x, layer["mlp"]["in"])), layer["mlp"]["out"])
        out.append(norm(x + y, layer["norm_mlp"]))
    return np.stack(embedded), np.stack(out)


@pytest.mark.fast
def test_one_layer_is_the_paper_in_float64(fill):
    params = fill(tiny(), IDS)
    got = run(tiny(), params, IDS, MASK, TYPES, return_hidden=True)
    for a, b in zip(got, oracle(params, IDS, MASK, TYPES), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_defaults_are_minilm():
    params = jax.eval_shape(models.Bert().init, jax.random.key(0), IDS)["params"]
    # The published encoder has 22,713,216 values, of which the pooler, absent here,
    # has 384 * 384 + 384.
    assert tree.size(params) == 22_713_216 - 384 * 385


def test_absent_mask_and_types_mean_all_active_and_zero(fill):
    params = fill(tiny(), IDS)
    apply = functools.partial(run, tiny(), params)
    ones, zeros = np.ones_like(IDS), np.zeros_like(IDS)
    np.testing.assert_allclose(apply(IDS), apply(IDS, ones, zeros), atol=1e-6)
    np.testing.assert_array_equal(apply(IDS, ones), apply(IDS, ones.astype(bool)))


def test_padding_never_reaches_the_tokens(fill):
    params = fill(tiny(), IDS)
    short = run(tiny(), params, IDS[1:, :3], MASK[1:, :3])
    long = run(tiny(), params, IDS[1:], MASK[1:])
    np.testing.assert_allclose(short, long[:, :3], atol=1e-5)


def test_bf16_compute_keeps_float32_params_and_stays_near(fill):
    params = fill(tiny(), IDS)
    module = tiny(dtype=jnp.bfloat16)
    got = run(module, params, IDS, MASK)
    assert got.dtype == jnp.bfloat16
    kinds = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert {x.dtype for x in jax.tree.leaves(kinds)} == {jnp.dtype(jnp.float32)}
    want = run(tiny(), params, IDS, MASK)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_only_when_asked_and_follows_its_key(fill, scan):
    module = tiny(dropout=0.5, scan=scan).clone(depth=2)
    params = fill(module, IDS)
    still = run(module, params, IDS)

    @jax.jit
    def move(key):
        return module.apply(
            {"params": params}, IDS, deterministic=False, rngs={"dropout": key}
        )

    moving = [move(jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(moving[0], moving[1])
    assert not np.allclose(moving[0], moving[2])
    assert not np.allclose(moving[0], still)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS[0],), r"input_ids must be \[B, L\]"),
        ((IDS, MASK[:1]), "attention_mask is"),
        ((IDS, MASK, TYPES[:, :2]), "token_type_ids is"),
        ((np.zeros((1, 7), np.int32),), "at most 6 positions, found 7"),
    ],
)
def test_shapes_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=f"Bert: .*{message}"):
        jax.eval_shape(tiny().init, jax.random.key(0), *inputs)


def test_upper_blocks_alone():
    """Below and above, the blocks make the whole."""
    whole = tiny().clone(depth=3)
    params = whole.init(jax.random.key(0), IDS, MASK)["params"]
    upper = whole.clone(depth=2, embed=False)
    own = {f"layers_{i}": params[f"layers_{i + 1}"] for i in range(2)}
    hidden = run(whole, params, IDS, MASK, return_hidden=True)
    np.testing.assert_allclose(run(upper, own, hidden[1], MASK), hidden[3], atol=1e-5)
    parts = run(upper, own, hidden[1], MASK, return_hidden=True)
    assert len(parts) == 3
    np.testing.assert_array_equal(parts[0], hidden[1])
    shapes = jax.eval_shape(upper.init, jax.random.key(0), hidden[1], MASK)["params"]
    assert tree.paths(shapes) == tree.paths(own)
    with pytest.raises(ValueError, match=r"reads hidden states \[B, L, 8\], found"):
        upper.apply({"params": own}, IDS, MASK)
