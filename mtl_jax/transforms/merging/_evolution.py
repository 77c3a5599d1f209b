"""CMA-ES: what a merge depends on, by scores alone."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax._checks import number
from mtl_jax.transforms.merging import _compose, _spectral


class CmaEsState(NamedTuple):
    """Where a search is.

    Attributes:
      mean: [n] float32, centre of the next candidates.
      sigma: [], size of steps.
      cov: [n, n], shape of the distribution.
      path_sigma: [n], evolution path of the size.
      path_cov: [n], evolution path of the shape.
      generation: [] int32.
      best: [n], the best candidate so far; the start before there is one.
      best_loss: [], its loss; infinity before there is one.
    """

    mean: chex.Array
    sigma: chex.Array
    cov: chex.Array
    path_sigma: chex.Array
    path_cov: chex.Array
    generation: chex.Array
    best: chex.Array
    best_loss: chex.Array


class CmaEs(NamedTuple):
    """A search in three pure functions, and how many candidates it has at a time.

    Attributes:
      init: `init() -> state`.
      ask: `ask(key, state) -> candidates`, tree with leaves [P, ...].
      tell: `tell(state, candidates, losses) -> state`, losses [P]; NaN is as infinity.
      best: `best(state) -> variables`, the best candidate so far.
      population: P.
    """

    init: Callable[[], CmaEsState]
    ask: Callable[[chex.PRNGKey, CmaEsState], Any]
    tell: Callable[[CmaEsState, Any, Any], CmaEsState]
    best: Callable[[CmaEsState], Any]
    population: int


class _Constants(NamedTuple):
    """Of a dimension and a population: Hansen 2016, table 1."""

    weights: np.ndarray
    mass: float
    c_sigma: float
    damping: float
    c_cov: float
    c_one: float
    c_mu: float
    length: float


def cma_es(start: Any, *, std: float = 1 / 6, population: int | None = None) -> CmaEs:
    r"""Covariance matrix adaptation: minimises a function of which no slope is known.

      x_i = m + sigma N(0, C),   m <- sum_i w_i x_i   of the best half,
      C <- rank one of the path of m, and of all steps, bad ones with negative weights

    Made for up to some hundred numbers: strengths and densities of rules by groups of
    layers, not weights. In float32; a generation costs an eigendecomposition of [n, n].

    Args:
      start: tree of float variables, the first centre, such as a coefficient of each
        task and group of layers.
      std: of the first candidates around it.
      population: P, at least 2; None for 4 + floor(3 ln n).

    Returns:
      A `CmaEs`. Candidates are functions of key and state alone, and `tell` of their
      order, not of the size of losses. All three work inside jit, and `tell` wants the
      candidates that `ask` gave.

    Raises:
      ValueError: no variables, or integers; a population below 2, a std that is not
        positive, or NaN or infinity.

    Follows: Hansen 2016, "The CMA Evolution Strategy: A Tutorial", with active
      covariance updates and the default parameters there. Akiba et al. 2024,
      "Evolutionary Optimization of Model Merging Recipes", searches merges so; the std
      is that of mergekit.
    Differs: no bounds and no restarts: map bounded numbers through a sigmoid.

    >>> search = cma_es({"x": jnp.array([1.0, -2.0])}, std=0.5)
    >>> state = search.init()
    >>> for key in jax.random.split(jax.random.key(0), 60):
    ...     x = search.ask(key, state)
    ...     state = search.tell(state, x, ((x["x"] - 3.0) ** 2).sum(1))
    >>> search.best(state)["x"].round(2).tolist()
    [3.0, 3.0]
    """
    start, size, population = _checked(start, std, population)
    constants = _constants(size, population)

    def init():
        mean = _flat(start)
        zero = jnp.zeros_like(mean)
        return CmaEsState(
            mean=mean,
            sigma=jnp.float32(std),
            cov=jnp.eye(size, dtype=jnp.float32),
            path_sigma=zero,
            path_cov=zero,
            generation=jnp.int32(0),
            best=mean,
            best_loss=jnp.float32(jnp.inf),
        )

    def restore(x):
        leaves, treedef = jax.tree.flatten(start)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = zip(jnp.split(x, ends), leaves, strict=True)
        return treedef.unflatten(
            [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in parts]
        )

    def ask(key, state):
        basis, scales, _ = _axes(state.cov)
        noise = jax.random.normal(key, (population, size), jnp.float32)
        steps = _spectral.matmul(noise * scales[None], basis.T)
        return jax.vmap(restore)(state.mean[None] + state.sigma * steps)

    def tell(state, candidates, losses):
        losses = jnp.asarray(losses)
        tree.check_match(
            "cma_es: tell",
            jax.eval_shape(jax.vmap(restore), jnp.zeros((population, size))),
            candidates,
            reference_name="what ask gives",
            other_name="candidates",
        )
        if losses.shape != (population,):
            raise ValueError(
                f"cma_es: tell: losses are {losses.shape}, wanted ({population},)"
            )
        losses = losses.astype(jnp.float32)
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        return _tell(constants, state, jax.vmap(_flat)(candidates), losses)

    return CmaEs(init, ask, tell, lambda state: restore(state.best), population)


def _checked(start, std, population):
    """The start as arrays, how many numbers it has, and how many candidates."""
    for name, leaf in zip(tree.paths(start), jax.tree.leaves(start), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"cma_es: {name!r} is {jnp.result_type(leaf)}, wanted a float"
            )
    tree.check_finite("cma_es", start)
    start = jax.tree.map(jnp.asarray, start)
    size = tree.size(start)
    if not size:
        raise ValueError("cma_es: start has no variables")
    if not 0 < number("cma_es", "std", std) < math.inf:
        raise ValueError(f"cma_es: std is {std}, wanted above 0")
    if population is None:
        population = 4 + math.floor(3 * math.log(size))
    _compose.check_index("cma_es", "population", population)
    if population < 2:
        raise ValueError(f"cma_es: population is {population}, wanted at least 2")
    return start, size, population


def _flat(variables):
    """[n] float32; a copy of the few numbers that are searched."""
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(variables)]
    return jnp.concatenate(leaves)


@functools.cache
def _constants(size: int, population: int) -> _Constants:
    """Learning rates and weights, positive ones first."""
    raw = math.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
    half = population // 2
    good, bad = raw[:half], raw[half:]
    mass = good.sum() ** 2 / (good**2).sum()
    bad_mass = bad.sum() ** 2 / (bad**2).sum() if (bad**2).sum() else 0.0
    c_sigma = (mass + 2) / (size + mass + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + c_sigma
    c_cov = (4 + mass / size) / (size + 4 + 2 * mass / size)
    c_one = 2 / ((size + 1.3) ** 2 + mass)
    c_mu = min(1 - c_one, 2 * (0.25 + mass + 1 / mass - 2) / ((size + 2) ** 2 + mass))
    least = min(
        1 + c_one / c_mu,
        1 + 2 * bad_mass / (mass + 2),
        (1 - c_one - c_mu) / (size * c_mu),
    )
    total = -bad.sum()
    weights = np.concatenate(
        [good / good.sum(), bad * (max(least, 0.0) / total) if total else bad]
    )
    length = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
    return _Constants(weights, mass, c_sigma, damping, c_cov, c_one, c_mu, length)


def _axes(cov):
    """Eigenvectors, roots of eigenvalues, and their inverses."""
    values, basis = jnp.linalg.eigh(cov)
    tiny = jnp.finfo(cov.dtype).eps * jnp.maximum(values[-1], 0)
    scales = jnp.sqrt(jnp.maximum(values, jnp.maximum(tiny, 1e-30)))
    return basis, scales, 1 / scales


def _tell(c: _Constants, state: CmaEsState, rows, losses) -> CmaEsState:
    size, half = state.mean.size, len(losses) // 2
    order = jnp.argsort(losses)
    first = order[0]
    steps = (rows[order] - state.mean[None]) / state.sigma
    weights = jnp.asarray(c.weights, jnp.float32)
    move = _spectral.matmul(weights[None, :half], steps[:half])[0]
    basis, _, inverses = _axes(state.cov)
    white = _spectral.matmul(steps, basis) * inverses[None]
    along = _spectral.matmul(weights[None, :half], white[:half])
    along = _spectral.matmul(along, basis.T)[0]
    path_sigma = (1 - c.c_sigma) * state.path_sigma + (
        math.sqrt(c.c_sigma * (2 - c.c_sigma) * c.mass) * along
    )
    norm = jnp.linalg.norm(path_sigma)
    turn = (state.generation + 1).astype(jnp.float32)
    grown = jnp.sqrt(-jnp.expm1(2 * turn * math.log1p(-c.c_sigma)))
    calm = (norm / grown < (1.4 + 2 / (size + 1)) * c.length).astype(jnp.float32)
    path_cov = (1 - c.c_cov) * state.path_cov + (
        calm * math.sqrt(c.c_cov * (2 - c.c_cov) * c.mass) * move
    )
    lengths = jnp.maximum(jnp.sum(white * white, 1), jnp.finfo(jnp.float32).tiny)
    signed = jnp.where(weights >= 0, weights, weights * size / lengths)
    missing = (1 - calm) * c.c_cov * (2 - c.c_cov)
    kept = 1 + c.c_one * missing - c.c_one - c.c_mu * float(c.weights.sum())
    cov = kept * state.cov + c.c_one * jnp.outer(path_cov, path_cov)
    cov += c.c_mu * _spectral.matmul(steps.T * signed[None], steps)
    speed = c.c_sigma / c.damping * (norm / c.length - 1)
    better = losses[first] < state.best_loss
    return CmaEsState(
        mean=state.mean + state.sigma * move,
        sigma=state.sigma * jnp.exp(jnp.minimum(speed, 1.0)),
        cov=(cov + cov.T) / 2,
        path_sigma=path_sigma,
        path_cov=path_cov,
        generation=state.generation + 1,
        best=jnp.where(better, rows[first], state.best),
        best_loss=jnp.where(better, losses[first], state.best_loss),
    )
