"""Trust region merging against its definition, and where tasks do not collide."""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def oracle(flat, slopes, density, weights):
    count, length = flat.shape
    conflict = np.zeros(length)
    for i in range(count):
        for j in range(count):
            if i != j:
                conflict += np.abs(slopes[i]) * np.abs(flat[j])
    dropped = length - int(density * length + 1e-9)
    worst = np.argsort(-conflict, kind="stable")[:dropped]
    out = weights @ flat
    out[worst] = np.where(conflict[worst] > 0, 0, out[worst])
    return out


def draw(seed, count=3):
    """Small integers: products are exact, equal conflicts are common."""
    flat = np.random.default_rng(seed).integers(-3, 4, (count, 20)).astype(float)
    return flat, as_tree(flat)


def as_tree(flat):
    return {
        "a": jnp.asarray(flat[:, :12].reshape(-1, 3, 4), jnp.float32),
        "b": jnp.asarray(flat[:, 12:], jnp.float32),
    }


def ravel(delta):
    return np.concatenate([np.ravel(delta[k]) for k in "ab"])


@pytest.mark.parametrize("density", [0.0, 0.5, 0.95, 1.0])
@hypothesis.given(st.integers(0, 2**31 - 1), st.booleans())
@hypothesis.settings(max_examples=8)
def test_matches_the_definition(density, seed, with_grads):
    flat, taus = draw(seed)
    slopes, grads = draw(seed + 1) if with_grads else (flat, None)
    weights = np.array([1.0, 2.0, -1.0])
    got = merging.trust_region(taus, density=density, grads=grads, weights=weights)
    want = oracle(flat, slopes, density, weights)
    np.testing.assert_allclose(ravel(got), want, rtol=1e-6)


def test_leaves_by_themselves():
    flat, taus = draw(0)
    got = merging.trust_region(taus, density=0.7, scope="leaf")
    parts = [flat[:, :12], flat[:, 12:]]
    want = np.concatenate([oracle(p, p, 0.7, np.ones(3)) for p in parts])
    np.testing.assert_allclose(ravel(got), want, rtol=1e-6)


def test_tasks_that_do_not_collide_are_added_whole():
    flat, _ = draw(1)
    owner = np.random.default_rng(1).integers(0, 3, 20)
    flat = (flat + 0.1) * (owner == np.arange(3)[:, None])
    got = merging.trust_region(as_tree(flat), density=0.2)
    np.testing.assert_allclose(ravel(got), flat.sum(0), rtol=1e-6)
    one = merging.trust_region(as_tree(flat[:1]), density=0.2)
    np.testing.assert_allclose(ravel(one), flat[0], rtol=1e-6)
    zero = merging.trust_region(as_tree(0 * flat), density=0.2)
    assert not ravel(zero).any()


def test_order_dtypes_and_jit():
    _, taus = draw(2)
    base = ravel(merging.trust_region(taus, density=0.6))
    back = jax.tree.map(lambda x: 4 * x[::-1], taus)
    np.testing.assert_array_equal(
        ravel(merging.trust_region(back, density=0.6)), 4 * base
    )
    taus |= {
        "a": taus["a"].astype(jnp.bfloat16),
        "n": jnp.ones((3, 2), jnp.int32),
        "e": jnp.zeros((3, 0)),
        "s": jnp.ones(3),
    }
    got = jax.jit(lambda taus: merging.trust_region(taus, density=0.6))(taus)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(
        lambda v: (v.shape[1:], v.dtype), taus
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "trust_region: density is 1.5"),
        ({"scope": "row"}, "trust_region: scope is 'row'"),
        ({"grads": {"w": jnp.ones((2, 4))}}, r"trust_region: 'w' is \(2, 4\) in grads"),
        ({"grads": {"w": jnp.full((2, 3), jnp.inf)}}, "trust_region: grads: 'w' holds"),
    ],
)
def test_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        merging.trust_region({"w": jnp.ones((2, 3))}, **options)


ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np
from mtl_jax import merging
merge = lambda x, g: merging.trust_region(x, density=0.5, grads=g)
for seed, size in (1, 1000), (2, 4113), (10, 1000):
    x = {
        name: jnp.asarray(np.random.default_rng(s).standard_normal((5, n)), jnp.float32)
        for name, s, n in (("w", seed, size), ("v", seed + 99, 50))
    }
    grads = jax.tree.map(lambda v: 1.7 * v[::-1], x)
    once, again = merge(x, grads), jax.jit(merge)(x, grads)
    for name in x:
        np.testing.assert_array_equal(once[name] == 0, again[name] == 0)
"""


def test_conflicts_are_computed_once():
    # In one program sums may be contracted to fused multiply-adds, or not, each time
    # anew. So did jax 0.10.2 with these flags and one device.
    flags = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ONE_DEVICE], env=environment, check=True)
