"""The seven points that Rep-MTL owes."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import losses, train

SHAPES = [(3, 4, 5), (2, 3, 2, 2, 4), (1, 2, 3), (3, 4, 6, 2)]


CSA = jax.jit(losses.csa_loss, static_argnames="temperature")


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def slope(loss):
    return jax.jit(jax.grad(loss))


def entropy(s):
    """Loops over positions in float64."""
    tasks = s.shape[0]
    sizes = np.abs(s.mean(-1)).reshape(tasks, -1)
    total = 0.0
    for column in sizes.T:
        p = column / column.sum()
        total -= sum(x * math.log(x) for x in p if x > 0)
    return total / sizes.shape[1]


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


def contrast(s, tau):
    """The published form with explicit [C, C] matrices, float64 loops."""
    tasks, batch, channels = *s.shape[:2], s.shape[-1]
    s = s.reshape(tasks, batch, -1, channels).transpose(0, 1, 3, 2)
    anchors = [
        np.stack([s[t, b].mean(1) for t in range(tasks)], 1) for b in range(batch)
    ]
    wide = [a @ a.T for a in anchors]
    total = 0.0
    for b in range(batch):
        below = sum(
            math.exp(cosine(wide[b], wide[k]) / tau) for k in range(batch) if k != b
        )
        for t in range(tasks):
            above = math.exp(cosine(wide[b], s[t, b] @ s[t, b].T) / tau)
            total -= math.log(above / below) / tasks / batch
    return total


@pytest.mark.fast
@pytest.mark.parametrize("shape", SHAPES)
def test_1_entropy_is_that_of_the_paper(shape):
    s = draw(shape)
    np.testing.assert_allclose(
        losses.tsr_loss(f32(s)), entropy(s), rtol=1e-4, atol=1e-6
    )


@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_1_entropy_is_within_its_bounds(seed, tasks):
    value = float(jax.jit(losses.tsr_loss)(f32(draw((tasks, 2, 3), seed))))
    assert 0 <= value <= math.log(tasks) + 1e-6


def test_1_bounds_are_reached():
    owned = np.zeros((3, 3, 2))
    owned[[0, 1, 2], [0, 1, 2]] = [1.0, 2.0]
    assert float(losses.tsr_loss(f32(owned))) == 0
    # Signs do not count, nor does the scale of a position.
    equal = np.array([1.0, -1.0, 1.0])[:, None, None] * draw((1, 4, 2))
    assert float(losses.tsr_loss(f32(equal))) == pytest.approx(math.log(3), rel=1e-6)
    assert float(losses.tsr_loss(f32(draw((1, 4, 2))))) == 0


def test_1_mean_over_channels_comes_before_the_absolute_value():
    """Channels that cancel own nothing."""
    s = np.zeros((2, 1, 2))
    s[0, 0], s[1, 0] = [5.0, -5.0], [1.0, 1.0]
    assert float(losses.tsr_loss(f32(s))) == 0


@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_2_a_common_factor_changes_nothing_one_task_alone_does(scale):
    s = f32(draw((3, 4, 2, 5)))
    one = s.at[0].multiply(scale)
    for loss in map(jax.jit, (losses.tsr_loss, losses.csa_loss)):
        np.testing.assert_allclose(loss(s * scale), loss(s), rtol=1e-4)
        assert abs(float(loss(one) - loss(s))) > 1e-3


@hypothesis.given(st.integers(0, 2**31 - 1), st.sampled_from([0.05, 0.5, 2.0]))
def test_3_contrast_is_bounded_below(seed, tau):
    s = f32(draw((2, 3, 4), seed))
    value = float(CSA(s, temperature=tau))
    assert value >= math.log(2) - 1 / tau - 1e-4
    assert value <= math.log(2) + 1 / tau + 1e-4


def test_3_contrast_may_be_negative():
    """Two examples on different channels: own cosines 1, others 0."""
    s = np.zeros((2, 2, 4))
    s[:, 0, 0], s[:, 1, 1] = 1.0, 2.0
    value = losses.csa_loss(f32(s), temperature=0.1)
    assert float(value) == pytest.approx(-10, rel=1e-5)


def test_4_order_of_samples_and_tasks_does_not_count():
    s = f32(draw((3, 5, 2, 4)))
    for loss in map(jax.jit, (losses.tsr_loss, losses.csa_loss)):
        want = loss(s)
        np.testing.assert_allclose(loss(s[jnp.array([2, 0, 1])]), want, rtol=1e-5)
        np.testing.assert_allclose(
            loss(s[:, jnp.array([4, 2, 0, 1, 3])]), want, rtol=1e-5
        )


@pytest.mark.fast
def test_4_one_example_has_nothing_to_contrast_with():
    with pytest.raises(ValueError, match="csa_loss: one example in the batch"):
        losses.csa_loss(jnp.ones((2, 1, 3)))


@pytest.mark.fast
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 9, 4), (4, 2, 3, 3, 2)])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_7_contrast_equals_the_explicit_matrices(shape, tau):
    s = draw(shape)
    np.testing.assert_allclose(
        CSA(f32(s), temperature=tau), contrast(s, tau), rtol=1e-4, atol=1e-4
    )


def heads(params, z):
    """Three smooth tasks on any features."""
    flat = z.reshape(z.shape[0], -1)
    out = jnp.tanh(flat @ params["w"]) @ params["v"]
    return jnp.mean(jnp.square(out - jnp.array([[1.0, -1.0, 0.5]])), 0) + 0.1


def model(seed=0, shape=(4, 2, 3)):
    size = int(np.prod(shape[1:]))
    return {
        "encoder": f32(draw((5, size), seed)) * 0.5,
        "w": f32(draw((size, 4), seed + 1)) * 0.5,
        "v": f32(draw((4, 3), seed + 2)),
    }


X = f32(draw((4, 5), 9))


def total(params, **options):
    z = jnp.tanh(X @ params["encoder"]).reshape(4, 2, 3)
    return losses.rep_mtl_loss(heads, params, z, **options)[0]


def base(params):
    z = jnp.tanh(X @ params["encoder"]).reshape(4, 2, 3)
    return jnp.sum(jnp.log(heads(params, z) + 1e-8))


def test_saliency_is_what_an_example_contributes():
    params, z = model(), f32(draw((4, 2, 3), 3))
    found, s = jax.jit(lambda z: losses.task_saliency(heads, params, z))(z)
    np.testing.assert_allclose(found, heads(params, z), rtol=1e-6)
    alone = jax.jit(jax.jacrev(lambda row: heads(params, row[None])))
    for t in range(3):
        for b in range(4):
            np.testing.assert_allclose(s[t, b], alone(z[b])[t], rtol=1e-4, atol=1e-6)


def test_5_zero_weights_are_the_base_training_bit_for_bit():
    def train(loss):
        params, tx = model(), optax.sgd(0.1)
        state = tx.init(params)
        step = slope(loss)
        for _ in range(4):
            updates, state = tx.update(step(params), state)
            params = optax.apply_updates(params, updates)
        return params

    left = train(lambda p: total(p, tsr=0.0, csa=0.0))
    right = train(base)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    both = train(total)
    assert any((left[k] != both[k]).any() for k in left)


@pytest.mark.parametrize(
    "options", [{"csa": 0.0}, {"tsr": 0.0}, {"log": False, "remat": True}]
)
def test_6_gradient_goes_through_the_saliencies(options):
    """Central differences along three directions, one for each group of parameters."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), model())
        inputs, targets = np.asarray(X, np.float64), np.array([[1.0, -1.0, 0.5]])

        def heads64(params, z):
            flat = z.reshape(z.shape[0], -1)
            out = jnp.tanh(flat @ params["w"]) @ params["v"]
            return jnp.mean(jnp.square(out - targets), 0) + 0.1

        def loss(scales, detach="none"):
            moved = {
                k: jnp.asarray(v) * (1 + s)
                for (k, v), s in zip(params.items(), scales, strict=True)
            }
            z = jnp.tanh(jnp.asarray(inputs) @ moved["encoder"]).reshape(4, 2, 3)
            out, _ = losses.rep_mtl_loss(heads64, moved, z, detach=detach, **options)
            return out

        zero, step = np.zeros(3), 1e-5
        value = jax.jit(loss)
        want = [
            float(value(zero + step * e) - value(zero - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        got = slope(loss)(zero)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
        off = slope(lambda s: loss(s, "all"))(zero)
        assert np.abs(np.asarray(off) - want).max() > 2e-2


def test_detached_heads_are_moved_by_their_losses_alone():
    params = model()
    detached = slope(lambda p: total(p, detach="heads"))(params)
    plain = slope(base)(params)
    full = slope(total)(params)
    for name in ("w", "v"):
        np.testing.assert_allclose(detached[name], plain[name], rtol=1e-4, atol=1e-5)
        assert jnp.max(jnp.abs(full[name] - plain[name])) > 1e-3
    np.testing.assert_allclose(
        detached["encoder"], full["encoder"], rtol=1e-3, atol=1e-4
    )


def test_detached_saliencies_are_constants():
    params = model()
    constant = slope(lambda p: total(p, detach="all"))(params)
    plain = slope(base)(params)
    for name in params:
        np.testing.assert_allclose(constant[name], plain[name], rtol=1e-4, atol=1e-6)


def test_dead_saliencies_stay_finite():
    """All zero, one task zero, one example zero: values and slopes."""
    s = f32(draw((3, 4, 2, 5)))
    for dead in (jnp.zeros_like(s), s.at[1].set(0), s.at[:, 2].set(0)):
        for loss in (losses.tsr_loss, losses.csa_loss):
            value, found = jax.jit(jax.value_and_grad(loss))(dead)
            assert np.isfinite(value) and np.isfinite(found).all()


def test_low_precision_is_widened():
    s = f32(draw((2, 3, 4))).astype(jnp.bfloat16)
    for loss in (losses.tsr_loss, losses.csa_loss):
        assert loss(s).dtype == jnp.float32


def test_parts():
    params = model()
    z = jnp.tanh(X @ params["encoder"]).reshape(4, 2, 3)
    value, parts = jax.jit(
        lambda z: losses.rep_mtl_loss(heads, params, z, tsr=0.5, csa=0.25, log=False)
    )(z)
    _, s = losses.task_saliency(heads, params, z)
    np.testing.assert_allclose(parts["tsr"], losses.tsr_loss(s), rtol=1e-4)
    np.testing.assert_allclose(parts["csa"], losses.csa_loss(s), rtol=1e-4)
    want = parts["losses"].sum() + 0.5 * parts["tsr"] + 0.25 * parts["csa"]
    np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: losses.tsr_loss(jnp.ones((2, 3))), r"float32\[2, 3\], wanted"),
        (lambda: losses.csa_loss(jnp.ones((2, 3, 4), jnp.int32)), "int32"),
        (
            lambda: losses.csa_loss(jnp.ones((2, 3, 4)), temperature=0.0),
            "temperature is 0.0",
        ),
        (
            lambda: losses.task_saliency(lambda p, z: z[0], None, jnp.ones(3)),
            r"features are \(3,\)",
        ),
        (
            lambda: losses.task_saliency(lambda p, z: z.sum(), None, jnp.ones((2, 3))),
            r"losses are \(\), wanted \[T\]",
        ),
        (lambda: total(model(), detach="some"), "detach is 'some', wanted one of"),
    ],
)
def test_bad_arguments(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_sharded_batch_equals_one_device():
    """Negatives come from all devices."""
    mesh = train.make_mesh()
    s = f32(draw((3, 16, 2, 5)))
    spec = jax.sharding.PartitionSpec(None, "data")
    split = jax.device_put(s, jax.sharding.NamedSharding(mesh, spec))
    for loss in (losses.tsr_loss, losses.csa_loss):
        both = jax.jit(jax.value_and_grad(loss))
        (want, slope_one), (got, slope_all) = both(s), both(split)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(slope_all, slope_one, rtol=1e-4, atol=1e-6)
