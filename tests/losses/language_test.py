import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import losses
from mtl_jax.train import hlo

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 7, 5)).astype(np.float32)
KERNEL = RNG.normal(size=(5, 11)).astype(np.float32)
LABELS = RNG.integers(0, 11, (2, 7)).astype(np.int32)
WEIGHTS = np.array([[1, 0, 2, 0.5, 0, 1, 1], [0, 0, 0, 1, 3, 0, 1]], np.float32)


def naive(hidden, kernel, labels, weights, softcap=None):
    """In float64, all logits at once."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0] * weights


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunks_are_the_naive_loss(chunk, softcap):
    run = functools.partial(losses.token_cross_entropy, chunk=chunk, softcap=softcap)
    got = jax.jit(run)(HIDDEN, KERNEL, LABELS, WEIGHTS)
    want = naive(HIDDEN, KERNEL, LABELS, WEIGHTS, softcap)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    got = jax.jit(run)(HIDDEN, KERNEL, LABELS)
    want = naive(HIDDEN, KERNEL, LABELS, 1.0, softcap)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_are_those_of_the_whole():
    def whole(hidden, kernel):
        logits = jnp.einsum("bld,dv->blv", hidden, kernel)
        per_token = losses.softmax_cross_entropy(logits, LABELS)
        return jnp.sum(per_token * WEIGHTS)

    def chunked(hidden, kernel):
        return jnp.sum(
            losses.token_cross_entropy(hidden, kernel, LABELS, WEIGHTS, chunk=3)
        )

    want = jax.jit(jax.grad(whole, (0, 1)))(HIDDEN, KERNEL)
    got = jax.jit(jax.grad(chunked, (0, 1)))(HIDDEN, KERNEL)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    tangents = jnp.cos(HIDDEN), jnp.sin(KERNEL)
    _, slope = jax.jit(lambda: jax.jvp(chunked, (HIDDEN, KERNEL), tangents))()
    flat = sum(float(jnp.sum(a * b)) for a, b in zip(want, tangents, strict=True))
    np.testing.assert_allclose(slope, flat, rtol=1e-4)


def sizes(jaxpr):
    """Elements of every array that a program makes, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_frozen_head_gives_the_same_gradient_and_slope(softcap):
    def total(hidden, kernel=KERNEL, chunk=3, labels=LABELS):
        options = {"chunk": chunk, "softcap": softcap}
        found = losses.token_cross_entropy(hidden, kernel, labels, WEIGHTS, **options)
        return jnp.sum(found)

    want, _ = jax.jit(jax.grad(total, (0, 1)))(HIDDEN, KERNEL)
    got = jax.jit(jax.grad(total))(HIDDEN)
    np.testing.assert_allclose(got, want, atol=1e-6)
    eps, along = 1e-5, np.cos(HIDDEN)
    ends = [
        naive(
            HIDDEN + sign * eps * along.astype(float), KERNEL, LABELS, WEIGHTS, softcap
        ).sum()
        for sign in (1, -1)
    ]
    _, slope = jax.jit(lambda: jax.jvp(total, (HIDDEN,), (along,)))()
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * eps), rtol=1e-4)
    # Of second order, and of many at once.
    twice = jax.jit(jax.grad(lambda h: jnp.sum(jax.grad(total)(h) * along)))(HIDDEN)
    both = jax.jit(
        jax.grad(lambda h: jnp.sum(jax.grad(total, (0, 1))(h, KERNEL)[0] * along))
    )(HIDDEN)
    np.testing.assert_allclose(twice, both, atol=1e-5)
    many = jax.jit(jax.vmap(jax.grad(total)))(np.stack([HIDDEN, 2 * HIDDEN]))
    np.testing.assert_allclose(many[0], want, atol=1e-6)
    # A label that is none costs infinity and pulls nowhere.
    labels = LABELS.copy()
    labels[0, 0] = 11
    value, pull = jax.jit(jax.value_and_grad(lambda h: total(h, labels=labels)))(HIDDEN)
    assert np.isinf(value)
    np.testing.assert_array_equal(pull[0, 0], 0)
    np.testing.assert_allclose(pull[1], want[1], atol=1e-6)


def test_a_frozen_head_is_multiplied_twice_a_step_and_a_trained_one_four_times():
    def text(argnums):
        def total(hidden, kernel):
            return jnp.sum(losses.token_cross_entropy(hidden, kernel, LABELS, chunk=7))

        program = jax.make_jaxpr(jax.value_and_grad(total, argnums))(HIDDEN, KERNEL)
        return str(program)

    assert text((0, 1)).count("dot_general[") == 4
    assert text(1).count("dot_general[") == 3
    assert text(0).count("dot_general[") == 2


def test_what_a_frozen_head_keeps_has_the_dtype_of_the_hidden_states():
    def total(hidden):
        return jnp.sum(losses.token_cross_entropy(hidden, KERNEL, LABELS, chunk=3))

    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    got = jax.jit(jax.grad(total))(hidden)
    assert got.dtype == jnp.bfloat16
    want = jax.jit(jax.grad(total))(HIDDEN)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03)
    program = str(jax.make_jaxpr(jax.grad(total))(hidden))
    # Three chunks of both rows, stacked.
    assert "bf16[3,1,2,3,5]" in program and "f32[3,1,2,3,5]" not in program


def test_a_frozen_head_under_other_orders_of_differentiation():
    def total(hidden, kernel=KERNEL):
        return jnp.sum(losses.token_cross_entropy(hidden, kernel, LABELS, chunk=3))

    def many(hidden):
        return jnp.sum(jax.vmap(total)(jnp.stack([hidden, 2 * hidden])))

    def each(hidden):
        return total(hidden) + total(2 * hidden)

    got, want = (jax.jit(jax.grad(f))(HIDDEN) for f in (many, each))
    np.testing.assert_allclose(got, want, atol=1e-5)

    def curvature(argnums):
        def slope(kernel):
            pull = jax.grad(total, argnums)(jnp.asarray(HIDDEN), kernel)
            return jnp.sum((pull if argnums == 0 else pull[0]) * jnp.cos(HIDDEN))

        return jax.jit(jax.grad(slope))(KERNEL)

    np.testing.assert_allclose(curvature(0), curvature((0, 1)), atol=1e-5)
    ahead = jax.jit(jax.jacfwd(jax.grad(total)))(HIDDEN)
    back = jax.jit(jax.jacrev(jax.grad(total)))(HIDDEN)
    np.testing.assert_allclose(ahead, back, atol=1e-5)


def test_narrow_labels_count_words_beyond_their_range():
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(5, 300)).astype(np.float32)
    labels = rng.integers(0, 120, (2, 7))
    got = losses.token_cross_entropy(HIDDEN, kernel, labels.astype(np.int8))
    np.testing.assert_allclose(got, naive(HIDDEN, kernel, labels, 1.0), atol=1e-5)


def test_all_logits_never_exist_even_in_the_backward_pass():
    vocabulary = 1000

    def loss(hidden, kernel, chunk):
        return jnp.sum(
            losses.token_cross_entropy(
                hidden, kernel, jnp.zeros((2, 64), jnp.int32), chunk=chunk
            )
        )

    shapes = (
        jax.ShapeDtypeStruct((2, 64, 4), jnp.float32),
        jax.ShapeDtypeStruct((4, vocabulary), jnp.float32),
    )
    for chunk, most in ((8, 2 * 8 * vocabulary), (64, 2 * 64 * vocabulary)):
        for argnums in (0, (0, 1)):
            gradient = jax.grad(functools.partial(loss, chunk=chunk), argnums)
            program = jax.make_jaxpr(gradient)(*shapes)
            assert max(sizes(program.jaxpr)) == most


@pytest.mark.fast
def test_labels_out_of_range_cost_infinity_where_they_weigh():
    labels = LABELS.copy()
    labels[0, 0], labels[0, 1], labels[1, 3] = 11, -100, -1
    got = losses.token_cross_entropy(HIDDEN, KERNEL, labels, WEIGHTS)
    assert np.isinf(got[0, 0])
    assert got[0, 1] == 0
    assert np.isinf(got[1, 3])
    assert np.isfinite(np.asarray(got)).sum() == 12


def test_bf16_hidden_states_give_float32_losses():
    got = losses.token_cross_entropy(
        HIDDEN.astype(jnp.bfloat16), KERNEL, LABELS, WEIGHTS, chunk=2
    )
    assert got.dtype == jnp.float32
    want = naive(HIDDEN, KERNEL, LABELS, WEIGHTS)
    np.testing.assert_allclose(got, want, atol=0.15)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_packing_changes_no_loss_of_a_segment(lengths):
    """Segments side by side give the losses of rows of their own."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 9, n).astype(np.int32) for n in lengths]
    own = [10.0 * row[:-1] + row[1:] for row in rows]
    ids, segments = np.zeros((1, 20), np.int32), np.zeros((1, 20), np.int32)
    ids[0, : sum(lengths)] = np.concatenate(rows)
    segments[0, : sum(lengths)] = np.repeat(np.arange(len(rows)) + 1, lengths)
    labels, weights = losses.next_tokens(ids, jnp.array(segments))
    # A token's loss is a number of its own and of its label.
    per_token = 10.0 * ids + np.asarray(labels)
    per_token = jnp.where(weights > 0, jnp.array(per_token, jnp.float32), 0)
    got = losses.segment_means(per_token, weights, jnp.array(segments), 5)
    want = [np.mean(x) if len(x) else 0 for x in own] + [0] * (5 - len(rows))
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    pairs = np.concatenate(own)
    total = losses.weighted_mean(per_token, weights)
    np.testing.assert_allclose(total, pairs.mean() if len(pairs) else 0, rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HIDDEN[0], KERNEL, LABELS), r"wanted hidden \[B, L, D\]"),
        ((HIDDEN, KERNEL.T, LABELS), r"kernel \[D, V\], found"),
        ((HIDDEN, KERNEL, LABELS[:1]), r"labels are \(1, 7\)"),
        ((HIDDEN, KERNEL, LABELS, WEIGHTS[:, :2]), r"weights are \(2, 2\)"),
        ((HIDDEN, KERNEL, WEIGHTS), "labels must be integers, are float32"),
    ],
)
def test_shapes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"token_cross_entropy: .*{message}"):
        losses.token_cross_entropy(*arguments)


@pytest.mark.fast
def test_others_refuse_shapes_too():
    with pytest.raises(ValueError, match="next_tokens: segment_ids"):
        losses.next_tokens(jnp.array(LABELS), jnp.array(LABELS[:1]))
    with pytest.raises(ValueError, match="segment_means: losses"):
        losses.segment_means(HIDDEN, WEIGHTS, LABELS, 2)
    with pytest.raises(ValueError, match="chunk must be 1 or more, is 0"):
        losses.token_cross_entropy(HIDDEN, KERNEL, LABELS, chunk=0)


@pytest.fixture
def mesh():
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


def test_on_a_mesh_the_head_and_its_gradient_travel_once(mesh):
    """Kills the gathering, or the sum, of the whole head for every chunk."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(8, 12, 16)).astype(np.float32)
    kernel = rng.normal(size=(16, 64)).astype(np.float32)
    labels = rng.integers(0, 64, (8, 12)).astype(np.int32)

    def loss(hidden, kernel):
        return jnp.sum(losses.token_cross_entropy(hidden, kernel, labels, chunk=4))

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)
    places = [NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data", "model"))]
    inputs = [
        jax.device_put(x, s) for x, s in zip((hidden, kernel), places, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(
            jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (*places,))
        )
        got = run(*inputs)
        text = run.lower(*inputs).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)
    found = hlo.collectives(text)
    # The 32 columns of a device are of the whole height before and after the loops.
    heads = [c for c in found if 16 in c.shape and 32 in c.shape]
    assert heads and not any(c.in_loop for c in heads)
    assert all(c.nbytes < 16 * 32 * 4 for c in found if c.in_loop)


def test_gradients_of_bf16_heads_are_added_up_in_float32():
    """In bfloat16 the sum of 512 equal parts would stop at 256 of them."""
    hidden = jnp.full((1, 512, 1), 1 / 64, jnp.bfloat16)
    kernel = jnp.zeros((1, 2), jnp.bfloat16)
    labels = jnp.zeros((1, 512), jnp.int32)

    def loss(kernel):
        return jnp.sum(losses.token_cross_entropy(hidden, kernel, labels, chunk=1))

    grad = jax.jit(jax.grad(loss))(kernel)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(jnp.float32), [[-4.0, 4.0]])


@pytest.mark.fast
def test_a_batch_without_rows_has_no_losses():
    got = losses.token_cross_entropy(HIDDEN[:0], KERNEL, LABELS[:0], chunk=3)
    assert got.shape == (0, 7)
