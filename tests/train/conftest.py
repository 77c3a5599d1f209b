"""A small regression problem with noise drawn inside the loss."""

import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import train


@pytest.fixture(autouse=True)
def interrupts():
    """A shell's background jobs start with SIGINT ignored; tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _init(key):
    first, second = jax.random.split(key)
    return {
        "body": {
            "kernel": 0.3 * jax.random.normal(first, (4, 8)),
            "bias": jnp.zeros(8),
        },
        "head": {"kernel": 0.3 * jax.random.normal(second, (8, 2))},
        "scale": jnp.ones(4),
    }


def _loss(params, batch, key):
    x = batch["x"] * params["scale"][None]
    x = x + 0.01 * jax.random.normal(key, x.shape)
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None])
    error = hidden @ params["head"]["kernel"] - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def _noiseless(params, batch, key):
    del key
    x = batch["x"] * params["scale"][None]
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None])
    error = hidden @ params["head"]["kernel"] - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def _batch(step, size=16):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(size, 4)).astype(np.float32),
        "y": rng.normal(size=(size, 2)).astype(np.float32),
    }


def _trainable(**changes):
    options = {
        "init": _init,
        "loss_fn": _loss,
        "tx": optax.adamw(1e-2),
        "frozen": ("^scale$",),
    }
    return train.Trainable(**(options | changes))


@pytest.fixture(scope="session")
def toy():
    """`trainable(**changes)`, `batch(step)`, and the parts they are made of."""
    return types.SimpleNamespace(
        init=_init,
        loss=_loss,
        noiseless=_noiseless,
        batch=_batch,
        trainable=_trainable,
        batches=[_batch(step) for step in range(20)],
    )


@pytest.fixture(scope="session")
def one_device():
    return train.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def trainer(toy, one_device):
    """One compiled step shared by the tests that only run it."""
    return train.Trainer(toy.trainable(), mesh=one_device)


@pytest.fixture
def equal():
    """Asserts that two trees are equal bit for bit."""

    def check(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)

    return check
