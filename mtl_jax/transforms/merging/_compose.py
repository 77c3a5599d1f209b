"""The one shape of an element-wise merge: trim each task, elect signs, reduce.

A method is a row of options. The trim decides first, per task, from as much of the
model as it likes, and answers with one small *selector* per leaf; then every leaf is
read once more and merged in one fused pass. No trimmed copy of the tasks is made.

    trim      selector per leaf and task: everything, a top share, a band, a coin
    elect     sign per entry that the kept values must share
    reduce    what becomes of the values that are left
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import _wide, tree
from mtl_jax._apart import apart
from mtl_jax._checks import number as number
from mtl_jax._checks import share as share

Elect = Literal["none", "sum", "count"]
Reduce = Literal["sum", "mean", "disjoint_mean"]
Scope = Literal["global", "leaf"]
ELECT = get_args(Elect)
REDUCE = get_args(Reduce)


class Everything(NamedTuple):
    """Keeps a task as it is."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [...] -> x."""
        return x


class Coin(NamedTuple):
    """Keeps each entry with probability `density`, multiplied by `factor`."""

    key: jax.Array
    density: jax.Array
    factor: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [...] -> x * factor where kept, 0 elsewhere."""
        keep = jax.random.bernoulli(self.key, self.density, x.shape)
        return jnp.where(keep, x * self.factor.astype(x.dtype), jnp.zeros((), x.dtype))


class Band(NamedTuple):
    """Keeps what reaches `low` and does not reach `high` (None: no upper end)."""

    low: tree.Cutoff | None
    high: tree.Cutoff | None

    def mask(self, x: jax.Array) -> jax.Array:
        """x: [...] -> bool [...]."""
        keep = jnp.ones(x.shape, bool)
        if self.low is not None:
            keep &= tree.reaches(x, self.low)
        if self.high is not None:
            keep &= ~tree.reaches(x, self.high)
        return keep

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [...] -> x where kept, 0 elsewhere."""
        return jnp.where(self.mask(x), x, jnp.zeros((), x.dtype))


Selector = Any
Trim = Callable[[Any], Any]


def choice(fn_name: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuses an option that does not exist."""
    if value not in known:
        raise ValueError(f"{fn_name}: {name} is {value!r}, wanted one of {known}")


def check_taus(
    fn_name: str, taus: Any, weights: Any, check_finite: bool
) -> tuple[int, jax.Array]:
    """Number of tasks and one float32 weight for each; ones by default.

    Raises:
      ValueError: nothing to merge; NaN or infinity in concrete arrays, by leaf, where
        that is to be checked; or weights that do not fit.
    """
    count = tree.num_tasks(fn_name, taus)
    if not any(tree.is_inexact(leaf) for leaf in jax.tree.leaves(taus)):
        raise ValueError(f"{fn_name}: no leaf of taus is floating point")
    if check_finite:
        tree.check_finite(fn_name, taus)
    if weights is None:
        return count, jnp.ones(count, jnp.float32)
    weights = numbers(fn_name, "weights", weights)
    if weights.shape != (count,):
        raise ValueError(
            f"{fn_name}: weights are {weights.shape}, wanted ({count},), one per task"
        )
    return count, weights


def numbers(fn_name: str, name: str, value: Any) -> jax.Array:
    """A float32 array, finite where that is known."""
    try:
        array = jnp.asarray(value).astype(jnp.float32)
    except TypeError as error:
        raise ValueError(f"{fn_name}: {name} are {value!r}, wanted numbers") from error
    tree.check_finite(fn_name, {name: array})
    return array


def _check_values(fn_name: str, name: str, array: jax.Array, test: Any, wanted: str):
    """Refuses numbers that fail a test; numbers that are not known yet pass."""
    if isinstance(array, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        passed = bool(test(array))
    if not passed:
        raise ValueError(f"{fn_name}: {name} {array.tolist()}, wanted {wanted}")


def check_total(fn_name: str, weights: jax.Array) -> None:
    """Refuses weights that cannot be divided by their sum, zero but for rounding."""
    rounding = weights.size * jnp.finfo(weights.dtype).eps
    _check_values(
        fn_name,
        "weights are",
        weights,
        lambda w: jnp.abs(w.sum()) > rounding * jnp.abs(w).sum(),
        "a sum other than 0",
    )


def check_positive(fn_name: str, weights: jax.Array) -> None:
    """Refuses weights of zero and below."""
    _check_values(
        fn_name,
        "weights are",
        weights,
        lambda w: (w > 0).all(),
        "all of them positive",
    )


def check_nonnegative(fn_name: str, subject: str, values: jax.Array) -> None:
    """Refuses negative numbers."""
    _check_values(fn_name, subject, values, lambda v: (v >= 0).all(), "0 or more")


def check_real(fn_name: str, taus: Any) -> None:
    """Refuses complex leaves, whose entries have no sign."""
    for name, leaf in zip(tree.paths(taus), jax.tree.leaves(taus), strict=True):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(f"{fn_name}: {name!r} is complex, wanted a real dtype")


def check_index(fn_name: str, name: str, value: Any) -> None:
    """Refuses what is known not to be an integer of 0 or more."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        fits = operator.index(value) >= 0
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{fn_name}: {name} is {value!r}, wanted an integer of 0 or more"
        )


def check_key(fn_name: str, key: Any) -> None:
    """Refuses what `jax.random.key` did not make."""
    if not hasattr(key, "dtype"):
        raise ValueError(
            f"{fn_name}: key is {key!r}, wanted one made by jax.random.key"
        )


def leaf_keys(key: jax.Array, taus: Any, count: int) -> list[jax.Array]:
    """For every leaf one key per task, [T]."""
    return [
        jax.random.split(jax.random.fold_in(key, i), count)
        for i in range(len(jax.tree.leaves(taus)))
    ]


def check_task(fn_name: str, task: Any, count: int) -> Any:
    """Index of a task, counted from the front; refused where it is known not to be."""
    if isinstance(task, jax.core.Tracer):
        return task
    try:
        index = operator.index(task)
    except TypeError:
        raise ValueError(f"{fn_name}: task is {task!r}, wanted an integer") from None
    if not -count <= index < count:
        raise ValueError(f"{fn_name}: task is {index}, there are {count}")
    return index % count


def nonnegative(fn_name: str, name: str, value: Any) -> float:
    """A Python float of 0 or more."""
    value = number(fn_name, name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{fn_name}: {name} is {value}, wanted 0 or more")
    return value


def top_share(
    fn_name: str, taus: Any, density: float, scope: Scope, *, zero_ties: bool = False
) -> list[Any]:
    """Selectors that keep the largest share of each task, over the model or per leaf.

    Returns:
      One `Band` with leaves [T] for every leaf, as a list in leaf order; None for
      leaves that hold no deltas.
    """
    leaves = [x if tree.is_inexact(x) else None for x in jax.tree.leaves(taus)]
    sizes = {i: x[0].size for i, x in enumerate(leaves) if x is not None}

    def count(length):
        return share(fn_name, "density", density, length)

    if scope == "global":
        kept = count(sum(sizes.values()))
        chosen = {i: leaves[i] for i in sizes}
        cutoffs = tree.task_top_cutoffs(chosen, kept, zero_ties=zero_ties)
    elif scope == "leaf":
        cutoffs = {
            i: tree.task_top_cutoffs(leaves[i], count(n), zero_ties=zero_ties)
            for i, n in sizes.items()
        }
    else:
        raise ValueError(f"{fn_name}: scope is {scope!r}, wanted 'global' or 'leaf'")
    return [Band(cutoffs[i], None) if i in sizes else None for i in range(len(leaves))]


def _kept(x: jax.Array, select: Selector, weights: jax.Array) -> list[jax.Array]:
    """Trimmed and weighted values of each task, float32; unrolled, so that it fuses."""
    wide = tree.wide_dtype(x.dtype)
    return [
        weights[t].astype(wide)
        * jax.tree.map(lambda a, t=t: a[t], select)(x[t].astype(wide))
        for t in range(x.shape[0])
    ]


def _score(values: list[jax.Array], elect: Elect) -> jax.Array:
    votes = values if elect == "sum" else [jnp.sign(v) for v in values]
    return functools.reduce(jnp.add, votes)


@functools.partial(jax.jit, static_argnums=3)
def _balance(
    x: jax.Array, select: Selector, weights: jax.Array, elect: Elect
) -> tuple[jax.Array, jax.Array]:
    """Positive minus negative elected signs of a leaf, as high and low 16 bits."""
    sign = jnp.sign(_score(_kept(x, select, weights), elect)).astype(jnp.int32)
    _, inner = _wide.split(sign.shape, range(sign.ndim), span=(1 << 31) - 1)
    net = jnp.sum(sign, axis=tuple(inner), dtype=jnp.int32, keepdims=True)
    high, low = jnp.sum(net >> 16), jnp.sum(net & 0xFFFF, dtype=jnp.uint32)
    return high + (low >> 16).astype(jnp.int32), (low & 0xFFFF).astype(jnp.int32)


def _majority(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Sign of the sum over leaves, without 32-bit overflow."""
    high = sum(part[0] for part in parts)
    low = sum(part[1] for part in parts)
    high, low = high + (low >> 16), low & 0xFFFF
    sign = jnp.where(high == 0, jnp.sign(low), jnp.where(high < 0, -1, 1))
    return sign.astype(jnp.float32)


def _agreeing(values, majority, elect: Elect):
    if elect == "none":
        return values
    sign = jnp.sign(_score(values, elect))
    sign = jnp.where(sign == 0, majority.astype(sign.dtype), sign)
    return [jnp.where(v * sign > 0, v, jnp.zeros((), v.dtype)) for v in values]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _merge_leaf(x, select, weights, majority, elect: Elect, reduce: Reduce):
    values = _agreeing(_kept(x, select, weights), majority, elect)
    total = functools.reduce(jnp.add, values)
    if reduce == "mean":
        total = total / jnp.sum(weights).astype(total.dtype)
    elif reduce == "disjoint_mean":
        weight = functools.reduce(
            jnp.add,
            [
                jnp.where(v != 0, w.astype(v.dtype), 0)
                for v, w in zip(values, weights, strict=True)
            ],
        )
        total = jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1), 0)
    return total.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=4)
def _select_leaf(x, select, weights, majority, elect: Elect):
    """[T, ...] of the values that survive, unweighted."""
    kept = _kept(x, select, weights)
    values = _agreeing(kept, majority, elect)
    plain = _kept(x, select, jnp.ones_like(weights))
    return jnp.stack(
        [
            jnp.where(v != 0, p, jnp.zeros((), p.dtype))
            for v, p in zip(values, plain, strict=True)
        ]
    ).astype(x.dtype)


def merge(
    taus: Any,
    selectors: list[Selector] | None,
    weights: jax.Array,
    *,
    elect: Elect = "none",
    reduce: Reduce = "sum",
    zero_sign: Literal["majority", "none"] = "none",
) -> Any:
    """Merges trimmed tasks leaf by leaf.

    Args:
      taus: task tree, leaves [T, ...].
      selectors: per leaf a selector with leaves [T, ...]; None keeps everything.
      weights: [T] float32; they multiply the values before the election.
      elect: "none"; "sum": the sign of the sum of the kept values; "count": the sign
        that more tasks have.
      reduce: "sum"; "mean" over all tasks; "disjoint_mean" over those that are left.
      zero_sign: what an election that ends in zero becomes: "majority", the most
        common elected sign of the whole model, or "none", nothing passes.

    Returns:
      Tree with leaves [...] in the dtypes of `taus`.
    """
    leaves, treedef, selectors, majority = _prepare(
        taus, selectors, weights, elect, zero_sign
    )
    return treedef.unflatten(
        [
            x[0]
            if s is None
            else _merge_leaf(x, s, *apart(i, (weights, majority)), elect, reduce)
            for i, (x, s) in enumerate(zip(leaves, selectors, strict=True))
        ]
    )


def survivors(
    taus: Any,
    selectors: list[Selector] | None,
    weights: jax.Array,
    *,
    elect: Elect = "none",
    zero_sign: Literal["majority", "none"] = "none",
) -> Any:
    """What `merge` would reduce: per task the entries that survive, leaves [T, ...]."""
    leaves, treedef, selectors, majority = _prepare(
        taus, selectors, weights, elect, zero_sign
    )
    return treedef.unflatten(
        [
            x
            if s is None
            else _select_leaf(x, s, *apart(i, (weights, majority)), elect)
            for i, (x, s) in enumerate(zip(leaves, selectors, strict=True))
        ]
    )


def _prepare(taus, selectors, weights, elect, zero_sign):
    """Leaves, with None for the selector of those without deltas; the majority."""
    leaves, treedef = jax.tree.flatten(taus)
    if selectors is None:
        selectors = [Everything() for _ in leaves]
    selectors = [
        s if tree.is_inexact(x) and x.size else None
        for x, s in zip(leaves, selectors, strict=True)
    ]
    majority = jnp.zeros(())
    if elect != "none" and zero_sign == "majority":
        parts = [
            _balance(x, s, apart(i, weights), elect)
            for i, (x, s) in enumerate(zip(leaves, selectors, strict=True))
            if s is not None
        ]
        majority = _majority(parts) if parts else majority
    return leaves, treedef, selectors, majority
