import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models import layers

pytestmark = pytest.mark.fast

X = np.linspace(-4, 4, 17)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("gelu", [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in X]),
        (
            "gelu_tanh",
            0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
        ),
        ("quick_gelu", X / (1 + np.exp(-1.702 * X))),
        ("relu", np.maximum(X, 0)),
        ("silu", X / (1 + np.exp(-X))),
        ("tanh", np.tanh(X)),
    ],
)
def test_activations_are_what_their_names_say(name, want):
    got = layers.activation(name)(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match="no 'gleu'.*gelu.*tanh"):
        layers.activation("gleu")


def test_two_dense_layers_around_the_activation():
    x = jnp.array([[1.0, -2.0]])
    module = layers.FeedForward(hidden=3, activation="relu")
    variables = module.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables["params"])
    hidden = np.maximum(np.asarray(x) @ p["in"]["kernel"] + p["in"]["bias"], 0)
    want = hidden @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-6)
