"""Do the eigenfunctions of the tangent kernel live on the inputs of one task?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree
from mtl_jax.transforms.linearize._ntk import empirical_ntk
from mtl_jax.transforms.linearize._taylor import ApplyFn


class Localisation(NamedTuple):
    """Spectrum of a kernel over the inputs of T tasks, and where it lives.

    Attributes:
      eigenvalues: [N], largest first.
      energy: [N, T], share of each eigenfunction's squared norm on the inputs of each
        task; rows sum to one.
      score: [], 0 when the energy of every eigenfunction is spread evenly over the
        tasks, 1 when every one lives on a single task; weighted by eigenvalue.
    """

    eigenvalues: chex.Array
    energy: chex.Array
    score: chex.Array


def kernel_localisation(kernel: chex.Array, sizes: Sequence[int]) -> Localisation:
    r"""Energy of the eigenfunctions of a kernel on the inputs of each task.

    The tasks share one input distribution mu, in equal parts: an input of a task with
    n_t inputs has mass m = 1 / (T n_t). Eigenfunctions of the integral operator
    f -> sum_x' k(., x') m(x') f(x') have values phi_r(x) = u_r(x) / sqrt(m(x)), with
    u_r the orthonormal eigenvectors of sqrt(m(x) m(x')) k(x, x'), so that

      energy[r, t] = sum_{x in task t} m(x) phi_r(x)^2 = sum_{x in task t} u_r(x)^2.

    Args:
      kernel: [N, N], inputs of the first task first, then of the second, ...
      sizes: number of inputs of each task; they sum to N.

    Returns:
      A `Localisation`; float32, or float64 for a float64 kernel.

    Raises:
      ValueError: if the sizes do not sum to N or a task has no inputs.

    >>> kernel_localisation(jnp.diag(jnp.array([2.0, 1.0])), [1, 1]).energy
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space":
    weight disentanglement from eigenfunctions localised on one task's
    inputs.

    **Differs**: equal mass per task, the energy share and the score are our reading;
    the paper states the condition and shows energies without one number. Eigenfunctions
    of equal eigenvalue may be rotated into each other, which mixes their energies.
    """
    sizes = [int(size) for size in sizes]
    total = sum(sizes)
    if min(sizes, default=0) < 1 or kernel.shape != (total, total):
        raise ValueError(
            f"kernel_localisation: wanted positive sizes that sum to the kernel's "
            f"[N, N], found sizes {sizes} and a kernel {kernel.shape}"
        )
    num_tasks = len(sizes)
    dtype = tree.wide_dtype(kernel.dtype)
    mass = np.repeat([1 / (num_tasks * size) for size in sizes], sizes)
    root = jnp.asarray(np.sqrt(mass), dtype)
    scaled = root[:, None] * kernel.astype(dtype) * root[None, :]
    values, vectors = jnp.linalg.eigh((scaled + scaled.T) / 2)
    owner = jax.nn.one_hot(
        np.repeat(np.arange(num_tasks), sizes), num_tasks, dtype=dtype
    )
    energy = jnp.matmul(jnp.square(vectors).T, owner, precision="highest")[::-1]
    values = values[::-1]
    weight = jnp.maximum(values, 0)
    even = 1 / num_tasks
    top = jnp.sum(weight * energy.max(1)) / jnp.maximum(weight.sum(), 1e-30)
    score = jnp.ones((), dtype) if num_tasks == 1 else (top - even) / (1 - even)
    return Localisation(values, energy, score)


def ntk_localisation(
    apply_fn: ApplyFn,
    params: chex.ArrayTree,
    task_inputs: Sequence[Any],
    *,
    trace_axes: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Localisation:
    """Localisation of the empirical tangent kernel on the union of task inputs.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> [N, ...]`, treating examples one by one.
      params: where the kernel is taken, usually the pre-trained weights.
      task_inputs: for each task its inputs, leaves [N_t, ...]; tuples hold several
        positional inputs.
      trace_axes: axes of the outputs to trace over; None traces all but the first.
      batch_size: outputs handled together, see `empirical_ntk`.

    Returns:
      A `Localisation` over N = sum_t N_t inputs; see `kernel_localisation`.

    Raises:
      ValueError: if there are no tasks, or the kernel keeps an axis.

    >>> f = lambda p, x: x @ p
    >>> inputs = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])]
    >>> ntk_localisation(f, jnp.ones((2, 1)), inputs).score
    Array(1., dtype=float32)

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space"; see
    `kernel_localisation`.
    """
    if not task_inputs:
        raise ValueError("ntk_localisation: no tasks in task_inputs")
    union = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *task_inputs)
    sizes = [jax.tree.leaves(inputs)[0].shape[0] for inputs in task_inputs]
    if trace_axes is None:
        inputs = union if isinstance(union, tuple) else (union,)
        trace_axes = range(1, jax.eval_shape(apply_fn, params, *inputs).ndim)
    kernel = empirical_ntk(
        apply_fn, params, union, trace_axes=tuple(trace_axes), batch_size=batch_size
    )
    return kernel_localisation(kernel, sizes)
