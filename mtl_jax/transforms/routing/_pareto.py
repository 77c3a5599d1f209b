"""Pareto weight-ensembling: one model for every preference between tasks."""

import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.routing._routers import router
from mtl_jax.transforms.routing._upscale import gated

_MOST_TASKS = 8  # Vertices are tried one and all.


def pwe(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    r"""Applies an upscaled model whose routers look at a preference.

      g_m = router_m(r),   theta_m = theta_0 + sum_t g_m,t tau_m,t

    Args:
      apply_fn: `apply_fn(params, *inputs)`.

    Returns:
      `apply(routers, model, preference, *inputs)`: routers {name: see `init_router`,
      with width T}, model see `upscale`, preference [T] on the simplex. Gradients reach
      routers and preference. Learn them on `dirichlet_rays` by losses weighted with the
      ray, or with `epo_weights`.

    Follows: Tang et al. 2024, "Towards Efficient Pareto Set Approximation via Mixture
      of Experts Based Model Fusion".

    >>> from mtl_jax.transforms.routing import upscale
    >>> model = upscale(
    ...     {"w": jnp.zeros((1, 1))}, {"w": jnp.ones((2, 1, 1))}, {"all": "w"}
    ... )
    >>> routers = {"all": {"bias": jnp.zeros(2), "kernel": jnp.eye(2)}}
    >>> apply = pwe(lambda p, x: x @ p["w"])
    >>> apply(routers, model, jnp.array([0.25, 0.75]), jnp.ones((1, 1))).tolist()
    [[1.0]]
    """

    def apply(routers, model, preference, *inputs):
        model = jax.lax.stop_gradient(model)
        gates = {name: router(params, preference) for name, params in routers.items()}
        return apply_fn(gated(model, gates), *inputs)

    return apply


def dirichlet_rays(
    key: chex.PRNGKey, tasks: int, count: int, *, alpha: float = 1.0
) -> chex.Array:
    """Random preferences, one per step of training.

    Args:
      key: typed PRNG key.
      tasks: T.
      count: how many.
      alpha: concentration; below 1 rays lie near single tasks.

    Returns:
      [count, T] float32, rows on the simplex.

    Raises:
      ValueError: an alpha of 0 or less.

    >>> rays = dirichlet_rays(jax.random.key(0), 3, 5)
    >>> rays.shape, bool(jnp.allclose(rays.sum(1), 1.0))
    ((5, 3), True)
    """
    if not alpha > 0:
        raise ValueError(f"dirichlet_rays: alpha is {alpha}, wanted more than 0")
    return jax.random.dirichlet(key, jnp.full(tasks, alpha, jnp.float32), (count,))


def simplex_grid(tasks: int, points: int) -> np.ndarray:
    """Preferences at equal distances, to look at the whole front.

    Args:
      tasks: T.
      points: along each edge, at least 2.

    Returns:
      [N, T] float32, rows on the simplex in ascending order.

    Raises:
      ValueError: no task, or fewer than two points.

    >>> simplex_grid(2, 3).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    if tasks < 1 or points < 2:
        raise ValueError(
            f"simplex_grid: tasks is {tasks}, points {points}, wanted at least 1 and 2"
        )
    steps = points - 1
    inner = itertools.combinations_with_replacement(range(points), tasks - 1)
    cuts = np.array([(0, *cut, steps) for cut in inner])
    return (np.diff(cuts, axis=1) / steps).astype(np.float32)


def epo_weights(
    gram: chex.Array, losses: chex.Array, preference: chex.Array, *, eps: float = 1e-4
) -> chex.Array:
    r"""Weights of losses that lead to the Pareto optimum on a ray, exactly.

    With u = r l / sum(r l) and d = sum_t u_t log(T u_t), how far the losses are from
    the ray, and a = r (log(T u) - d):

      d > eps:  max w^T G a   over the simplex,  (G w)_j >= (G a)_j where (G a)_j <= 0,
                and (G w)_j >= 0 for the largest r_j l_j; (G w)_j >= 0 for all where no
                (G a)_j is positive
      else:     max sum(G w)  over the simplex,  G w >= 0,
                w^T G a >= min(0, max(G a))

    Args:
      gram: G, [T, T], inner products of task gradients.
      losses: [T], not negative.
      preference: r, [T], positive.
      eps: distance that counts as on the ray.

    Returns:
      [T] float32 on the simplex. The preference, divided by its sum, where the problem
      has no solution.

    Raises:
      ValueError: more than 8 tasks, or shapes that do not fit.

    Follows: Mahapatra and Rajan 2020, "Multi-Task Learning with User Preferences:
      Gradient Descent with Controlled Ascent in Pareto Optimization", as the released
      code solves it; there weights sum to T.
    Differs: the linear program is solved by trying its vertices, exactly and inside
      jit, which bounds the number of tasks.

    >>> w = epo_weights(jnp.eye(2), jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5]))
    >>> w.tolist()
    [1.0, 0.0]
    """
    count = losses.shape[0]
    shapes = (gram.shape, losses.shape, preference.shape)
    if shapes != ((count, count), (count,), (count,)) or not 1 <= count <= _MOST_TASKS:
        raise ValueError(
            f"epo_weights: gram, losses and preference are {shapes}, wanted [T, T], "
            f"[T] and [T] of at most {_MOST_TASKS} tasks"
        )
    gram, losses, ray = (x.astype(jnp.float32) for x in (gram, losses, preference))
    gram = gram / jnp.maximum(jnp.max(jnp.abs(gram)), jnp.finfo(jnp.float32).tiny)
    weighted = ray * losses
    share = weighted / jnp.maximum(weighted.sum(), jnp.finfo(jnp.float32).tiny)
    logs = jnp.log(jnp.maximum(count * share, 1e-12))
    off = jnp.sum(share * logs)
    pull = gram @ (ray * (logs - off))
    helps = pull > 0
    balance = jnp.where(helps, -jnp.inf, pull)
    balance = jnp.where(weighted >= weighted.max(), 0, balance)
    balance = jnp.where(helps.any(), balance, 0)
    lower = jnp.where(off > eps, balance, 0)
    goal = jnp.where(off > eps, pull, gram.sum(1))
    least = jnp.where(off > eps, -jnp.inf, jnp.minimum(pull.max(), 0))
    rows = jnp.concatenate([jnp.eye(count), gram, pull[None]])
    bounds = jnp.concatenate([jnp.zeros(count), lower, least[None]])
    found, solved = _best_vertex(goal, rows, bounds)
    return jnp.where(solved, found, ray / ray.sum())


def _best_vertex(goal, rows, bounds):
    """Where goal.w is largest, of w with sum 1 and rows w >= bounds; whether any is."""
    count = goal.shape[0]
    chosen = list(itertools.combinations(range(rows.shape[0]), count - 1))
    index = jnp.asarray(np.array(chosen, np.int32).reshape(len(chosen), count - 1))
    ones = jnp.ones((len(chosen), 1, count))
    systems = jnp.concatenate([rows[index], ones], 1)
    sides = jnp.concatenate([bounds[index], jnp.ones((len(chosen), 1))], 1)
    bounded = jnp.isfinite(sides).all(1)
    points, volumes = _solved(systems, jnp.where(bounded[:, None], sides, 0))
    known = bounded & (volumes > 1e-7)
    points = jnp.where(known[:, None], points, 0)
    slack = jnp.matmul(points, rows.T, precision="highest") - bounds[None]
    fits = known & (slack >= -1e-5).all(1)
    best = jnp.argmax(jnp.where(fits, points @ goal, -jnp.inf))
    point = jnp.maximum(points[best], 0)
    return point / point.sum(), fits.any()


def _solved(systems, sides):
    """Solutions [S, n] of systems [S, n, n], and the sizes of their determinants [S].

    Gauss and Jordan's elimination with row pivots, all systems at once: for a few
    unknowns quicker than LAPACK, whose calls of stacks may wait for ever: `_lapack`.
    """
    count = sides.shape[-1]
    rows = jnp.arange(count)[None, :, None]
    a = jnp.concatenate([systems, sides[..., None]], -1)
    volumes = jnp.ones_like(sides[:, 0])
    for i in range(count):
        pivot = i + jnp.argmax(jnp.abs(a[:, i:, i]), 1)[:, None, None]
        top = jnp.where(rows == pivot, a, 0).sum(1, keepdims=True)
        a = jnp.where(rows == pivot, a[:, i : i + 1], a)
        size = top[..., i : i + 1]
        volumes *= jnp.abs(size[:, 0, 0])
        top = top / jnp.where(size == 0, 1, size)
        a = jnp.where(rows == i, top, a - a[..., i : i + 1] * top)
    return a[..., -1], volumes
