"""What can be done to one tensor: the rules of streamed merges and their options.

Names and options are mergekit's where both have the method. A rule sees one tensor of
all models at a time. Its *scope* says how much it needs at once: "entry", one pass over
chunks; "tensor", statistics of the tensor first, still chunk by chunk; "model", of all
tensors. A rule that is *whole* reads its tensor as a whole and goes through the pure
function of `mtl_jax.merging`, which needs room for (N + 2) such tensors in float32.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_jax.checkpoints._rule_table import RULES
from mtl_jax.checkpoints._rule_types import REQUIRED, Job, Option, Rule

__all__ = [
    "REQUIRED",
    "RULES",
    "Job",
    "Option",
    "Rule",
    "check",
    "is_copied",
    "resolve",
]


def _fail(job: Job, message: str) -> ValueError:
    return ValueError(f"{job.rule}: {job.name!r}: {message}")


def _known(name: str, known: Mapping[str, Any], what: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {what} {name!r}{hint} (known: {', '.join(sorted(known))})"


def resolve(job: Job) -> dict[str, Any]:
    """The options of a job with defaults filled in, per-model ones as tuples.

    Raises:
      ValueError: an option that does not exist, is missing, or does not fit; it names
        rule, tensor, option, what was wanted and what was found.
    """
    rule, count = RULES[job.rule], len(job.experts)
    for name in job.options:
        if name not in rule.options:
            raise _fail(job, _known(name, rule.options, "option"))
    found = {}
    for name, option in rule.options.items():
        value = job.options.get(name, option.default)
        if value is REQUIRED:
            raise _fail(job, f"option {name!r} is missing")
        if option.per_model:
            value = (
                tuple(value) if isinstance(value, list | tuple) else (value,) * count
            )
            if len(value) != count:
                raise _fail(
                    job,
                    f"option {name!r} has {len(value)} values, wanted {count}, one "
                    "per model",
                )
        values = value if option.per_model else (value,)
        for one in values:
            problem = "" if one is None is option.default else option.problem(one)
            if problem:
                raise _fail(job, f"option {name!r} is {one!r}, {problem}")
        found[name] = value
    problem = rule.test(found)
    if problem:
        raise _fail(job, problem)
    return found


def _is_float(dtype: np.dtype) -> bool:
    # The kind of bfloat16 and its like is that of raw bytes.
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def is_copied(job: Job) -> bool:
    """Whether the tensor holds no numbers to merge: integers and booleans."""
    return not _is_float(np.dtype(job.views[0].spec.dtype))


def check(job: Job) -> None:
    """Refuses a job that cannot be run, before anything is read.

    Raises:
      ValueError: naming rule, tensor, option, what was wanted and what was found.
    """
    if job.rule not in RULES:
        raise ValueError(f"{job.name!r}: {_known(job.rule, RULES, 'rule')}")
    rule, count = RULES[job.rule], len(job.experts)
    if rule.needs_base and job.base is None:
        raise _fail(job, "there is no base, which this rule needs")
    if job.base is not None and not rule.takes_base:
        raise _fail(job, "there is a base, which this rule has no use for")
    if count < rule.min_experts or count > (rule.max_experts or count):
        most = "" if rule.max_experts is None else f" to {rule.max_experts}"
        raise _fail(
            job,
            f"there are {count} models beside the base, wanted "
            f"{rule.min_experts}{most or ' or more'}",
        )
    if job.models and len(job.models) != count:
        raise _fail(job, f"{len(job.models)} names for {count} models")
    resolve(job)
    _check_views(job)


def _check_views(job: Job) -> None:
    copied = is_copied(job)
    for index, view in enumerate(job.views):
        where, dtype = job.model(index), np.dtype(view.spec.dtype)
        if tuple(view.spec.shape) != tuple(job.spec.shape):
            raise _fail(
                job,
                f"{where} has shape {tuple(view.spec.shape)}, wanted "
                f"{tuple(job.spec.shape)}",
            )
        if dtype.kind == "c":
            raise _fail(job, f"{where} is {dtype}, wanted a real dtype")
        if copied and dtype != job.views[0].spec.dtype:
            raise _fail(
                job, f"{where} is {dtype}, {job.model(0)} {job.views[0].spec.dtype}"
            )
        if not copied and not _is_float(dtype):
            raise _fail(job, f"{where} is {dtype}, wanted floating point")
    if copied and np.dtype(job.spec.dtype) != job.views[0].spec.dtype:
        raise _fail(
            job,
            f"to be written as {job.spec.dtype}, but {job.model(0)} is "
            f"{job.views[0].spec.dtype}, which is copied",
        )
    if not copied and not _is_float(np.dtype(job.spec.dtype)):
        raise _fail(job, f"to be written as {job.spec.dtype}, wanted floating point")
