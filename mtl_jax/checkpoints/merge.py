"""Merges of checkpoint folders, by recipe."""

import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import sys
import time
from typing import Any

from mtl_jax import __version__
from mtl_jax.checkpoints import (
    _folder,
    _inputs,
    _plan,
    _target,
    card,
    engine,
    recipe,
    rules,
)
from mtl_jax.checkpoints._plan import Plan
from mtl_jax.checkpoints._schema import DTYPES, Recipe
from mtl_jax.checkpoints.writer import CheckpointWriter
from mtl_jax.report.table import Table

__all__ = ["Merged", "Plan", "check_out", "make_plan", "merge", "plan_table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did.

    Attributes:
      path: folder of the output.
      tensors: how many were written, those of an interrupted run included.
      resumed: how many of them an interrupted run had finished.
      summary: of the engine.
      seconds: from the plan to the finished folder.
    """

    path: str
    tensors: int
    resumed: int
    summary: Any
    seconds: float

    def table(self) -> Table:
        """Seconds, bytes, speed and memory of this process."""
        read, written = self.summary.bytes_read, self.summary.bytes_written
        return Table(
            title=f"Merged into {self.path}",
            columns=("tensors", "resumed", "read", "written", "s", "GB/s", "peak"),
            rows=(
                (
                    self.tensors,
                    self.resumed,
                    read,
                    written,
                    self.seconds,
                    (read + written) / max(self.seconds, 1e-9) / 1e9,
                    peak_memory(),
                ),
            ),
            formats={
                "read": "bytes",
                "written": "bytes",
                "s": ".1f",
                "GB/s": ".2f",
                "peak": "bytes",
            },
            caption="peak: resident memory of the process, mapped pages included",
        )


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_plan(
    source: str | os.PathLike[str] | Recipe, *, dtype: str | None = None
) -> Plan:
    """Reads a recipe, opens and verifies its models, and checks every tensor.

    Args:
      source: file of the recipe, or a recipe that was read.
      dtype: of the output, before what the recipe says.

    Raises:
      ValueError: for whatever the recipe or the models have wrong.
      FileNotFoundError: for a recipe or a file of a model that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"merge: dtype must be one of {DTYPES}; found {dtype!r}")
    read = source if isinstance(source, Recipe) else recipe.load_recipe(source)
    plan = _plan.make_plan(read, _inputs.open_inputs(read), dtype)
    _folder.folder_files(plan)  # Refuses what it cannot make.
    return plan


def plan_table(plan: Plan) -> Table:
    """What a merge is going to do."""
    rule = rules.RULES[plan.recipe.method]
    return Table(
        title="Plan",
        columns=("rule", "models", "tensors", "largest", "read", "write"),
        rows=(
            (
                rule.name,
                len(plan.inputs.checkpoints),
                len(plan.jobs),
                max((spec.nbytes for spec in plan.specs.values()), default=0),
                plan.read_bytes,
                plan.write_bytes,
            ),
        ),
        formats={"largest": "bytes", "read": "bytes", "write": "bytes"},
        caption="; ".join((rule.summary, *plan.notes)),
    )


def merge(
    source: str | os.PathLike[str] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    dtype: str | None = None,
    check_finite: bool = True,
    progress: Any = None,
) -> Merged:
    """Merges checkpoints into a folder, streaming; a killed merge resumes.

    Tensors are read in chunks, merged in float32 from the stored values, and rounded
    once. The folder gets the config and tokenizer of the base (else of the first
    model), a model card and the recipe; its index comes last.

    Args:
      source: file of a recipe, a recipe, or a plan.
      out: folder to make, or to resume.
      seed: of rules that draw.
      shard_bytes: most bytes of one file, or one tensor.
      overwrite: whether to replace what is in `out`.
      dtype: of the output: bfloat16, float16 or float32.
      check_finite: whether NaN and infinities in the inputs are refused.
      progress: called with the bytes written and those to write, after each tensor.

    Raises:
      ValueError: before anything is written, for whatever is wrong with recipe and
        models; while merging, for values that are not finite, by tensor and model.
    """
    started = time.monotonic()
    plan = source if isinstance(source, Plan) else make_plan(source, dtype=dtype)
    folder, files = _target.local_folder(out), output_files(plan, out, seed)
    _refuse_inputs(plan, folder)
    with CheckpointWriter(
        folder,
        plan.specs,
        plan=_digest(plan, seed),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        beside=files,
    ) as writer:
        done = len(writer.done)
        summary = engine.run(
            plan.jobs, writer, seed=seed, check_finite=check_finite, progress=progress
        )
        writer.finish(files)
    return Merged(
        path=str(out),
        tensors=len(plan.jobs),
        resumed=done,
        summary=summary,
        seconds=time.monotonic() - started,
    )


def check_out(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Refuses a folder that `merge` would refuse to write, and touches nothing.

    Raises:
      ValueError: for an input, or what must not be replaced.
      OSError: if there is no room, or no permission.
    """
    folder = _target.local_folder(out)
    _refuse_inputs(plan, folder)
    _target.check_target(
        folder,
        plan.specs,
        plan=_digest(plan, seed),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        beside=output_files(plan, out, seed),
    )


def output_files(
    plan: Plan, out: str | os.PathLike[str], seed: int
) -> dict[str, bytes | pathlib.Path]:
    """All files of the output beside its tensors: name -> content, or what to copy."""
    name = pathlib.Path(out).resolve().name
    text = card.model_card(plan, name=name, seed=seed, version=__version__)
    return {
        **_folder.folder_files(plan),
        "README.md": text.encode(),
        card.RECIPE_FILE: plan.recipe.text.encode(),
    }


def _refuse_inputs(plan: Plan, folder: pathlib.Path) -> None:
    for checkpoint in plan.inputs.checkpoints.values():
        _target.check_apart("merge", folder, checkpoint.source.paths)


def _digest(plan: Plan, seed: int) -> str:
    """Changes whenever the output's tensors would."""
    inputs = plan.inputs.checkpoints
    parts = {
        "version": __version__,
        "seed": seed,
        "recipe": plan.recipe.text,
        "rows": plan.inputs.mapping,
        "inputs": [[m.path, c.source.fingerprint] for m, c in inputs.items()],
        "specs": [[n, s.shape, s.dtype.name] for n, s in plan.specs.items()],
        "options": [sorted(job.options.items()) for job in plan.jobs],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
