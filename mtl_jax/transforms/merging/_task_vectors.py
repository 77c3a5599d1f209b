"""Task vectors: what fine-tuning changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree


@jax.jit
def _leaf(base: jax.Array, experts: list[jax.Array]) -> jax.Array:
    if not tree.is_inexact(base):
        return jnp.zeros((len(experts), *base.shape), base.dtype)
    wide = tree.wide_dtype(base.dtype)
    return jnp.stack([e.astype(wide) - base.astype(wide) for e in experts])


def task_vectors(
    base: Any, experts: Sequence[Any], *, check_finite: bool = True
) -> Any:
    """Task vectors of several fine-tunings of one base, stacked.

    tau_t = theta_t - theta_0

    Args:
      base: tree of parameters, leaves [...].
      experts: T trees like `base`; dtypes may be narrower or wider.
      check_finite: refuse NaN and infinity in concrete arrays, by leaf name.

    Returns:
      Tree like `base` with leaves [T, ...], float32 (or wider where `base` is).
      Leaves that are not floating point become zeros of their own dtype, so that
      `tree.add_scaled` leaves those of the base untouched.

    Raises:
      ValueError: no experts, nothing that fine-tuning moves, an expert unlike the
        base, or NaN or infinity.

    Follows: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2.
    Differs: the difference is taken in float32 whatever the storage dtype; taken in
      bfloat16 it is rounded before any method sees it.

    >>> base = {"w": jnp.zeros(2)}
    >>> task_vectors(base, [{"w": jnp.ones(2)}])["w"].tolist()
    [[1.0, 1.0]]
    """
    if isinstance(experts, Mapping):
        raise ValueError(
            "task_vectors: experts is one tree, wanted a sequence of trees"
        )
    if not isinstance(experts, Iterable):
        raise ValueError(
            f"task_vectors: experts is a {type(experts).__name__}, wanted a sequence "
            "of trees"
        )
    if not any(tree.is_inexact(leaf) for leaf in jax.tree.leaves(base)):
        raise ValueError("task_vectors: no leaf of base is floating point")
    experts = list(experts)
    if not experts:
        raise ValueError("task_vectors: no experts, wanted at least one")
    for t, expert in enumerate(experts):
        tree.check_match("task_vectors", base, expert, other_name=f"expert {t}")
    taus = jax.tree.map(
        lambda b, *es: _leaf(jnp.asarray(b), [jnp.asarray(e) for e in es]),
        base,
        *experts,
    )
    if check_finite:
        try:
            tree.check_finite("task_vectors", taus)
        except ValueError:
            tree.check_finite("task_vectors: base", base)
            for t, expert in enumerate(experts):
                tree.check_finite(f"task_vectors: expert {t}", expert)
            raise
    return taus
