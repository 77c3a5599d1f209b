"""Reversible model merging: a small basis from which every adapter is rebuilt."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.merging import _compose, _spectral


class RmmBank(NamedTuple):
    """Shared means and bases of T adapters, and the coefficients of each.

    Every row of `a` and every column of `b` is a vector of r numbers; adapters that are
    restored consist of mean + basis @ coefficients.

    Attributes:
      mean: an adapter, {"a": [..., in, r], "b": [..., r, out]}.
      basis: {"a": [..., in, r, p], "b": [..., out, r, p]}, orthonormal columns, or
        zeros where the tasks do not need them.
      coefficients: {"a": [T, ..., in, p], "b": [T, ..., out, p]}.
    """

    mean: Any
    basis: Any
    coefficients: Any


def rmm_basis(
    loras: Sequence[Any],
    p: int,
    *,
    svd: _spectral.Svd = "svd",
    check_finite: bool = True,
) -> RmmBank:
    r"""Fits the closed-form basis of p vectors at every position of the factors.

      minimise sum_t |x_t - mu - W c_t|^2   over mu, W [r, p] with W^T W = I, and c_t
      mu = mean of x_t,   W = leading left singular vectors of [x_1 - mu ... x_T - mu]
      c_t = W^T (x_t - mu)

    for x_t [r] the row of `a`, or the column of `b`, that task t has at the position.

    Args:
      loras: T adapters of the same leaves, {"a": [..., in, r], "b": [..., r, out]}.
        Smaller ranks are padded with zeros to the largest of the leaf.
      p: vectors of the basis, 0 or more; 0 keeps the means, min(r, T - 1) everything,
        and more are stored as zeros.
      svd: how W is found: "svd", or "gram", faster, from the smaller Gramian; vectors
        that matter less than 3e-4 of the first (float32) are then not orthogonal.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      `RmmBank` in the dtypes of the first adapter; fitted in float32.

    Raises:
      ValueError: no adapters, adapters of different leaves, a p below 0, or NaN or
        infinity.

    Follows: "Towards Reversible Model Merging For Low-rank Weights" (2025), the
      closed-form basis and coefficients.
    Differs: the paper was read in secondary sources only. No gauge is aligned: adapters
      that were not trained from one common initial `a` share little.

    >>> import jax.numpy as jnp
    >>> first = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> second = {"w": {"a": jnp.zeros((2, 1)), "b": jnp.ones((1, 2))}}
    >>> bank = rmm_basis([first, second], 1)
    >>> rmm_restore(bank, 0)["w"]["a"].round(4).tolist()
    [[1.0], [1.0]]
    """
    _compose.choice("rmm_basis", "svd", svd, _spectral.SVD)
    if p < 0:
        raise ValueError(f"rmm_basis: p is {p}, wanted 0 or more")
    loras = list(loras)
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"rmm_basis: adapter {t}", each)
    bank = lora.stack(_padded(loras))
    parts = jax.tree.map(lambda x: _fit(x, p, svd), _turn(bank))
    mean, basis, coefficients = (
        jax.tree.map(lambda _, x, i=i: x[i], bank, parts) for i in range(3)
    )
    return RmmBank(_turn(mean), basis, coefficients)


def rmm_restore(bank: RmmBank, task: Any) -> Any:
    """The adapter of one task, rebuilt: mean + basis @ coefficients.

    Args:
      bank: of `rmm_basis`.
      task: index of the task, a Python integer or a traced one.

    Returns:
      An adapter of the rank of the bank, scale as that of the adapters it was made of.

    Raises:
      ValueError: a task that the bank does not have, where the index is known.

    Follows: "Towards Reversible Model Merging For Low-rank Weights" (2025).

    >>> import jax.numpy as jnp
    >>> adapter = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> rmm_restore(rmm_basis([adapter], 0), 0)["w"]["b"].tolist()
    [[1.0, 1.0]]
    """
    count = tree.num_tasks("rmm_restore", bank.coefficients)
    if isinstance(task, int) and not -count <= task < count:
        raise ValueError(f"rmm_restore: task is {task}, the bank has {count}")

    parts = (_turn(bank.mean), bank.basis, bank.coefficients)
    return _turn(jax.tree.map(lambda m, b, c: _restore(m, b, c, task), *parts))


def rmm_cost(rank: int, tasks: int, p: int) -> float:
    """Numbers stored over numbers in the adapters, `(p (r + T) + r) / (r T)`.

    Below 1 exactly where p < r (T - 1) / (r + T).

    Args:
      rank: r of the adapters.
      tasks: T.
      p: vectors of the basis.

    Returns:
      A Python float.

    Raises:
      ValueError: rank or tasks below 1, or p below 0.

    Follows: "Towards Reversible Model Merging For Low-rank Weights" (2025).

    >>> [round(rmm_cost(16, 8, p), 2) for p in (1, 2, 3, 4)]
    [0.31, 0.5, 0.69, 0.88]
    """
    if rank < 1 or tasks < 1 or p < 0:
        raise ValueError(
            f"rmm_cost: rank is {rank}, tasks {tasks}, p {p}, wanted at least 1, 1, 0"
        )
    return (p * (rank + tasks) + rank) / (rank * tasks)


def _turn(factors):
    """Positions in front of ranks: `b` is [..., out, r], and back."""
    return tree.map_with_path(
        lambda name, x: _spectral.transpose(x) if name.split("/")[-1] == "b" else x,
        factors,
    )


def _padded(loras):
    """Adapters of one rank per leaf."""
    turned = [_turn(each) for each in loras]
    for t, other in enumerate(turned[1:], 1):
        if tree.paths(other) != tree.paths(turned[0]):
            odd = sorted(set(tree.paths(other)) ^ set(tree.paths(turned[0])))
            raise ValueError(f"rmm_basis: {odd[0]!r} is not in both adapters 0 and {t}")
    if not turned:
        raise ValueError("rmm_basis: no adapters, wanted at least one")
    ranks = jax.tree.map(lambda *xs: max(x.shape[-1] for x in xs), *turned)

    def pad(x, rank):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rank - x.shape[-1])])

    return [_turn(jax.tree.map(pad, each, ranks)) for each in turned]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fit(x, p, method):
    """[T, ..., positions, r] -> (mean, basis, coefficients)."""
    wide = x.astype(tree.wide_dtype(x.dtype))
    mean = wide.mean(0)
    columns = jnp.moveaxis(wide - mean[None], 0, -1)
    rank = min(p, *columns.shape[-2:])
    basis = _spectral.svd(columns, rank, method)[0]
    basis = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, p - rank)])
    found = _spectral.matmul(_spectral.transpose(basis), columns)
    return tuple(y.astype(x.dtype) for y in (mean, basis, jnp.moveaxis(found, -1, 0)))


@jax.jit
def _restore(mean, basis, coefficients, task):
    wide = tree.wide_dtype(mean.dtype)
    chosen = coefficients[task].astype(wide)[..., None]
    moved = _spectral.matmul(basis.astype(wide), chosen)[..., 0]
    return (mean.astype(wide) + moved).astype(mean.dtype)
