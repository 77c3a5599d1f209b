"""Decompositions of stacked matrices."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import _lapack

MANY = """
import os, sys
import jax, jax.numpy as jnp
from mtl_jax._lapack import stacked

size, *names = sys.argv[1:]
x = jax.random.normal(jax.random.key(0), (8, int(size), int(size)))
x = jnp.matmul(x, x.swapaxes(1, 2)) + 160 * jnp.eye(int(size))


@jax.jit
def step(x):
    count = 2 * os.cpu_count()
    return [[stacked(getattr(jnp.linalg, n), i * x) for i in range(1, count)]
            for n in names]


for _ in range(5):
    jax.block_until_ready(step(x))
"""


PARETO = """
import jax, jax.numpy as jnp
from mtl_jax import routing

x = jax.random.normal(jax.random.key(0), (6, 9))
losses, ray = jnp.arange(1.0, 7), jnp.full(6, 1 / 6)


@jax.jit
def step(x):
    grams = [jnp.matmul(x, x.T) + i for i in range(6)]
    return [routing.epo_weights(gram, losses, ray) for gram in grams]


for _ in range(5):
    jax.block_until_ready(step(x))
"""


def positive(*shape):
    x = jax.random.normal(jax.random.key(0), shape)
    eye = jnp.broadcast_to(jnp.eye(shape[-1]), shape)
    return jnp.matmul(x, jnp.swapaxes(x, -1, -2)) + eye


@pytest.fixture(params=[(False, 128), (True, 128), (False, 4), (True, 4)])
def ways(request, monkeypatch):
    """All at once, in a loop, and a call for each."""
    waits, size = request.param
    monkeypatch.setattr(_lapack, "_WAITS", waits)
    monkeypatch.setattr(_lapack, "_SIZE", size)


@pytest.mark.parametrize("name", ["cholesky", "eigh", "eigvalsh", "qr", "svd"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_each_matrix_by_itself(ways, name, lead):
    x, fn = positive(*lead, 4, 4), getattr(jnp.linalg, name)
    found = jax.jit(lambda x: _lapack.stacked(fn, x))(x)
    chex.assert_trees_all_close(found, fn(x), atol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(fn(x))


def test_two_operands(ways):
    factor = jnp.linalg.cholesky(positive(2, 3, 4, 4))
    target = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    solve = lambda f, t: jax.scipy.linalg.cho_solve((f, True), t)  # noqa: E731
    found = _lapack.stacked(solve, factor, target)
    wide = np.asarray(factor, np.float64)
    wanted = np.linalg.solve(wide @ wide.swapaxes(-1, -2), np.asarray(target))
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)


def test_derivatives_and_vmap(ways):
    x = positive(2, 3, 4, 4)

    def loss(fn):
        return lambda x: jnp.sum(jnp.sin(fn(x)))

    plain, mine = jnp.linalg.cholesky, lambda x: _lapack.stacked(jnp.linalg.cholesky, x)
    for change in (jax.grad, lambda f: jax.vmap(jax.grad(f))):
        chex.assert_trees_all_close(
            change(loss(mine))(x), change(loss(plain))(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("code", "names"),
    [
        (MANY, ("160", "eigh")),
        (MANY, ("160", "qr")),
        (MANY, ("160", "svd")),
        (MANY, ("160", "cholesky", "eigh")),
        (MANY, ("120", "cholesky", "eigh")),
        (PARETO, ()),
    ],
)
def test_many_independent_stacks_return(code, names):
    # jaxlib 0.10.2 waits for ever where these are called with stacks.
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *names]
    subprocess.run(command, env=os.environ | flags, check=True, timeout=200)
