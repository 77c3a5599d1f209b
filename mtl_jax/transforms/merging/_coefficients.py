"""Coefficients of task vectors: one per task, leaf, group of leaves or part of a leaf.

Coefficients are ordinary arrays, to be set or learned. Four layouts, one function:

    task     [T]                        one number per task
    group    {group: [T]}               one row for the leaves that `group` names alike
    leaf     a tree like the base, [T]  one row per leaf
    parts    the same, [T, K]           K rows per leaf, one per part of its entries
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax._checks import named_leaves
from mtl_jax._contractions import products, weighted_sum

Kind = Literal["leaf", "task"]
Scope = Literal["leaf", "global"]
Group = Callable[[str], str]


def init_coefficients(
    taus: Any,
    value: float = 0.0,
    *,
    kind: Kind = "leaf",
    parts: int | None = None,
    group: Group | None = None,
) -> Any:
    """Equal coefficients for `compose`.

    Args:
      taus: task tree, leaves [T, ...].
      value: of every coefficient.
      kind: "leaf", one row of T per leaf, or "task", one row for the whole model.
      parts: K, for one row per part of a leaf; see `partition`.
      group: names of leaves to names of groups, for one row per group.

    Returns:
      float32 [T] for kind "task"; {group: [T]}; else a tree like `taus` with leaves [T]
      or, with parts, [T, K].

    Raises:
      ValueError: a kind that does not exist, two layouts at once, or no parts.

    Follows: Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned
      Anisotropic Scaling", which starts from 0; Yang et al. 2024, "AdaMerging",
      from 0.3.

    >>> taus = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 1))}
    >>> init_coefficients(taus, 0.5, kind="task").tolist()
    [0.5, 0.5]
    >>> init_coefficients(taus, parts=3)["a"].shape
    (2, 3)
    """
    name = "init_coefficients"
    count = tree.num_tasks(name, taus)
    if kind not in get_args(Kind):
        raise ValueError(f"{name}: kind is {kind!r}, wanted one of {get_args(Kind)}")
    if (kind == "task") + (parts is not None) + (group is not None) > 1:
        raise ValueError(f"{name}: wanted one of kind='task', parts and group")
    if parts is not None and parts < 1:
        raise ValueError(f"{name}: parts is {parts}, wanted 1 or more")
    if kind == "task":
        return jnp.full(count, value, jnp.float32)
    if group is not None:
        names = sorted({group(leaf) for leaf in tree.paths(taus)})
        return {found: jnp.full(count, value, jnp.float32) for found in names}
    shape = (count,) if parts is None else (count, parts)
    return jax.tree.map(lambda _: jnp.full(shape, value, jnp.float32), taus)


def partition(base: Any, parts: int, *, key: Any) -> Any:
    """A fixed random part for every entry of every leaf.

    Args:
      base: tree of parameters, leaves [...].
      parts: K.
      key: typed PRNG key; each leaf draws from its own, whatever its shape.

    Returns:
      Tree like `base` of uint8 (uint32 from 257 parts on) with entries 0 to K - 1.

    Raises:
      ValueError: fewer than one part.

    Follows: Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned
      Anisotropic Scaling", the x K variant.
    Differs: parts are uniform draws, of equal size only on average; leaves of equal
      shape get parts of their own, and leaves of every rank are divided.

    >>> parts = partition({"w": jnp.zeros((2, 50))}, 2, key=jax.random.key(0))
    >>> parts["w"].shape, sorted(set(parts["w"].ravel().tolist()))
    ((2, 50), [0, 1])
    """
    if parts < 1:
        raise ValueError(f"partition: parts is {parts}, wanted 1 or more")
    dtype = jnp.uint8 if parts <= 256 else jnp.uint32
    leaves, treedef = jax.tree.flatten(base)
    return treedef.unflatten(
        [
            jax.random.randint(
                jax.random.fold_in(key, i), jnp.shape(x), 0, parts
            ).astype(dtype)
            for i, x in enumerate(leaves)
        ]
    )


def compose(
    base: Any,
    taus: Any,
    coeffs: Any,
    *,
    parts: Any = None,
    group: Group | None = None,
) -> Any:
    r"""Adds scaled task vectors to a base, `theta = base + sum_t coeffs_t tau_t`.

    Differentiable in all three. The sum is formed in one pass per leaf.

    Args:
      base: tree of parameters, leaves [...].
      taus: task tree like `base`, leaves [T, ...], of any floating dtype.
      coeffs: [T]; a tree like `base` with leaves [T]; with `parts` one with leaves
        [T, K]; with `group` a dict of [T] by group.
      parts: tree like `base` of integers [...] from 0 to K - 1; see `partition`.
        Entry e of a leaf gets `coeffs[:, parts[e]]`.
      group: names of leaves to names of groups.

    Returns:
      Tree like `base` in its dtypes; computed in float32 (or wider), cast once. Leaves
      that are not floating point are those of the base.

    Raises:
      ValueError: trees, tasks or shapes that do not fit, by leaf.

    Follows: Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned
      Anisotropic Scaling", where a block is a leaf; with one row per task or leaf also
      the merge of Yang et al. 2024, "AdaMerging".
    Differs: nothing is clamped; AdaMerging's range is `jax.numpy.clip(coeffs, 0, 1)`.

    >>> base, taus = {"w": jnp.ones(2)}, {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> compose(base, taus, jnp.array([1.0, 0.5]))["w"].tolist()
    [3.5, 5.0]
    >>> compose(base, taus, {"w": jnp.array([0.0, 2.0])})["w"].tolist()
    [7.0, 9.0]
    """
    count = tree.num_tasks("compose", taus)
    tree.check_match(
        "compose", base, jax.eval_shape(_first, taus), other_name="a task vector"
    )
    rows = _rows("compose", taus, coeffs, count, parts, group)
    if parts is None:
        return _compose(base, taus, rows)
    widths = {leaf: row.shape[1] for leaf, row in named_leaves(rows).items()}
    _check_parts("compose", base, parts, widths)
    return _compose_parts(base, taus, rows, parts)


def coefficient_grads(
    taus: Any, grads: Any, *, parts: Any = None, num_parts: int | None = None
) -> Any:
    """Slopes of a loss along coefficients, from its slopes along parameters.

      dL / d coeffs_t = <tau_t, dL / d theta>     leaf by leaf, or part by part

    One backward pass through the model serves all T coefficients of every leaf. Sum
    over leaves for coefficients per task, over the leaves of a group for its own.

    Args:
      taus: task tree, leaves [T, ...].
      grads: gradient with respect to the composed parameters, leaves [...].
      parts: as in `compose`.
      num_parts: K; by default one more than the largest index of a leaf, which is not
        known where `parts` are traced.

    Returns:
      Tree like `grads` with leaves [T], or [T, K]; float32. Zeros for leaves that are
      not floating point.

    Raises:
      ValueError: trees or parts that do not fit, by leaf.

    Follows: the chain rule through `compose`.

    >>> taus = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> coefficient_grads(taus, {"w": jnp.array([1.0, 10.0])})["w"].tolist()
    [21.0, 43.0]
    """
    count = tree.num_tasks("coefficient_grads", taus)
    like = jax.eval_shape(_first, taus)
    tree.check_match(
        "coefficient_grads", like, grads, reference_name="taus", other_name="grads"
    )

    def leaf(x, g):
        if not tree.is_inexact(x):
            return jnp.zeros(count, jnp.float32)
        return products(x.astype(jnp.float32), g.astype(jnp.float32)[None])[:, 0]

    def by_part(name, x, g, part):
        if not tree.is_inexact(x):
            return jnp.zeros((count, widths[name]), jnp.float32)

        def add(row):  # Of one task: products of all would be another task tree.
            terms = row.astype(jnp.float32) * g.astype(jnp.float32)
            return jax.ops.segment_sum(terms.ravel(), part.ravel(), widths[name])

        return jax.lax.map(add, x)

    if parts is None:
        return jax.tree.map(leaf, taus, grads)
    widths = _widths("coefficient_grads", parts, num_parts)
    _check_parts("coefficient_grads", grads, parts, widths)
    return tree.map_with_path(by_part, taus, grads, parts)


def select_blocks(grads: Any, budget: int, *, scope: Scope = "leaf") -> Any:
    """Which task vectors are worth their memory, leaf by leaf: the largest |slopes|.

    Args:
      grads: slopes along coefficients, leaves [T] (or [T, K], summed over parts); see
        `coefficient_grads`.
      budget: b, how many task vectors each leaf keeps.
      scope: "leaf", every leaf chooses for itself, so that the b kept blocks come from
        different tasks; "global", whole task vectors by the sum over leaves.

    Returns:
      Tree like `grads` with leaves [b] int32, indices of tasks in ascending order; for
      `take_blocks`.

    Raises:
      ValueError: a budget outside of 1 to T, a scope that does not exist, or slopes
        that are not finite.

    Follows: Zhang et al. 2024, "Knowledge Composition using Task Vectors with Learned
      Anisotropic Scaling", its gradient-based selection, of blocks and of vectors.

    >>> slopes = {"a": jnp.array([3.0, -4.0, 1.0]), "b": jnp.array([0.1, 0.2, -9.0])}
    >>> {name: x.tolist() for name, x in select_blocks(slopes, 1).items()}
    {'a': [1], 'b': [2]}
    >>> select_blocks(slopes, 1, scope="global")["a"].tolist()
    [2]
    """
    count = tree.num_tasks("select_blocks", grads)
    if not 1 <= budget <= count:
        raise ValueError(f"select_blocks: budget is {budget}, there are {count} tasks")
    if scope not in get_args(Scope):
        raise ValueError(
            f"select_blocks: scope is {scope!r}, wanted one of {get_args(Scope)}"
        )
    tree.check_finite("select_blocks", grads)
    size = jax.tree.map(lambda g: jnp.abs(g.reshape(count, -1)).sum(1), grads)
    if scope == "global":
        total = sum(jax.tree.leaves(size))
        size = jax.tree.map(lambda _: total, size)

    def largest(x):
        _, index = jax.lax.top_k(x, budget)
        return jnp.sort(index).astype(jnp.int32)

    return jax.tree.map(largest, size)


def take_blocks(taus: Any, blocks: Any) -> Any:
    """The blocks that were chosen, as a smaller task tree.

    Args:
      taus: task tree, leaves [T, ...].
      blocks: tree like it with leaves [b] of task indices; see `select_blocks`.

    Returns:
      Tree like `taus` with leaves [b, ...]; row i of a leaf is that of task
      `blocks[i]`, another one in each leaf.

    Raises:
      ValueError: trees that do not match.

    Follows: as `select_blocks`.

    >>> taus = {"w": jnp.array([[1.0], [2.0], [3.0]])}
    >>> take_blocks(taus, {"w": jnp.array([0, 2])})["w"].tolist()
    [[1.0], [3.0]]
    """
    tree.num_tasks("take_blocks", taus)
    if jax.tree.structure(taus) != jax.tree.structure(blocks):
        raise ValueError(
            f"take_blocks: taus have the leaves {tree.paths(taus)[:4]}, blocks "
            f"{tree.paths(blocks)[:4]}"
        )
    return jax.tree.map(lambda x, index: jnp.take(x, index, axis=0), taus, blocks)


def spread(name: str, taus: Any, coeffs: Any) -> Any:
    """A number, [T] or a tree of [T] as one row per leaf: a tree of float32 [T]."""
    count = tree.num_tasks(name, taus)
    if isinstance(coeffs, int | float):
        coeffs = jnp.full(count, coeffs, jnp.float32)
    rows = _rows(name, taus, coeffs, count, None, None)
    tree.check_finite(f"{name}: coefficients", rows)
    return jax.tree.map(lambda row: row.astype(jnp.float32), rows)


def _first(taus):
    return jax.tree.map(lambda x: x[0], taus)


def _rows(name, taus, coeffs, count, parts, group):
    """One row of coefficients per leaf, [T] or [T, K], as a tree like taus."""
    if group is not None:
        found = set(map(group, tree.paths(taus)))
        if not isinstance(coeffs, dict) or set(coeffs) != found:
            have = sorted(coeffs) if isinstance(coeffs, dict) else type(coeffs).__name__
            raise ValueError(f"{name}: coeffs are {have}, wanted {sorted(found)}")
        rows = tree.map_with_path(lambda leaf, _: coeffs[group(leaf)], taus)
    elif jax.tree.structure(coeffs) == jax.tree.structure(taus):
        rows = coeffs
    elif jax.tree.structure(coeffs) == jax.tree.structure(0):
        shared = jnp.asarray(coeffs)
        rows = jax.tree.map(lambda _: shared, taus)
    else:
        raise ValueError(f"{name}: coeffs are neither [T] nor a tree like the base")
    dims, wanted = (1, f"({count},)") if parts is None else (2, f"({count}, K)")
    for leaf, row in named_leaves(rows).items():
        if jnp.ndim(row) != dims or jnp.shape(row)[0] != count:
            raise ValueError(
                f"{name}: coeffs of {leaf!r} are {jnp.shape(row)}, wanted {wanted}"
            )
    return jax.tree.map(jnp.asarray, rows)


def _widths(name, parts, num_parts) -> dict[str, int]:
    """Number of parts of every leaf."""
    named = named_leaves(parts)
    if num_parts is None:
        if any(isinstance(part, jax.core.Tracer) for part in named.values()):
            raise ValueError(f"{name}: parts are traced, which wants num_parts")
        return {k: int(part.max()) + 1 if part.size else 1 for k, part in named.items()}
    if num_parts < 1:
        raise ValueError(f"{name}: num_parts is {num_parts}, wanted 1 or more")
    return {leaf: num_parts for leaf in named}


def _check_parts(name, base, parts, widths):
    if jax.tree.structure(parts) != jax.tree.structure(base):
        raise ValueError(f"{name}: parts are no tree like the base")
    shapes = {leaf: jnp.shape(x) for leaf, x in named_leaves(base).items()}
    for leaf, part in named_leaves(parts).items():
        if part.shape != shapes[leaf] or not jnp.issubdtype(part.dtype, jnp.integer):
            raise ValueError(
                f"{name}: parts of {leaf!r} are {part.dtype}{list(part.shape)}, wanted "
                f"integers {list(shapes[leaf])}"
            )
        known = not isinstance(part, jax.core.Tracer) and part.size
        if known and not 0 <= int(part.min()) <= int(part.max()) < widths[leaf]:
            raise ValueError(
                f"{name}: parts of {leaf!r} are {int(part.min())} to "
                f"{int(part.max())}, there are {widths[leaf]}"
            )


@jax.jit
def _compose(base, taus, rows):
    def leaf(b, x, w):
        if not tree.is_inexact(b):
            return b
        wide = tree.wide_dtype(b.dtype)
        return (b.astype(wide) + weighted_sum(x, w.astype(wide))).astype(b.dtype)

    return jax.tree.map(leaf, base, taus, rows)


@jax.jit
def _compose_parts(base, taus, rows, parts):
    def leaf(b, x, w, part):
        if not tree.is_inexact(b):
            return b
        wide = tree.wide_dtype(b.dtype)
        total = b.astype(wide)
        for t in range(x.shape[0]):
            total = total + w[t].astype(wide)[part] * x[t].astype(wide)
        return total.astype(b.dtype)

    return jax.tree.map(leaf, base, taus, rows, parts)
