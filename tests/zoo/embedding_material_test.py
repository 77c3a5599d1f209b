"""What families of embedding models start from, as far as it needs no download."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.zoo import embedding_material


@pytest.mark.fast
def test_features_are_means_over_what_is_there():
    outline = embedding_material.OUTLINES["minilm"](lower=5, length=5)
    assert [name for name in outline.params if "layers" in name] == ["layers_0"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), outline.params
    )
    hidden = rng.normal(size=(1, 5, 384)).repeat(2, 0)
    hidden[1, 3:] = 7.0
    mask = jnp.asarray([[1, 1, 1, 0, 0]] * 2, jnp.int32)
    texts = {"attention_mask": mask, "hidden": jnp.asarray(hidden, jnp.float32)}
    assert set(texts) == set(outline.batch(2))
    found = outline.features(params, texts)
    assert found.shape == (2, 384) and np.ptp(np.asarray(found)) > 0
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    whole = outline.features(params, {**texts, "attention_mask": jnp.ones_like(mask)})
    assert not np.allclose(found, whole, atol=1e-3)
    tokens = embedding_material.OUTLINES["minilm"](lower=0, length=5)
    assert tokens.batch(2)["input_ids"].shape == (2, 5)


def test_base_models_are_kept(quiet, monkeypatch):
    options = {"sizes": (4, 4), "probe": 4, "test": 4, "width": 16, "depth": 1}
    options |= {"seed": 0, "progress": quiet, "pretrain_steps": 2}
    first = embedding_material.invented(**options)
    monkeypatch.setattr(embedding_material, "_pretrainer", lambda *args: 1 / 0)
    again = embedding_material.invented(**options)
    jax.tree.map(np.testing.assert_array_equal, first.base, again.base)
    with pytest.raises(ZeroDivisionError):
        embedding_material.invented(**{**options, "seed": 1})
