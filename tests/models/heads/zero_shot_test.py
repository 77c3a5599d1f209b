import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models import heads

pytestmark = pytest.mark.fast

TABLE = np.random.default_rng(0).normal(size=(9, 4))
TOKENS = np.random.default_rng(1).integers(0, 9, (3, 5, 6))


def encode(ids):
    """Of very different lengths, so that normalising first matters."""
    found = jnp.asarray(TABLE, jnp.float32)[ids].sum(axis=1)
    return found * (1.0 + ids[:, :1].astype(jnp.float32)) ** 2


def oracle():
    out = []
    for texts in TOKENS:
        units = []
        for ids in texts:
            x = TABLE[ids].sum(axis=0) * (1.0 + ids[0]) ** 2
            units.append(x / np.linalg.norm(x))
        mean = np.mean(units, axis=0)
        out.append(mean / np.linalg.norm(mean))
    return np.stack(out)


def test_the_mean_direction_of_the_templates():
    got = jax.jit(lambda x: heads.zero_shot_head(encode, x))(jnp.asarray(TOKENS))
    assert (got.shape, got.dtype) == ((3, 4), jnp.float32)
    np.testing.assert_allclose(got, oracle(), atol=1e-5)
    half = heads.zero_shot_head(
        lambda ids: encode(ids).astype(jnp.bfloat16), jnp.asarray(TOKENS)
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, oracle(), atol=0.05)


def test_names_in_templates():
    assert heads.fill_templates(["{}", "b"], ["a {}."]) == [["a {}."], ["a b."]]
    with pytest.raises(ValueError, match="found 0 and 1"):
        heads.fill_templates([], ["{}"])
    for bad in ("a cat", "{} {}"):
        with pytest.raises(ValueError, match="wanted one {}, found"):
            heads.fill_templates(["a"], [bad])


def test_shapes_are_checked():
    for shape in ((3, 5), (0, 2, 3)):
        with pytest.raises(ValueError, match="classes, templates, length"):
            heads.zero_shot_head(encode, jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match=r"makes \(\) of texts"):
        heads.zero_shot_head(lambda ids: jnp.ones(()), jnp.asarray(TOKENS))
