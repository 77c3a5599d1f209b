"""WUDI: the merge whose difference to each task is invisible to that task's inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax._checks import number
from mtl_jax._lapack import stacked
from mtl_jax.transforms.merging import _compose, _learning, _spectral

SOLVERS = ("adam", "exact")


def wudi(
    taus: Any,
    *,
    steps: int = 300,
    learning_rate: float = 1e-5,
    solver: str = "adam",
    weights: Any = None,
    key: Any = None,
    matrices: _spectral.Matrices = None,
    layout: _spectral.Layout = "in_out",
    check_finite: bool = True,
) -> Any:
    r"""Learns every matrix of the merge from the task matrices alone.

      minimise over M  sum_t |(M - tau_t) tau_t^T|^2 / |tau_t|^2,  from M = sum_t tau_t

    for tau_t [out, in]: the rows of a task matrix span the inputs that it was trained
    on. With C_t = tau_t^T tau_t / |tau_t|^2 the gradient is 2 (M sum_t C_t -
    sum_t tau_t C_t): both sums are formed once, a step is one product of matrices.

    Args:
      taus: task tree, leaves [T, ...].
      steps: of Adam.
      learning_rate: of Adam, in units of the parameters.
      solver: "adam", the paper's; "exact", the minimum nearest to the start, without
        steps: the start and its least-squares correction.
      weights: [T], ones by default; they multiply the task vectors.
      key: unused; every merge takes one.
      matrices: which leaves are matrices; see `tsv_merge`. Other leaves become the
        weighted mean.
      layout: of the matrices, "in_out" as Flax has kernels, "out_in" as PyTorch.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.

    Raises:
      ValueError: an option that does not exist, weights that do not fit or sum to
        zero, or NaN or infinity.

    Follows: Cheng et al. 2025, "Whoever Started the Interference Should End It",
      equation of the loss per linear layer, 300 steps of Adam at 1e-5 as released.
    Differs: a task that is zero has no term, where the formula divides by zero. "exact"
      is ours, the limit of many steps; it leaves directions alone that hold less than
      1e-6 of the inputs' energy.

    >>> import jax.numpy as jnp
    >>> taus = {"w": jnp.array([[[4.0], [0.0]], [[0.0], [2.0]]])}
    >>> wudi(taus)["w"].tolist()
    [[4.0], [2.0]]
    """
    del key
    _compose.choice("wudi", "solver", solver, SOLVERS)
    rate = number("wudi", "learning_rate", learning_rate)
    if steps < 0 or not rate > 0:
        raise ValueError(
            f"wudi: steps is {steps} and learning_rate {rate}, wanted steps >= 0 and a "
            "positive rate"
        )
    return _spectral.merge(
        "wudi",
        taus,
        weights,
        matrices,
        _merge,
        (solver, int(steps), rate),
        layout=layout,
        check_finite=check_finite,
    )


def _merge(x, solver, steps, rate):
    """[T, B, m, n] -> [B, m, n]."""
    squares = _spectral.matmul(_spectral.transpose(x), x)
    energy = jnp.trace(squares, axis1=-2, axis2=-1)[..., None, None]
    squares = squares * _spectral.inverse(energy)
    inputs = squares.sum(0)
    start, target = x.sum(0), _spectral.matmul(x, squares).sum(0)
    if solver == "exact":
        values, vectors = stacked(jnp.linalg.eigh, inputs)
        real = values > 1e-6 * values[..., -1:]
        roots = jnp.where(real, _spectral.inverse(jnp.where(real, values, 0)), 0)
        error = _spectral.matmul(target - _spectral.matmul(start, inputs), vectors)
        return start + _spectral.matmul(
            error * roots[..., None, :], _spectral.transpose(vectors)
        )
    optimizer = optax.adam(rate)

    def step(carry, _):
        merged, state = carry
        slope = 2 * (_spectral.matmul(merged, inputs) - target)
        return _learning.descend(optimizer, slope, state, merged), None

    carry = start, optimizer.init(start)
    return jax.lax.scan(step, carry, length=steps)[0][0]
