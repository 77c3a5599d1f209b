"""Trees of masks at one bit per entry."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import kernels, tree


def pack(mask: chex.ArrayTree, *, per_task: bool = False) -> chex.ArrayTree:
    """Packs a tree of masks, eight entries to a byte, leaf by leaf.

    Args:
      mask: tree of bool arrays [...], or [T, ...] with `per_task`.
      per_task: pack every task by itself, so that one can be taken out.

    Returns:
      Tree like `mask` of uint8 [ceil(n / 8)], or [T, ceil(n / 8)], n the entries of a
      leaf (of one task). Bit i % 8 of byte i // 8 is entry i in row-major order.

    Raises:
      ValueError: if a leaf is not a bool array, or tasks disagree.

    >>> pack({"w": jnp.array([[True, False], [False, True]])})["w"].tolist()
    [9]

    **Follows**: Wang et al. 2024, "Localizing Task Information for Improved Model
    Merging and Compression", the storage of task masks.

    **Differs**: least significant bit first, and per leaf, not over the flattened
    model; each leaf rounds up to a whole byte.
    """
    for name, leaf in zip(tree.paths(mask), jax.tree.leaves(mask), strict=True):
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not hasattr(leaf, "shape") or dtype != np.bool_:
            raise ValueError(f"pack: {name!r} is {dtype}, wanted an array of bool")
    if per_task:
        tree.num_tasks("pack", mask)

    def leaf(m):
        m = jnp.asarray(m)
        lead = m.shape[:1] if per_task else ()
        size = int(np.prod(m.shape[len(lead) :]))
        return kernels.pack_bits(m.reshape(*lead, size))

    return jax.tree.map(leaf, mask)


def unpack(packed: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """The inverse of `pack`.

    Args:
      packed: tree of uint8 [ceil(n / 8)] or [T, ceil(n / 8)].
      like: tree of arrays or `jax.ShapeDtypeStruct` [...] with the shapes of one task.

    Returns:
      Tree of bool [...] or [T, ...].

    Raises:
      ValueError: naming a leaf whose bytes do not fit.

    >>> unpack({"w": jnp.array([9], jnp.uint8)}, {"w": jnp.zeros((2, 2))})["w"].tolist()
    [[True, False], [False, True]]
    """
    check_packed("unpack", packed, like)

    def leaf(p, x):
        shape = jnp.shape(x)
        bits = kernels.unpack_bits(jnp.asarray(p), int(np.prod(shape)))
        return bits.reshape(*p.shape[:-1], *shape)

    return jax.tree.map(leaf, packed, like)


def check_packed(name: str, packed: chex.ArrayTree, like: chex.ArrayTree) -> None:
    """Refuses packed masks that do not fit, by leaf name.

    Raises:
      ValueError: naming the function, the leaf, what was wanted and found.
    """
    have = dict(zip(tree.paths(packed), jax.tree.leaves(packed), strict=True))
    want = dict(zip(tree.paths(like), jax.tree.leaves(like), strict=True))
    if set(have) != set(want):
        raise ValueError(
            f"{name}: leaves {sorted(set(have) ^ set(want))} are in only one of the "
            "packed masks and the parameters"
        )
    for path, leaf in want.items():
        wanted = kernels.num_bytes(int(np.prod(jnp.shape(leaf))))
        p = have[path]
        if p.dtype != jnp.uint8 or p.ndim not in (1, 2) or p.shape[-1] != wanted:
            raise ValueError(
                f"{name}: {path!r} is {p.dtype}{list(p.shape)}, wanted uint8 of "
                f"{wanted} bytes for a leaf {jnp.shape(leaf)}"
            )
