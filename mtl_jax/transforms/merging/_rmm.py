"""Reversible model merging: a small basis from which every adapter is rebuilt."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    p: Any,
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
        and more are stored as zeros. One number, or a tree of them like an adapter.
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
    bank = _bank("rmm_basis", loras, check_finite)
    counts = jax.tree.map(lambda _: p, bank) if isinstance(p, int) else p
    if tree.paths(counts) != tree.paths(bank):
        raise ValueError("rmm_basis: p is neither a number nor a tree like an adapter")
    if (least := min(jax.tree.leaves(counts))) < 0:
        raise ValueError(f"rmm_basis: p is {least}, wanted 0 or more")
    parts = jax.tree.map(lambda x, p: _fit(x, p, svd), _turn(bank), counts)
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


def rmm_errors(loras: Sequence[Any], *, check_finite: bool = True) -> Any:
    r"""What each number of vectors loses, without fitting or restoring anything.

      e[p] = sum over positions and tasks of |x_t - mu - W c_t|^2
           = sum over positions of the squares of the singular values beyond the p first

    Args:
      loras: see `rmm_basis`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      A tree like an adapter, leaves [min(r, T) + 1]: the error at p = 0, 1, ...

    Raises:
      ValueError: as `rmm_basis`.

    Follows: Eckart and Young 1936.

    >>> import jax.numpy as jnp
    >>> first = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> second = {"w": {"a": jnp.zeros((2, 1)), "b": jnp.ones((1, 2))}}
    >>> rmm_errors([first, second])["w"]["a"].round(4).tolist()
    [1.0, 0.0]
    """
    return jax.tree.map(_errors, _turn(_bank("rmm_errors", loras, check_finite)))


def rmm_choose(
    loras: Sequence[Any], budget: float, *, check_finite: bool = True
) -> Any:
    """How many vectors each factor of each leaf gets, within a budget of storage.

    Vectors are given one by one to the factor whose error falls most per number stored.
    As errors fall ever more slowly, no split of the same size loses less, but for the
    last vectors, where only small ones fit.

    Args:
      loras: see `rmm_basis`.
      budget: numbers stored over numbers in the adapters, at most; see `rmm_cost`.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      A tree of Python integers like an adapter, the `p` of `rmm_basis`.

    Raises:
      ValueError: as `rmm_basis`, or a budget in which not even the means fit.

    Follows: "Towards Reversible Model Merging For Low-rank Weights" (2025), where the
      size may differ between layers.
    Differs: the paper's own choice was not seen; the greedy one is ours.

    >>> import jax.numpy as jnp
    >>> first = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    >>> second = {"w": {"a": jnp.zeros((2, 1)), "b": jnp.ones((1, 2))}}
    >>> rmm_choose([first, second], 1.5)
    {'w': {'a': 1, 'b': 0}}
    """
    bank = _turn(_bank("rmm_choose", loras, check_finite))
    leaves, treedef = jax.tree.flatten(bank)
    # Of one more vector: x is [T, ..., positions, r].
    sizes = [x[0].size // x.shape[-1] * (x.shape[-1] + x.shape[0]) for x in leaves]
    room = budget * sum(x.size for x in leaves) - sum(x[0].size for x in leaves)
    if not room >= 0:
        least = sum(x[0].size for x in leaves) / sum(x.size for x in leaves)
        raise ValueError(
            f"rmm_choose: budget is {budget}, wanted at least {least:.3g}, the means"
        )
    offers = []
    for i, x in enumerate(leaves):
        falls = -np.diff(np.asarray(_errors(x), np.float64))
        # Equal offers: the lower p first.
        offers += [(-fall / sizes[i], p, i) for p, fall in enumerate(falls) if fall > 0]
    counts = [0] * len(leaves)
    for _, p, i in sorted(offers):
        if counts[i] == p and sizes[i] <= room:
            counts[i], room = p + 1, room - sizes[i]
    return treedef.unflatten(counts)


def _bank(fn_name, loras, check_finite):
    """Adapters of one rank per leaf, stacked."""
    loras = list(loras)
    if check_finite:
        for t, each in enumerate(loras):
            tree.check_finite(f"{fn_name}: adapter {t}", each)
    return lora.stack(_padded(fn_name, loras))


def _turn(factors):
    """Positions in front of ranks: `b` is [..., out, r], and back."""
    return tree.map_with_path(
        lambda name, x: _spectral.transpose(x) if name.split("/")[-1] == "b" else x,
        factors,
    )


def _padded(fn_name, loras):
    """Adapters of one rank per leaf."""
    turned = [_turn(each) for each in loras]
    for t, other in enumerate(turned[1:], 1):
        if tree.paths(other) != tree.paths(turned[0]):
            odd = sorted(set(tree.paths(other)) ^ set(tree.paths(turned[0])))
            raise ValueError(f"{fn_name}: {odd[0]!r} is not in both adapters 0 and {t}")
    if not turned:
        raise ValueError(f"{fn_name}: no adapters, wanted at least one")
    ranks = jax.tree.map(lambda *xs: max(x.shape[-1] for x in xs), *turned)

    def pad(x, rank):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rank - x.shape[-1])])

    return [_turn(jax.tree.map(pad, each, ranks)) for each in turned]


def _centred(x):
    """[T, ..., positions, r] -> mean [..., r], what is left of it [..., r, T]."""
    wide = x.astype(tree.wide_dtype(x.dtype))
    mean = wide.mean(0)
    return mean, jnp.moveaxis(wide - mean[None], 0, -1)


@jax.jit
def _errors(x):
    """[T, ..., positions, r] -> [min(r, T) + 1]."""
    squares = _spectral.values(_centred(x)[1]) ** 2
    each = squares.reshape(-1, squares.shape[-1]).sum(0)
    return jnp.append(jnp.cumsum(each[::-1])[::-1], 0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fit(x, p, method):
    """[T, ..., positions, r] -> (mean, basis, coefficients)."""
    mean, columns = _centred(x)
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
