import jax
import pytest

from mtl_jax import zoo

pytestmark = pytest.mark.fast


def test_without_weights_parameters_are_shapes():
    encoder = zoo.clip(model="clip-vit-l/14")
    leaves = jax.tree.leaves(encoder.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert 303e6 < sum(leaf.size for leaf in leaves) < 305e6
    with pytest.raises(ValueError, match=r"suite\.options\.base\.weights"):
        zoo.require_weights(encoder, ["mnist", "svhn"])


def test_heads_come_from_a_file_of_class_embeddings():
    from mtl_jax import data

    encoder = zoo.clip(model="clip-vit-b/32")
    with pytest.raises(ValueError, match="'mnist' needs class embeddings"):
        encoder.prototypes(data.get("mnist"), {})
