import jax
import jax.numpy as jnp
import pytest

from mtl_jax import models


@pytest.mark.parametrize("name", models.names())
def test_every_name_builds_abstractly(name):
    module = models.build(name, **({"features": [4]} if name == "mlp" else {}))
    more = ()
    if isinstance(module, models.Decoder):
        module = module.clone(scan=True)  # Tracing 80 layers one by one takes long.
        example = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    elif isinstance(module, models.Clip):
        example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        more = (jax.ShapeDtypeStruct((1, 4), jnp.int32),)
    elif isinstance(module, models.ClipText):
        example = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    elif isinstance(module, models.EncoderDecoder):
        module = module.clone(scan=True)
        example = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        more = (example,)
    elif isinstance(module, models.Bert | models.SentenceEncoder):
        example = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        more = (example,)
        if name.endswith("-top2"):
            example = jax.ShapeDtypeStruct((1, 4, 384), jnp.float32)
    elif isinstance(module, models.SmallConv):
        example = jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    elif isinstance(module, models.ViT):
        example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    else:
        example = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    assert jax.eval_shape(module.init, jax.random.key(0), example, *more)["params"]


@pytest.mark.fast
def test_plain_config_data_is_enough():
    module = models.build("mlp", features=[4, 2], dtype="bfloat16")
    assert module.features == (4, 2)
    assert module.dtype == jnp.bfloat16


@pytest.mark.fast
def test_sharding_rules_join_backbone_and_head():
    module, head = models.build("minilm-l6"), models.Classifier(2)
    rules = models.sharding_rules(module, head)
    assert rules == (
        *models.sharding_rules(module),
        *models.sharding_rules(head),
    )
    with pytest.raises(ValueError, match="none for LayerNorm, known: Bert, Class"):
        models.sharding_rules(models.layers.LayerNorm())


@pytest.mark.fast
def test_misses_list_what_exists():
    with pytest.raises(ValueError, match=r"no model 'vit-b/23' \(did you mean 'vit-b"):
        models.build("vit-b/23")
    with pytest.raises(ValueError, match="no option 'widht', known: .*width"):
        models.build("bert", widht=3)
    with pytest.raises(ValueError, match="'float17' is not a dtype"):
        models.build("bert", dtype="float17")
