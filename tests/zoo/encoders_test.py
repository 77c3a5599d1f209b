import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import data, zoo
from mtl_jax.data import packages, wheels
from mtl_jax.models import heads


@pytest.mark.fast
def test_class_means_are_unit_means_of_unit_features():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 5)), rng.integers(0, 3, 12)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    want = np.stack([unit[labels == c].sum(0) for c in range(3)])
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    got = zoo.class_means(jnp.asarray(features, jnp.float32), jnp.asarray(labels), 3)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.fast
def test_class_means_refuse_a_class_without_features():
    with pytest.raises(ValueError, match=r"found none of \[1\]"):
        zoo.class_means(jnp.ones((2, 2)), jnp.zeros(2, jnp.int32), 2)


@pytest.mark.fast
def test_class_means_refuse_other_shapes():
    with pytest.raises(ValueError, match="class_means: wanted features"):
        zoo.class_means(jnp.ones((4, 2)), jnp.zeros(3, jnp.int32), 2)


@pytest.mark.skipif(
    not wheels.is_cached(packages.MINILM), reason="MiniLM is not in the package cache"
)
def test_minilm_heads_know_positive_from_negative():
    encoder = zoo.minilm(max_length=24)
    task = data.get("sentiment_movie")
    prototypes = encoder.prototypes(task, {})
    assert prototypes.shape == (2, 384)
    texts = ["a wonderful and touching story", "the worst film of the year"]
    tokens = data.Tokenize(data.minilm_tokenizer(), 24).texts(texts)
    found = jax.jit(encoder.features)(encoder.params, tokens)
    scores = heads.l2_normalize(found) @ prototypes.T
    negative, positive = 0, 1
    leaning = scores[:, positive] - scores[:, negative]
    assert leaning[0] > leaning[1]
    trained, frozen = encoder.split(encoder.params)
    assert "embeddings" in frozen and jax.tree.leaves(trained["embeddings"]) == []
