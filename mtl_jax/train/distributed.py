"""Several processes as one program."""

import os
from typing import Any

import jax


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    **options: Any,
) -> bool:
    """Joins this process to the others of the run; call it before any computation.

    Without arguments the environment decides: `MTL_JAX_COORDINATOR` (host:port),
    `MTL_JAX_NUM_PROCESSES` and `MTL_JAX_PROCESS_ID` where they are set, and else
    whatever JAX recognises, such as a Cloud TPU pod. Where neither says anything, and
    where it was called before, nothing happens.

    Args:
      coordinator: address of process 0, `host:port`.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      **options: further arguments of `jax.distributed.initialize`.

    Returns:
      True when this is one of several processes.

    Raises:
      ValueError: when only some of the three are known, or they contradict.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given = {
        "coordinator": coordinator or os.environ.get("MTL_JAX_COORDINATOR"),
        "num_processes": _integer("num_processes", num_processes),
        "process_id": _integer("process_id", process_id),
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"initialize: {missing[0]} is missing, "
            f"wanted all of {sorted(given)} or none"
        )
    if not missing:
        total, index = given["num_processes"], given["process_id"]
        if not 0 <= index < total:
            raise ValueError(
                f"initialize: process_id wants 0 to {total - 1}, found {index}"
            )
        if total == 1:
            return False
        jax.distributed.initialize(given["coordinator"], total, index, **options)
    elif _is_pod():
        jax.distributed.initialize(**options)
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """True on the one process that writes reports."""
    return jax.process_index() == 0


def _integer(name: str, value: int | None) -> int | None:
    if value is not None:
        return value
    text = os.environ.get(f"MTL_JAX_{name.upper()}")
    if text is None:
        return None
    if not text.strip().lstrip("-").isdigit():
        raise ValueError(
            f"initialize: MTL_JAX_{name.upper()} wants a whole number, found {text!r}"
        )
    return int(text)


def _is_pod() -> bool:
    """True on a worker of a multi-host Cloud TPU slice, or under Slurm."""
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    slurm = os.environ.get("SLURM_NTASKS", "1")
    return "," in workers or (slurm.isdigit() and int(slurm) > 1)
