"""Reversible merging of whole matrices: low-rank changes over a shared basis."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.checkpoints import _bank_methods as methods
from mtl_jax.checkpoints.source import TensorSpec
from mtl_jax.transforms import merging

__all__ = ["Rmm", "bank_parts", "fill", "read_bank_parts"]

_FACTORS = ("a", "b")
_FIELDS = ("mean", "basis", "coefficients")


def bank_parts(
    sides: tuple[int, int], rank: int, tasks: int, p: int, dtype: np.dtype
) -> dict[str, TensorSpec]:
    """Tensors of a `merging.RmmBank` of one matrix, by part such as "a.mean".

    Args:
      sides: rows of `a`, columns of `b`.
      rank: of the adapters.
      tasks: how many.
      p: vectors of the basis.
      dtype: of all parts.
    """
    found = {}
    for factor, side in zip(_FACTORS, sides, strict=True):
        mean = (side, rank) if factor == "a" else (rank, side)
        shapes = (mean, (side, rank, p), (tasks, side, p))
        for field, shape in zip(_FIELDS, shapes, strict=True):
            found[f"{factor}.{field}"] = TensorSpec(shape, dtype)
    return found


def fill(bank: merging.RmmBank, put: methods.Put, dtype: np.dtype) -> None:
    """Writes a bank of one matrix, {"a", "b"} in every field."""
    for field in _FIELDS:
        for factor in _FACTORS:
            values = np.asarray(getattr(bank, field)[factor]).astype(dtype)
            put(f"{factor}.{field}", 0, values.reshape(-1))


def read_bank_parts(parts: Any, task: int) -> merging.RmmBank:
    """The bank with one task in it, of a mapping of parts to tensors."""
    found = {field: {} for field in _FIELDS}
    for factor in _FACTORS:
        for field in _FIELDS:
            view = parts[f"{factor}.{field}"]
            if field == "coefficients":
                _, *shape = view.spec.shape
                count = math.prod(shape)
                values = view.flat(task * count, (task + 1) * count).reshape(1, *shape)
            else:
                values = view.whole()
            found[field][factor] = jnp.asarray(values).astype(jnp.float32)
    return merging.RmmBank(**found)


@functools.partial(jax.jit, static_argnums=2)
def _tau(base, expert, shape):
    """Task vector [1, m, n], its sum of squares in rows, and whether it is finite."""
    tau = expert.astype(jnp.float32) - base.astype(jnp.float32)
    finite = [jnp.isfinite(jnp.sum(x.astype(jnp.float32) * 0)) for x in (base, expert)]
    tau = tau.reshape(1, *shape)
    return tau, jnp.sum(tau**2, -1), jnp.stack(finite)


@jax.jit
def _lost(tau, adapter):
    product = jnp.matmul(adapter["a"], adapter["b"], precision="highest")
    return jnp.sum((product - tau[0]) ** 2, -1)


@functools.partial(jax.jit, static_argnames="dtype")
def _restore(base, adapter, dtype):
    product = jnp.matmul(adapter["a"], adapter["b"], precision="highest")
    return (base.astype(jnp.float32) + product.reshape(-1)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rmm:
    """Every matrix's change cut to a rank, all cut ones over one small basis.

    Tensors of more axes count as matrices of their first axis by all others; tensors
    that would take more room than they do are left to be kept as they are.

    Attributes:
      rank: r, that of the matrix where it is smaller.
      basis: p, at most min(r, T - 1), where everything that the rank left is kept.
      svd: see `merging.lora_from_taus`.
      align: turn the factors towards the first task's, see `merging.lora_align`.
      dtype: of the bank; None: the widest of the experts.
    """

    rank: int
    basis: int
    svd: str = "gram"
    align: bool = False
    dtype: np.dtype | None = None

    def parts(self, spec, dtypes):  # noqa: D102
        if len(spec.shape) < 2:
            return None
        sides, tasks = _sides(spec), len(dtypes)
        rank = min(self.rank, *sides)
        stored = methods.widest(dtypes) if self.dtype is None else self.dtype
        p = min(self.basis, rank, tasks - 1)
        found = bank_parts(sides, rank, tasks, p, stored)
        size = sum(part.nbytes for part in found.values())
        plain = spec.size * sum(dtype.itemsize for dtype in dtypes)
        return found if size < plain else None

    def compress(self, base, experts, parts, put):  # noqa: D102
        sides, tasks = _sides(base.spec), len(experts)
        rank = min(self.rank, *sides)
        errors, loras = methods.Errors.zero(tasks), []
        origin = base.flat(0, base.spec.size)
        for t, expert in enumerate(experts):
            tau, total, finite = _tau(origin, expert.flat(0, base.spec.size), sides)
            if not finite[0]:
                raise methods.NotFiniteError(0)
            if not finite[1]:
                raise methods.NotFiniteError(t + 1)
            errors.total[t] = np.asarray(total, np.float64).sum()
            options = {"svd": self.svd, "check_finite": False}
            loras += merging.lora_from_taus({"w": tau}, rank=rank, **options)
        if self.align:
            loras = merging.lora_align(loras, check_finite=False)
        p = min(self.basis, rank, tasks - 1)
        bank = merging.rmm_basis(loras, p, check_finite=False)
        bank = merging.RmmBank(*({f: x["w"][f] for f in _FACTORS} for x in bank))
        dtype = parts["a.mean"].dtype
        fill(bank, put, dtype)
        # As it is stored, which may be narrower.
        bank = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), bank)
        for t, expert in enumerate(experts):
            tau, _, _ = _tau(origin, expert.flat(0, base.spec.size), sides)
            lost = _lost(tau, merging.rmm_restore(bank, t))
            errors.lost[t] = np.asarray(lost, np.float64).sum()
        return errors

    def restore(self, base, parts, task, dtype) -> Iterator[Any]:  # noqa: D102
        adapter = merging.rmm_restore(read_bank_parts(parts, task), 0)
        origin = base.flat(0, base.spec.size)
        yield 0, np.asarray(_restore(origin, adapter, dtype))


def _sides(spec: TensorSpec) -> tuple[int, int]:
    return spec.shape[0], math.prod(spec.shape[1:])
