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


@pytest.mark.parametrize("use_bias", [False, True])
def test_gated_block_is_the_formula(use_bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    module = layers.GatedFeedForward(6, "silu", use_bias=use_bias)
    like = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), like)
    assert ("bias" in params["gate"]) == use_bias

    def dense(name, y):
        return y @ params[name]["kernel"] + params[name].get("bias", 0)

    gate = dense("gate", x.astype(np.float64))
    want = dense("out", gate / (1 + np.exp(-gate)) * dense("in", x))
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-5)


def test_plain_block_may_go_without_biases():
    x = jnp.ones((1, 4))
    module = layers.FeedForward(6, use_bias=False)
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "in": {"kernel": (4, 6)},
        "out": {"kernel": (6, 4)},
    }
