"""Multi-task problems: what they ask, and their rows.

Two shapes of problem. *One input, many labels*: every row is a flat dict of the input
and one label per task. *Multi-input*: every row belongs to one task and is a flat
dict of the input, `label` and `task`, the task's number.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mtl_jax.data import pipelines, sources, transforms
from mtl_jax.data import task as task_lib

if TYPE_CHECKING:
    import grain

Kind = Literal["classification", "regression", "binary"]


class Target(NamedTuple):
    """One task of a problem.

    Attributes:
      name: also the label's key, but in multi-input problems.
      kind: "classification" has an int32 class, "binary" an int32 0 or 1,
        "regression" float32.
      size: width of a model's output: the classes, 1 for binary, the dimensions of a
        regression.
      higher_is_better: of `metric`.
      metric: what the task is judged by.
      dense: one label per pixel.
    """

    name: str
    kind: Kind
    size: int
    higher_is_better: bool
    metric: str
    dense: bool = False


class Input(NamedTuple):
    """Shape and dtype of one input of one row, as `load` gives it."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTask:
    """A problem of several tasks.

    Attributes:
      name: registry name.
      tasks: T targets in task order.
      inputs: what each row holds beside its labels.
      multi_input: whether rows belong to one task each.
      licence: of the data, as far as its package states it.
      source: what the rows are, where they come from, and how they were made.
      members: single-task names, for problems that are put together of such.
      tfds_name: for the papers' sets, the name in TFDS.
      splits: maps `train`, `validation`, `test` to TFDS split expressions.
      missing: why TFDS cannot give the problem, where it cannot.
    """

    name: str
    tasks: tuple[Target, ...]
    inputs: Mapping[str, Input]
    multi_input: bool = False
    licence: str
    source: str
    members: tuple[str, ...] = ()
    tfds_name: str = ""
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: str = ""

    def __post_init__(self):
        found = [target.name for target in self.tasks]
        if not found or len(set(found)) != len(found):
            raise ValueError(f"MultiTask {self.name!r}: task names {found} must differ")

    @property
    def task_names(self) -> tuple[str, ...]:
        """T names in task order."""
        return tuple(target.name for target in self.tasks)

    @property
    def outputs(self) -> dict[str, int]:
        """Task name -> width of its output: what the architectures take."""
        return {target.name: target.size for target in self.tasks}

    @property
    def labels(self) -> dict[str, np.dtype]:
        """Keys of a row that are no inputs, and their dtypes."""
        if self.multi_input:
            return {"label": _label_dtype(self.tasks[0]), "task": np.dtype(np.int32)}
        return {target.name: _label_dtype(target) for target in self.tasks}


def _label_dtype(target: Target) -> np.dtype:
    return np.dtype(np.float32 if target.kind == "regression" else np.int32)


def problems() -> dict[str, MultiTask]:
    """All registered problems by name."""
    from mtl_jax.data import multitask_problems

    return {**multitask_problems.PROBLEMS, **multitask_problems.PAPER_PROBLEMS}


def names() -> list[str]:
    """The names that `get` knows."""
    return sorted(problems())


def get(name: str) -> MultiTask:
    """The problem called `name`.

    Raises:
      ValueError: no such problem; the message lists those that exist.
    """
    known = problems()
    if name not in known:
        raise ValueError(
            f"unknown multi-task problem {name!r}; known: {', '.join(sorted(known))}"
        )
    return known[name]


def load_source(name: str, split: str, data_dir: Any = None) -> Sequence:
    """A split of a problem as a sequence of raw elements; see `data.load_source`.

    Raises:
      ValueError: unknown problem or split, a problem that TFDS does not have or has
        not prepared, or one that is put together of several tasks.
    """
    problem = get(name)
    if problem.missing:
        raise ValueError(f"multitask.load_source: {name!r}: {problem.missing}")
    if problem.members:
        raise ValueError(
            f"multitask.load_source: {name!r} has one source per task; use "
            "`data.load_source` of each, `task_batches` or `load`"
        )
    return sources.multitask_source(problem, split, data_dir)


class Convert:
    """From a raw element of a problem to what models take.

    uint8 inputs become float32 in [0, 1]; labels become int32 or float32.
    """

    def __init__(self, problem: MultiTask):
        """The transform of `problem`."""
        from mtl_jax.data import multitask_problems

        self._problem = problem
        self._unpack = multitask_problems.UNPACK.get(problem.name)

    def __repr__(self) -> str:
        return f"Convert({self._problem.name!r})"

    def __call__(self, element: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Converts one element."""
        if self._unpack is not None:
            element = self._unpack(element)
        found = {}
        for key, wanted in self._problem.inputs.items():
            value = np.asarray(element[key])
            if value.dtype == np.uint8 and wanted.dtype == "float32":
                if value.ndim == 3 and value.shape != wanted.shape:
                    value = transforms.resize(value, wanted.shape[0])
                value = value.astype(np.float32) / np.float32(255)
            found[key] = value.astype(wanted.dtype)
        for key, dtype in self._problem.labels.items():
            found[key] = np.asarray(element[key], dtype)
        return found


def load(
    name: str,
    split: str,
    limit: int | None = None,
    *,
    data_dir: Any = None,
    tokenizer: Any = None,
) -> dict[str, np.ndarray]:
    """A split of a problem as arrays in memory.

    Args:
      name: see `names()`.
      split: `train`, `validation` or `test`.
      limit: first rows only; of each task, where the problem is put together.
      data_dir: where prepared data sets are.
      tokenizer: for texts; default MiniLM's.

    Returns:
      Flat dict of arrays that lead with the rows: the inputs and one label per task,
      or, for a multi-input problem, the inputs, `label` and `task`.

    Raises:
      ValueError: as for `load_source`.
    """
    problem = get(name)
    if not problem.members:
        source = load_source(name, split, data_dir)
        return pipelines.to_arrays(source, Convert(problem), limit)
    parts = []
    converters = _member_transforms(problem.members, tokenizer)
    for number, member in enumerate(problem.members):
        rows = sources.load_source(member, split, data_dir)
        part = pipelines.to_arrays(rows, converters[number], limit)
        size = len(part["label"])
        parts.append({**part, "task": np.full(size, number, np.int32)})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _member_transforms(members: Sequence[str], tokenizer: Any) -> list:
    """One transform per task, all of the same shapes."""
    tasks = [task_lib.get(member) for member in members]
    length = max((task.length for task in tasks), default=0) or None
    return [
        transforms.transform(task, tokenizer=tokenizer, length=length) for task in tasks
    ]


def stack_by_task(
    arrays: Mapping[str, np.ndarray], num_tasks: int
) -> dict[str, np.ndarray]:
    """Rows of a multi-input problem, sorted into their tasks and padded.

    Args:
      arrays: from `load`: leaves [N, ...] with `task`, int32[N].
      num_tasks: T.

    Returns:
      The other leaves as [T, M, ...], M the rows of the largest task, and `mask`,
      bool[T, M], False where there is no row (and the other leaves are zero).

    Raises:
      ValueError: a task number outside 0 .. T - 1.

    >>> stack_by_task({"x": np.array([5, 6, 7]), "task": np.array([1, 0, 1])}, 2)["x"]
    array([[6, 0],
           [5, 7]])
    """
    task = np.asarray(arrays["task"])
    if task.size and not 0 <= task.min() <= task.max() < num_tasks:
        raise ValueError(
            f"stack_by_task: tasks {task.min()} to {task.max()}, wanted 0 to "
            f"{num_tasks - 1}"
        )
    order = np.argsort(task, kind="stable")
    counts = np.bincount(task, minlength=num_tasks)
    place = np.arange(len(task)) - np.repeat(np.cumsum(counts) - counts, counts)
    where = task[order], place
    found = {}
    for key, value in {**arrays, "mask": np.ones(len(task), bool)}.items():
        if key != "task":
            shape = (num_tasks, counts.max(initial=0), *value.shape[1:])
            found[key] = np.zeros(shape, value.dtype)
            found[key][where] = value[order]
    return found


def task_sources(
    names: str | Sequence[str],
    split: str,
    *,
    limit: int | None = None,
    data_dir: Any = None,
    tokenizer: Any = None,
) -> tuple[dict[str, Sequence], list | None]:
    """One source per task, and one transform per task or None.

    Args:
      names: a multi-input problem, or the names of single tasks.
      split: `train`, `validation` or `test`.
      limit: first rows only, of each task.
      data_dir: where prepared data sets are.
      tokenizer: for texts; default MiniLM's.

    Raises:
      ValueError: unknown names, a problem whose rows have all labels, or a task
        without a row in the split.
    """
    members = names
    if isinstance(names, str):
        problem = get(names)
        if not problem.multi_input:
            raise ValueError(
                f"task_batches: the rows of {names!r} have all labels; use `pipeline`"
            )
        members = problem.members
        if not members:
            return _split_up(
                problem, load(names, split, data_dir=data_dir), limit
            ), None
    found = {}
    for name in members:
        found[name] = sources.load_source(name, split, data_dir)
        if limit is not None and limit < len(found[name]):
            found[name] = sources.load_source(name, f"{split}[:{limit}]", data_dir)
    return found, _member_transforms(tuple(members), tokenizer)


def _split_up(problem: MultiTask, arrays, limit) -> dict[str, Sequence]:
    task = arrays.pop("task")
    found = {}
    for number, name in enumerate(problem.task_names):
        rows = np.flatnonzero(task == number)[:limit]
        if not len(rows):
            raise ValueError(f"task_batches: {problem.name!r}: {name!r} has no rows")
        own = {key: value[rows] for key, value in arrays.items()}
        found[name] = pipelines.ArraySource(own)
    return found


def task_batches(
    names: str | Sequence[str],
    *,
    batch_size: int,
    split: str = "train",
    seed: int = 0,
    stacked: bool = True,
    weights: Any = None,
    temperature: float = 1.0,
    limit: int | None = None,
    data_dir: Any = None,
    tokenizer: Any = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> "grain.MapDataset":
    """Endless batches for tasks that have inputs of their own.

    Args:
      names: a multi-input problem (`text_six`, `schools`), or the names of single
        tasks, all texts or all images.
      batch_size: B: rows of every task if `stacked`, else of all together.
      split: `train`, `validation` or `test`.
      seed: decides the order; each task has its own.
      stacked: leaves [T, B, ...], every task in every step; otherwise leaves
        [B, ...] that mix tasks, with `task`, int32[B].
      weights: proportions of the mixture; see `mixture`.
      temperature: see `mixture`.
      limit: first rows only, of each task.
      data_dir: where prepared data sets are.
      tokenizer: for texts; default MiniLM's.
      shard_index: as for `pipeline`.
      num_shards: as for `pipeline`.

    Returns:
      A `grain.MapDataset`. Texts of all tasks have the length of the longest task's.

    Raises:
      ValueError: as for `task_sources`, or bad numbers.
    """
    rows, converters = task_sources(
        names, split, limit=limit, data_dir=data_dir, tokenizer=tokenizer
    )
    shared = {
        "batch_size": batch_size,
        "seed": seed,
        "transform": converters,
        "shard_index": shard_index,
        "num_shards": num_shards,
    }
    if stacked:
        return pipelines.lockstep(rows, **shared)
    return pipelines.mixture(rows, weights=weights, temperature=temperature, **shared)
