import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import heads


@pytest.mark.fast
def test_scaled_cosine_whatever_the_length_of_the_features():
    rng = np.random.default_rng(0)
    f, p = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    want = 20 * (f / np.linalg.norm(f, axis=1, keepdims=True)) @ p.T
    for length in (1e-3, 1.0, 1e4):
        got = models.prototype_logits(
            jnp.asarray(f * length, jnp.float32), jnp.asarray(p, jnp.float32), 20.0
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    bf16 = models.prototype_logits(
        jnp.asarray(f, jnp.bfloat16), jnp.asarray(p, jnp.bfloat16), 20.0
    )
    assert bf16.dtype == jnp.float32
    np.testing.assert_allclose(bf16, want, atol=0.2)


@pytest.mark.fast
def test_the_product_keeps_float32_precision():
    """Accelerators take bfloat16 or TF32 passes unless they are told not to."""
    text = str(jax.make_jaxpr(models.prototype_logits)(jnp.ones((2, 3)), jnp.eye(3)))
    (product,) = text.split("dot_general[")[1:]
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product


def test_zero_features_give_zero_logits_and_finite_gradients():
    p = jnp.eye(3)
    f = lambda x: models.prototype_logits(x, p, 5.0).sum()  # noqa: E731
    value, grad = jax.value_and_grad(f)(jnp.zeros((2, 3)))
    assert value == 0
    assert jnp.isfinite(grad).all()


@pytest.mark.fast
def test_l2_normalize_gives_unit_rows_in_the_input_dtype():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    got = heads.l2_normalize(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), [[0.6, 0.8], [0, 0]], atol=2e-3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("f", "p", "message"),
    [((2, 3), (4, 5), "3 wide"), ((3,), (4, 3), "wanted features")],
)
def test_shapes_are_refused(f, p, message):
    with pytest.raises(ValueError, match=f"prototype_logits: .*{message}"):
        models.prototype_logits(jnp.ones(f), jnp.ones(p))
