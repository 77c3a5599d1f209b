import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import layers

IDS = np.array([[3, 1, 4, 1, 5, 9, 2]], np.int32)


def tiny(**options):
    sizes = {"vocab_size": 16, "width": 8, "depth": 2, "mlp_dim": 12}
    return models.Decoder(num_heads=2, num_kv_heads=1, **sizes, **options)


def products(fill, **options):
    """Matrix products in the program of a gradient that leaves the model frozen."""
    module = tiny(**options)
    params = fill(tiny(), IDS)
    params = models.stack_layers(params) if module.scan else params

    def loss(shift):
        edited = {
            **params,
            "embeddings": jax.tree.map(lambda x: x + shift, params["embeddings"]),
        }
        return jnp.sum(module.apply({"params": edited}, IDS, head=False) ** 2)

    return str(jax.make_jaxpr(jax.grad(loss))(0.0)).count("dot_general[")


@pytest.mark.parametrize("scan", [False, True])
def test_products_are_kept_and_attention_weights_are_not(fill, scan):
    blocks = 1 if scan else 2
    # Seven layers forward and back, attention two forward and four back.
    plain = products(fill, scan=scan)
    assert plain == blocks * (2 * 7 + 2 + 4)
    assert products(fill, scan=scan, remat="products") == plain + blocks * 1
    # The layer `out` of the feed-forward block is not needed again.
    assert products(fill, scan=scan, remat=True) == plain + blocks * (6 + 2)


@pytest.mark.fast
def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"remat must be one of .*, is 'dots'"):
        layers.rematerialised(lambda x: x, "dots")
    with pytest.raises(ValueError, match="is 'Products'"):
        jax.eval_shape(
            lambda: tiny(remat="Products").init(jax.random.key(0), jnp.array(IDS))
        )


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_keep_products_too(fill, kind):
    if kind == "bert":
        sizes = {"vocab_size": 16, "width": 8, "depth": 2, "num_heads": 2}
        make = lambda **o: models.Bert(**sizes, mlp_dim=12, **o)  # noqa: E731
        x = IDS
    else:
        sizes = {
            "image_size": 8,
            "patch_size": 4,
            "width": 8,
            "depth": 2,
            "num_heads": 2,
        }
        make = lambda **o: models.ViT(**sizes, mlp_dim=12, **o)  # noqa: E731
        x = np.ones((1, 8, 8, 3), np.float32)
    params = fill(make(), x)

    def gradient(**options):
        def loss(p):
            out = make(**options).apply({"params": p}, x)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))

        return jax.grad(loss)

    def count(**options):
        return str(jax.make_jaxpr(gradient(**options))(params)).count("dot_general[")

    # Of each of two blocks, one product of attention; or that and five layers more.
    assert count(remat="products") == count() + 2
    assert count(remat=True) >= count() + 2 * 6
    want, got = (jax.jit(gradient(**o))(params) for o in ({}, {"remat": "products"}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
