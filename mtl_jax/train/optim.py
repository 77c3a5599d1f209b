"""Optimizers and schedules from plain data, by strict lookup."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from mtl_jax import tree as mtl_tree

Named = tuple[str, Mapping[str, Any]]


def _warmup_cosine(
    peak: float, steps: int, warmup_steps: int = 0, init: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(init, peak, warmup_steps, steps, end)


def _linear(
    peak: float, steps: int, warmup_steps: int = 0, end: float = 0.0
) -> optax.Schedule:
    down = optax.linear_schedule(peak, end, steps - warmup_steps)
    if not warmup_steps:
        return down
    up = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([up, down], [warmup_steps])


def _constant(value: float, warmup_steps: int = 0) -> optax.Schedule:
    if not warmup_steps:
        return optax.constant_schedule(value)
    return optax.linear_schedule(0.0, value, warmup_steps)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "warmup_cosine": _warmup_cosine,
}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": optax.sgd,
}


def schedule(name: str, **options: Any) -> optax.Schedule:
    """Learning-rate schedule by name.

    Args:
      name: "constant" (value, warmup_steps), "linear" or "warmup_cosine" (peak, steps,
        warmup_steps, end; the latter also init). `steps` counts the warm-up in.
      **options: as named.

    Returns:
      An optax schedule.

    Raises:
      ValueError: on a name or option that does not exist, or one that is missing.

    >>> [round(float(schedule("linear", peak=1.0, steps=4)(t)), 2) for t in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    make = _lookup("schedule", SCHEDULES, name)
    _check_options("schedule", name, make, options)
    warmup, steps = options.get("warmup_steps", 0), options.get("steps")
    if warmup < 0 or (steps is not None and steps <= warmup):
        raise ValueError(
            f"schedule: {name!r} wants 0 <= warmup_steps < steps, "
            f"found warmup_steps={warmup}, steps={steps}"
        )
    return make(**options)


def optimizer(
    name: str,
    learning_rate: float | Named | optax.Schedule,
    *,
    clip_norm: float | None = None,
    no_decay: Sequence[str] = (),
    **options: Any,
) -> optax.GradientTransformation:
    """Optimizer by name: clipping of the global norm, then the update.

    Args:
      name: one of "adam", "adamw", "lion", "sgd".
      learning_rate: a number, `(schedule name, options)`, or an optax schedule.
      clip_norm: largest global norm of the gradient; None leaves it alone.
      no_decay: regexes on leaf paths; leaves one of them is found in get no weight
        decay. Each must match a trained leaf.
      **options: passed to the optax function of that name.

    Returns:
      An optax transformation.

    Raises:
      ValueError: on a name or option that does not exist; when first used on
        parameters, on a `no_decay` regex that matches nothing.

    >>> tx = optimizer("sgd", 0.5, momentum=0.9)
    >>> updates, _ = tx.update({"w": 2.0}, tx.init({"w": 0.0}))
    >>> float(updates["w"])
    -1.0
    """
    make = _lookup("optimizer", OPTIMIZERS, name)
    _check_options("optimizer", name, make, {"learning_rate": 0, **options})
    if no_decay:
        if "mask" not in inspect.signature(make).parameters:
            raise ValueError(f"optimizer: {name!r} has no weight decay, found no_decay")
        options["mask"] = _decay_mask(tuple(no_decay))
    if isinstance(learning_rate, (int, float)) and not 0 <= learning_rate < math.inf:
        raise ValueError(
            f"optimizer: learning_rate wants a finite number >= 0, found "
            f"{learning_rate}"
        )
    if isinstance(learning_rate, Sequence):
        kind, rest = learning_rate
        learning_rate = schedule(kind, **rest)
    tx = make(learning_rate, **options)
    if clip_norm is None:
        return tx
    if not clip_norm > 0:
        raise ValueError(
            f"optimizer: clip_norm wants a positive norm, found {clip_norm}"
        )
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def over_steps(steps: int, options: Mapping[str, Any]) -> optax.GradientTransformation:
    """Optimizer from plain data, its schedule laid over the steps of a run.

    Args:
      steps: of the run.
      options: `name` and `peak` learning rate; `warmup`, a fraction of the steps with
        a linear rise (default none); `decay`, whether a cosine to zero follows
        (default) or a constant; and what else `optimizer` takes.

    Returns:
      An optax transformation.

    Raises:
      ValueError: without a name or peak, and as `optimizer` and `schedule`.
    """
    rest = dict(options)
    missing = [name for name in ("name", "peak") if name not in rest]
    if missing:
        raise ValueError(f"over_steps: options lack {', '.join(missing)}")
    peak, warmup_steps = rest.pop("peak"), round(rest.pop("warmup", 0.0) * steps)
    if rest.pop("decay", True):
        cosine = {"peak": peak, "steps": steps, "warmup_steps": warmup_steps}
        rate = ("warmup_cosine", cosine)
    else:
        rate = ("constant", {"value": peak, "warmup_steps": warmup_steps})
    return optimizer(rest.pop("name"), rate, **rest)


def _decay_mask(patterns: tuple[str, ...]) -> Callable[[Any], Any]:
    compiled = [re.compile(pattern) for pattern in patterns]

    def mask(params: Any) -> Any:
        names = mtl_tree.paths(params)
        for pattern in compiled:
            if not any(pattern.search(name) for name in names):
                raise ValueError(
                    f"optimizer: no_decay pattern {pattern.pattern!r} matches none of "
                    f"the {len(names)} trained leaves, such as {names[:3]}"
                )
        return mtl_tree.map_with_path(
            lambda name, _: not any(p.search(name) for p in compiled), params
        )

    return mask


def _lookup(kind: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        close = difflib.get_close_matches(str(name).lower(), table, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{kind}: found {name!r}, wanted one of {sorted(table)}{hint}")
    return table[name]


def _check_options(
    kind: str, name: str, make: Callable[..., Any], options: Mapping[str, Any]
) -> None:
    known = inspect.signature(make).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{kind}: {name!r} takes no {unknown[0]!r}, only {sorted(known)}"
        )
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{kind}: {key} wants a finite number, found {value}")
    missing = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty and key not in options
    ]
    if missing:
        raise ValueError(f"{kind}: {name!r} wants {missing[0]!r}")
