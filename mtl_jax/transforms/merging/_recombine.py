"""Model recombination: models of which every part comes from another one."""

from collections.abc import Callable
from typing import Any

import jax

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose


def recombine(
    taus: Any,
    *,
    key: Any,
    part: Callable[[str], str] | None = None,
    check_finite: bool = True,
) -> Any:
    """Shuffles parts of models among them: T models of mixed parts from T models.

    result_t = tau_s(t), with a random permutation s of the tasks for every part

    Args:
      taus: task tree, leaves [T, ...]: task vectors, or the stacked parameters
        themselves.
      key: typed PRNG key.
      part: leaf name -> the part that it moves with, such as its layer; None, every
        leaf by itself.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree like `taus`, in which every part of every task is there once. Parts are
      numbered by the order of their names, so that the result depends on nothing else.

    Raises:
      ValueError: there is nothing to shuffle, no key, or NaN or infinity.

    Follows: the algorithm of that name in FusionBench (Tang et al. 2024,
      arXiv 2406.03280), which shuffles leaves, or the modules of a list.
    Differs: parts are named by a function, so that any tree has them.

    >>> import jax.numpy as jnp
    >>> taus = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([0.0, 1.0])}
    >>> mixed = recombine(taus, key=jax.random.key(1))
    >>> sorted(mixed["a"].tolist()), sorted(mixed["b"].tolist())
    ([0.0, 1.0], [0.0, 1.0])
    """
    _compose.check_key("recombine", key)
    count, _ = _compose.check_taus("recombine", taus, None, check_finite)
    owners = {name: part(name) if part else name for name in tree.paths(taus)}
    numbers = {owner: i for i, owner in enumerate(sorted(set(owners.values())))}

    def leaf(name, x):
        own = jax.random.fold_in(key, numbers[owners[name]])
        return x[jax.random.permutation(own, count)]

    return tree.map_with_path(leaf, taus)
