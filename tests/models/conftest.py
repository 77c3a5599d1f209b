"""Parameters for model tests without compiling an initialiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _fill(module, *inputs):
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def leaf(x):
        return jnp.asarray(0.5 * rng.normal(size=x.shape) + 0.1, x.dtype)

    return jax.tree.map(leaf, like)


@pytest.fixture(scope="session")
def fill():
    """(module, *inputs) -> parameters, large and uneven so that every term shows."""
    return _fill
