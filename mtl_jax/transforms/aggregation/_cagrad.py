"""CAGrad, the best worst-case descent within reach of the average gradient."""

import chex
import jax.numpy as jnp

from mtl_jax.transforms.aggregation import _solvers
from mtl_jax.transforms.aggregation._base import (
    Aggregator,
    Rule,
    from_gramian,
    gram_of,
)
from mtl_jax.transforms.aggregation._cosine import cosine_gram, dot
from mtl_jax.transforms.aggregation._present import present_of, stand_ins

_RESCALE = (0, 1, 2)


def check(c: float, rescale: int) -> None:
    """Refuses settings outside the method.

    Raises:
      ValueError: `c` is negative, or `rescale` is unknown.
    """
    if not c >= 0:
        raise ValueError(f"cagrad: c is {c}, wanted a non-negative number")
    if rescale not in _RESCALE:
        raise ValueError(f"cagrad: rescale is {rescale!r}, wanted one of {_RESCALE}")


def weights(
    gram: chex.Array,
    c: float = 0.5,
    *,
    rescale: int = 0,
    present: chex.Array | None = None,
) -> chex.Array:
    r"""Weights of the direction whose worst inner product with a gradient is largest.

      max_d min_t <g_t, d>   such that   |d - g_0| <= c |g_0|,   g_0 = mean_t g_t

    In the dual, d = g_0 + sum_t x[t] g_t, and for one number mu

      x = argmin_{x >= 0} 1/2 x^T G x + (G 1 / T - mu)^T x,   x^T G x = c^2 |g_0|^2,

    so mu is raised until x is as long as it must be.

    Args:
      gram: [T, T], inner products of task gradients.
      c: radius of the search, in lengths of the average gradient.
      rescale: divides d by 1 (0), `1 + c^2` (1) or `1 + c` (2).
      present: bool [T], the tasks that there are; others get no weight, and none in the
        average. All by default.

    Returns:
      [T] float32, at least `1 / T` before rescaling, T the number of present tasks.

    Raises:
      ValueError: `gram` is not square, `c` is negative, or `rescale` is unknown.

    **Follows**: Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task
      Learning", eq. 4 and alg. 1; `rescale` as in the authors' code.
    **Differs**: solved exactly. Where some combination of the gradients vanishes, the
      paper's g_w / |g_w| has no meaning; here x stops before it runs off, so that d
      stays within the ball and does not vanish with it (TorchJD returns zero there).

    >>> [round(x, 3) for x in weights(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()]
    [0.75, 0.75]
    """
    check(c, rescale)
    gram = gram_of("cagrad", gram)
    largest = jnp.max(jnp.diag(gram))
    gram = gram / jnp.where(largest == 0, 1, largest)
    if present is None:
        shares, mean, place = 1 / len(gram), jnp.mean(gram, 1), None
        square = jnp.mean(mean)
    else:
        there = present_of("cagrad", present, len(gram))
        shares = there.astype(gram.dtype)
        shares = shares / jnp.maximum(jnp.sum(shares), 1)
        place = stand_ins(there)
        square = dot(shares, dot(gram, shares))
        mean = jnp.take(dot(gram, shares), place)
        gram = gram[place[:, None], place[None, :]]
    radius = c * jnp.sqrt(jnp.maximum(square, 0))
    cosines, _, inverse = cosine_gram("cagrad", gram)
    slope = jnp.where(inverse == 0, 1, inverse)
    x = _solvers.nonnegative_path(
        cosines, mean * inverse, slope, end=-jnp.inf, radius=radius
    )
    scale = (1, 1 / (1 + c**2), 1 / (1 + c))[rescale]
    more = x * inverse
    if place is not None:
        more = jnp.zeros_like(more).at[place].add(more)
    return (shares + more) * scale


def cagrad(c: float = 0.5, *, rescale: int = 0) -> Aggregator:
    """Aggregates by CAGrad; see `weights.cagrad`.

    Updates: leaves [T, ...] -> [...]. Takes `present` bool [T] where a batch may lack
    tasks.

    Args:
      c: radius of the search, in lengths of the average gradient.
      rescale: divides the update by 1 (0), `1 + c^2` (1) or `1 + c` (2).

    Raises:
      ValueError: `c` is negative, or `rescale` is unknown.

    >>> tx = cagrad(0.4)
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-0.5, 1.0]])}
    >>> updates, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> [round(x, 3) for x in updates["w"].tolist()]
    [0.426, 0.638]
    """
    check(c, rescale)

    def weigh(gram, state, *, present=None, **extra):
        del extra
        return weights(gram, c, rescale=rescale, present=present), state

    return from_gramian("cagrad", Rule(lambda: (), weigh, ("gram",)))
