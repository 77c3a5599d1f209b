"""Which implementation of an operation runs, decided the same way for all."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.core

IMPLEMENTATIONS = ("xla", "pallas_tpu")


def _on_one_tpu(arrays: Iterable[Any]) -> bool:
    """True for concrete arrays that all lie on one TPU chip.

    A traced argument says neither where nor over how many devices the program will
    run, and a Pallas call cannot be partitioned automatically.
    """
    return all(
        isinstance(x, jax.Array)
        and not isinstance(x, jax.core.Tracer)
        and len(x.devices()) == 1
        and next(iter(x.devices())).platform == "tpu"
        for x in arrays
    )


def choose(
    name: str, implementation: str | None, arrays: Iterable[Any], *, fits: bool
) -> str:
    """Resolves `implementation`.

    Args:
      name: of the operation, for messages.
      implementation: None or one of `IMPLEMENTATIONS`.
      arrays: the operands.
      fits: whether the operands suit the Pallas kernel as they are.

    Returns:
      One of `IMPLEMENTATIONS`.

    Raises:
      ValueError: if the name is unknown.
    """
    if implementation is None:
        return "pallas_tpu" if fits and _on_one_tpu(arrays) else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: implementation {implementation!r} does not exist; wanted None or "
            f"one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    return implementation


def require_tpu(name: str, arrays: Iterable[Any], *, interpret: bool) -> None:
    """Refuses a Pallas TPU kernel on arrays that visibly lie elsewhere.

    Raises:
      ValueError: if a concrete array is on another platform and the kernel is not
        interpreted.
    """
    if interpret:
        return
    for x in arrays:
        if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
            continue
        platform = next(iter(x.devices())).platform
        if platform != "tpu":
            raise ValueError(
                f"{name}: implementation 'pallas_tpu' needs a TPU, found an array on "
                f"{platform}; use implementation='xla', or interpret=True to debug"
            )
