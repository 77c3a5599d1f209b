"""Weight disentanglement: do task vectors act on their own inputs only?"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mtl_jax import tree

PredictFn = Callable[[chex.ArrayTree, Any], chex.Array]


def _labels(predictions: chex.Array) -> chex.Array:
    if jnp.issubdtype(predictions.dtype, jnp.integer):
        return predictions
    return jnp.argmax(predictions, axis=-1)


def _move(params0, tau_a, tau_b, scale_a, scale_b):
    """params0 + scale_a tau_a + scale_b tau_b, summed wide, cast once."""

    def leaf(p, a, b):
        if not tree.is_inexact(p):
            return p
        dtype = tree.wide_dtype(p.dtype)
        moved = p.astype(dtype) + scale_a.astype(dtype) * a.astype(dtype)
        return (moved + scale_b.astype(dtype) * b.astype(dtype)).astype(p.dtype)

    return jax.tree.map(leaf, params0, tau_a, tau_b)


def _mismatches(predict_fn: PredictFn, pairs: chex.Array, owner: int, count: int):
    """Jitted: how often the joint model and the owner's alone disagree, [A, A].

    Rows of `pairs`: A * A joint coefficients, then A of the owner's alone. All go
    through one loop body, so equal parameters give equal predictions bit for bit.
    """

    @jax.jit
    def run(params0, tau_a, tau_b, batch):
        def predict(pair):
            return _labels(predict_fn(_move(params0, tau_a, tau_b, *pair), batch))

        labels = jax.lax.map(predict, pairs)
        labels = labels.reshape(labels.shape[0], -1)
        joint = labels[: count * count].reshape(count, count, -1)
        alone = jnp.expand_dims(labels[count * count :], 1 - owner)
        return (joint != alone).sum(-1), joint.shape[-1]

    return run


def _error(predict_fn, params0, tau_a, tau_b, batches, alphas, owner):
    count = alphas.size
    first, second = np.meshgrid(alphas, alphas, indexing="ij")
    alone = np.stack([alphas, np.zeros_like(alphas)], axis=1)
    pairs = np.concatenate(
        [np.stack([first.ravel(), second.ravel()], 1), alone[:, :: -1 if owner else 1]]
    )
    run = _mismatches(predict_fn, jnp.asarray(pairs), owner, count)
    wrong, seen = np.zeros((count, count)), 0
    for batch in batches:
        more, rows = run(params0, tau_a, tau_b, batch)
        wrong += np.asarray(more)
        seen += int(rows)
    if not seen:
        raise ValueError(
            f"disentanglement_error: batches_{'ab'[owner]} holds no examples"
        )
    return wrong / seen


def disentanglement_error(
    predict_fn: PredictFn | tuple[PredictFn, PredictFn],
    params0: chex.ArrayTree,
    tau_a: chex.ArrayTree,
    tau_b: chex.ArrayTree,
    batches_a: Iterable[Any],
    batches_b: Iterable[Any],
    alphas: Sequence[float],
) -> np.ndarray:
    r"""Share of predictions that a second task vector changes, over a grid.

      xi[i, j] = P_{x in A}[h(x; p + a_i tau_a) != h(x; p + a_i tau_a + a_j tau_b)]
               + P_{x in B}[h(x; p + a_j tau_b) != h(x; p + a_i tau_a + a_j tau_b)]

    Args:
      predict_fn: `predict_fn(params, batch)` to scores [B, ..., C], of which the argmax
        is taken, or to integer labels. A pair gives one for each task, for models with
        a head per task. For the tangent model pass one built on `taylor1`.
      params0: the pre-trained weights p.
      tau_a: task vector of task A, tree like `params0`.
      tau_b: task vector of task B.
      batches_a: batches of inputs of task A; read once.
      batches_b: batches of inputs of task B; read once.
      alphas: [A] coefficients, used on both axes.

    Returns:
      float64 [A, A] in [0, 2]; rows follow the coefficient of `tau_a`.

    Raises:
      ValueError: if a task vector does not match `params0`, or there are no examples.

    >>> predict = lambda p, x: jnp.stack([x * p, 0 * x], -1)
    >>> x = [jnp.array([1.0, -1.0])]
    >>> disentanglement_error(
    ...     predict, jnp.array(1.0), jnp.array(0.5), jnp.array(-2.0), x, x, [0.0, 1.0]
    ... ).tolist()
    [[0.0, 1.0], [0.0, 1.0]]

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space",
    the disentanglement error.

    **Differs**: the paper's figure spans [-3, 3]^2; here the grid is the caller's.
    """
    for name, tau in (("tau_a", tau_a), ("tau_b", tau_b)):
        tree.check_match(
            "disentanglement_error",
            params0,
            tau,
            reference_name="params0",
            other_name=name,
        )
    grid = np.asarray(alphas, np.float32)
    if grid.ndim != 1 or not grid.size:
        raise ValueError(
            f"disentanglement_error: alphas must be [A], found {grid.shape}"
        )
    first, second = (
        predict_fn if isinstance(predict_fn, tuple) else (predict_fn, predict_fn)
    )
    params0, tau_a, tau_b = jax.tree.map(jnp.asarray, (params0, tau_a, tau_b))
    return _error(first, params0, tau_a, tau_b, batches_a, grid, 0) + _error(
        second, params0, tau_a, tau_b, batches_b, grid, 1
    )


def nonlinear_advantage(
    accuracy_nonlinear: chex.Numeric,
    accuracy_linear: chex.Numeric,
    num_classes: chex.Numeric,
) -> chex.Numeric:
    """What non-linear fine-tuning gains over the tangent model, chance removed.

      (accuracy_nonlinear - accuracy_linear) / (1 - 1 / num_classes)

    Args:
      accuracy_nonlinear: accuracy in [0, 1] of ordinary fine-tuning, any shape.
      accuracy_linear: accuracy of linear fine-tuning.
      num_classes: number of classes C, at least 2.

    Returns:
      The advantage, of the broadcast shape.

    Raises:
      ValueError: if a concrete `num_classes` is below 2.

    >>> nonlinear_advantage(0.9, 0.8, 2)
    0.19999999999999996

    **Follows**: Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space",
    the non-linear advantage.
    """
    if not isinstance(num_classes, jax.core.Tracer) and np.any(
        np.asarray(num_classes) < 2
    ):
        raise ValueError(
            f"nonlinear_advantage: num_classes is {num_classes}, wanted at least 2"
        )
    return (accuracy_nonlinear - accuracy_linear) / (1 - 1 / num_classes)
