"""Views of inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.zoo import views

pytestmark = pytest.mark.fast
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (64, 50)), jnp.float32)


def test_noise_has_the_size_that_was_asked_for():
    found = views.perturb({"inputs": X, "label": jnp.arange(64)}, KEY, 0.5)
    noise = np.asarray(found["inputs"] - X)
    assert abs(noise.std() - 0.5 * float(X.std())) < 0.1
    assert abs(noise.mean()) < 0.1
    np.testing.assert_array_equal(found["label"], np.arange(64))


def test_nothing_changes_at_strength_zero():
    mask = jnp.ones((4, 6), jnp.int32)
    found = views.perturb({"inputs": X, "attention_mask": mask}, KEY, 0.0)
    np.testing.assert_array_equal(found["inputs"], X)
    np.testing.assert_array_equal(found["attention_mask"], mask)


def test_tokens_are_dropped_but_the_first():
    mask = jnp.ones((200, 10), jnp.int32).at[:, 8:].set(0)
    rows = {"attention_mask": mask, "input_ids": mask * 7}
    found = jax.jit(views.perturb)(rows, KEY, 0.3)
    kept = np.asarray(found["attention_mask"])
    assert kept[:, 0].all() and not kept[:, 8:].any()
    assert abs(kept[:, 1:8].mean() - 0.7) < 0.05
    np.testing.assert_array_equal(found["input_ids"], rows["input_ids"])
