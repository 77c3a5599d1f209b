"""DOP: each new task is weighed against those before it in both of their bases."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax._checks import number
from mtl_jax.transforms.aggregation import weights as aggregation
from mtl_jax.transforms.merging import _compose, _learning, _spectral

SPACES = ("uv", "u", "v")


def dop(
    taus: Any,
    *,
    steps: int = 200,
    learning_rate: float = 1e-4,
    energy: float = 0.99999,
    alpha: float = 0.8,
    beta: float = 0.999,
    spaces: str = "uv",
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    svd: _spectral.Svd = "svd",
    check_finite: bool = True,
) -> Any:
    r"""Merges tasks in order, near the merge so far and near the new one at once.

      L(X; Y) = |S U^T (X - Y)|^2 + |(X - Y) V S|^2        Y = U S V^T
      M_1 = tau_1,   M_t = argmin over X of a_1 L(X; M_(t-1)) + a_2 L(X; tau_t)

    by Adam from the mean of both. Every step the weights a move a little towards those
    of the shortest combination of both gradients (MGDA): a <- beta a + (1 - beta) a*.

    Args:
      taus: task tree, leaves [T, ...]; the order of the tasks counts.
      steps: of Adam, for every task after the first.
      learning_rate: of Adam, in units of the parameters.
      energy: share of the sum of the singular values whose directions take part, more
        than 0, up to 1.
      alpha: weight a_1 of the merge so far at the start, 0 to 1; a_2 is 1 - alpha.
      beta: 0 takes the MGDA weights as they are, 1 keeps alpha.
      spaces: "uv"; "u" or "v" leaves out the other term.
      weights: [T], ones by default; they multiply the task vectors.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become the
        weighted mean.
      svd: how singular vectors are found, "svd" or "gram".
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option outside of its range, weights that do not fit or sum to
        zero, or NaN or infinity.

    Follows: "Continual Model Merging without Data: Dual Projections for Balancing
      Stability and Plasticity" (NeurIPS 2025), with the defaults of FusionBench.
    Differs: FusionBench leaves out the direction with which the sum reaches `energy`.
      Its other parameters become pairwise means along the way, in which the last task
      weighs one half. Tasks are not shuffled.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])}
    >>> got = dop(taus, learning_rate=0.02, alpha=0.5)["w"]
    >>> bool((abs(got - taus["w"].sum(0)) < 0.01).all())
    True
    """
    del key
    name = "dop"
    _compose.choice(name, "svd", svd, _spectral.SVD)
    _compose.choice(name, "spaces", spaces, SPACES)
    values = {"energy": energy, "alpha": alpha, "beta": beta}
    for option, value in values.items():
        value = values[option] = number(name, option, value)
        if not 0 <= value <= 1 or option == "energy" and value == 0:
            raise ValueError(f"{name}: {option} is {value}, wanted 0 to 1")
    rate, steps = number(name, "learning_rate", learning_rate), operator.index(steps)
    if steps < 0 or not rate > 0:
        raise ValueError(
            f"{name}: steps is {steps} and learning_rate {rate}, wanted steps >= 0 and "
            "a positive rate"
        )
    return _spectral.merge(
        name,
        taus,
        weights,
        matrices,
        _merge,
        (steps, rate, *values.values(), spaces, svd),
        check_finite=check_finite,
    )


def _merge(x, steps, rate, energy, alpha, beta, spaces, svd):
    """[T, B, m, n] -> [B, m, n]."""
    optimizer = optax.adam(rate)

    def join(old, new):
        pair = jnp.stack([old, new])
        slopes = _slopes(pair, energy, spaces, svd)

        def step(carry, _):
            merged, shares, state = carry
            losses, grads = slopes(merged)
            shares = beta * shares + (1 - beta) * _balance(losses, grads)
            total = (shares[..., None, None] * grads).sum(0)
            merged, state = _learning.descend(optimizer, total, state, merged)
            return (merged, shares, state), None

        start = pair.mean(0)
        shares = jnp.stack([jnp.full(start.shape[0], a) for a in (alpha, 1 - alpha)])
        carry = start, shares.astype(start.dtype), optimizer.init(start)
        return jax.lax.scan(step, carry, length=steps)[0][0], None

    return jax.lax.scan(join, x[0], x[1:])[0]


def _slopes(pair, energy, spaces, svd):
    """A function of the merge: distances to a pair [2, B], gradients [2, B, m, n]."""
    u, s, vt = _spectral.svd(pair, method=svd)
    lead = jnp.cumsum(s, -1) - s < energy * s.sum(-1, keepdims=True)
    squares = jnp.where(lead, s * s, 0)
    left, right = u * squares[..., None, :], squares[..., None] * vt
    # Of the smaller side one matrix does the work of two.
    small = u.shape[-2] <= u.shape[-1], vt.shape[-1] <= vt.shape[-2]
    left = _spectral.matmul(left, _spectral.transpose(u)) if small[0] else left
    right = _spectral.matmul(_spectral.transpose(vt), right) if small[1] else right

    def slopes(merged):
        gap, pulled = merged[None] - pair, jnp.zeros_like(pair)
        if "u" in spaces:
            inside = gap if small[0] else _spectral.matmul(_spectral.transpose(u), gap)
            pulled += _spectral.matmul(left, inside)
        if "v" in spaces:
            inside = gap if small[1] else _spectral.matmul(gap, _spectral.transpose(vt))
            pulled += _spectral.matmul(inside, right)
        return (gap * pulled).sum((-2, -1)), 2 * pulled

    return slopes


def _balance(losses, grads):
    """[2, B] weights of the shortest combination of the gradients over their losses."""
    top = jnp.abs(grads).max((0, 2, 3), keepdims=True)
    flat = (grads * _spectral.inverse(top)).reshape(*grads.shape[:2], -1)
    gram = jnp.einsum("ibp,jbp->bij", flat, flat, precision="highest")
    weigh = jax.vmap(lambda g, v: aggregation.mgda(g, v, normalize="loss"))
    return weigh(gram.astype(jnp.float32), losses.T).T.astype(grads.dtype)
