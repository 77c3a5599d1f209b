"""Grain pipelines: deterministic, sharded by host, resumable from one index.

Everything here returns a `grain.MapDataset`: a pure function from a position to an
element. Iterating it keeps a state of one number, `{"next_index": n}`, plain JSON;
setting it back continues exactly. Reading uses threads, never worker processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_jax.data.order import Ordered
from mtl_jax.data.transforms import Element, Transform

if TYPE_CHECKING:
    import grain

_CHUNK = 1024

RandomTransform = Callable[[Element, np.random.Generator], Element]


def _rows(
    source: Sequence[Element],
    *,
    seed: int,
    transform: Transform | None,
    random_transform: RandomTransform | None = None,
    shuffle: bool,
    repeat: bool,
    shard_index: int,
    num_shards: int,
) -> grain.MapDataset:
    """The shared front: this host's rows in order, transformed."""
    import grain

    order = Ordered(
        source,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
        shard_index=shard_index,
        num_shards=num_shards,
    )
    data = grain.MapDataset.source(order).seed(seed % 2**32)
    if transform is not None:
        data = data.map(transform)
    if random_transform is not None:
        data = data.random_map(random_transform)
    return data


def _check_numbers(fn_name: str, batch_size: int, seed: int) -> None:
    if batch_size < 1:
        raise ValueError(f"{fn_name}: batch_size wants at least 1, found {batch_size}")
    if seed < 0:
        raise ValueError(f"{fn_name}: seed wants at least 0, found {seed}")


def pipeline(
    source: Sequence[Element],
    *,
    batch_size: int,
    seed: int = 0,
    transform: Transform | None = None,
    random_transform: RandomTransform | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    shard_index: int = 0,
    num_shards: int = 1,
    drop_remainder: bool = True,
) -> grain.MapDataset:
    """Batches of one task, for training by default.

    Args:
      source: random-access elements, e.g. from `load_source`.
      batch_size: B, rows per batch on this host.
      seed: decides order and random transforms, together with the epoch.
      transform: element -> dict of arrays of equal shapes; see `data.transform`.
      random_transform: (element, generator) -> element, after `transform`.
      shuffle: a new order every epoch.
      repeat: endless; otherwise one pass.
      shard_index: this host's share, e.g. `jax.process_index()`.
      num_shards: number of hosts. Shares are disjoint in every epoch and cover the
        source, except that endless pipelines leave out `len(source) % num_shards`
        rows, other ones each epoch.
      drop_remainder: leave out a last batch of fewer than B rows.

    Returns:
      A `grain.MapDataset` of dicts of NumPy arrays with a leading B.

    Raises:
      ValueError: a bad shard, or a source too small to fill one batch.
    """
    _check_numbers("pipeline", batch_size, seed)
    share = len(source) // max(num_shards, 1)
    if drop_remainder and not repeat and share < batch_size:
        raise ValueError(
            f"pipeline: {share} rows per shard never fill a batch of {batch_size}; "
            "pass drop_remainder=False"
        )
    data = _rows(
        source,
        seed=seed,
        transform=transform,
        random_transform=random_transform,
        shuffle=shuffle,
        repeat=repeat,
        shard_index=shard_index,
        num_shards=num_shards,
    )
    return data.batch(batch_size, drop_remainder=drop_remainder)


def evaluation(
    source: Sequence[Element],
    *,
    batch_size: int,
    transform: Transform | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.MapDataset:
    """Every row once, in order; the last batch may be smaller."""
    return pipeline(
        source,
        batch_size=batch_size,
        transform=transform,
        shuffle=False,
        repeat=False,
        shard_index=shard_index,
        num_shards=num_shards,
        drop_remainder=False,
    )


def mixture_weights(sizes: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Sampling proportions of tasks.

      p[t] = sizes[t]^(1 / temperature) / sum_u sizes[u]^(1 / temperature)

    Args:
      sizes: T row counts.
      temperature: 1 samples in proportion to size; large values approach uniform.

    Returns:
      [T] float64 that sums to one.

    Raises:
      ValueError: a size or the temperature is not positive.

    Example:
      >>> mixture_weights([100, 400], temperature=2.0).round(3).tolist()
      [0.333, 0.667]
    """
    sizes_array = np.asarray(sizes, np.float64)
    if not temperature > 0 or not np.all(sizes_array > 0):
        raise ValueError(
            f"mixture_weights: sizes {list(sizes)} and temperature {temperature} must "
            "be positive"
        )
    logits = np.log(sizes_array) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _tag(task: int, element: Element) -> dict[str, Any]:
    return {**element, "task": np.int32(task)}


def _per_task(values: Any, names: Sequence[Any]) -> list[Any]:
    """One value per task from a mapping by name, a sequence, or one for all."""
    if isinstance(values, Mapping):
        if set(values) != set(names):
            raise ValueError(
                f"mixture: per-task values are for {list(values)}, tasks are "
                f"{list(names)}"
            )
        return [values[name] for name in names]
    if isinstance(values, (list, tuple, np.ndarray)):
        if len(values) != len(names):
            raise ValueError(f"mixture: {len(values)} values for {len(names)} tasks")
        return list(values)
    return [values] * len(names)


def _named(
    sources: Mapping[str, Sequence[Element]] | Sequence[Sequence[Element]],
) -> tuple[list[Any], list[Sequence[Element]]]:
    if not sources:
        raise ValueError("mixture: no sources")
    if isinstance(sources, Mapping):
        return list(sources), list(sources.values())
    return list(range(len(sources))), list(sources)


def mixture(
    sources: Mapping[str, Sequence[Element]] | Sequence[Sequence[Element]],
    *,
    batch_size: int,
    seed: int = 0,
    transform: Any = None,
    weights: Any = None,
    temperature: float = 1.0,
    single_task_batches: bool = False,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.MapDataset:
    """Endless batches that mix tasks in fixed proportions.

    Tasks are interleaved deterministically, so every window of the stream keeps the
    proportions as closely as whole rows allow.

    Args:
      sources: T sources, by name or in order.
      batch_size: B, rows per batch on this host.
      seed: as for `pipeline`; each task has its own order.
      transform: one for all tasks, or one per task (mapping or sequence). Unless
        `single_task_batches`, all must give equal shapes.
      weights: T proportions (mapping or sequence), scaled to sum to one; default
        `mixture_weights(sizes, temperature)`.
      temperature: see `mixture_weights`; used when `weights` is None.
      single_task_batches: each batch comes from one task, and proportions are kept
        between batches.
      shard_index: as for `pipeline`.
      num_shards: as for `pipeline`.

    Returns:
      A `grain.MapDataset`; batches have an extra entry `task`, int32[B].

    Raises:
      ValueError: weights that are negative, all zero, or for other tasks.
    """
    import grain

    _check_numbers("mixture", batch_size, seed)
    names, rows = _named(sources)
    if weights is None:
        weights = mixture_weights([len(source) for source in rows], temperature)
    share = np.asarray(_per_task(weights, names), np.float64)
    if not (np.all(np.isfinite(share)) and np.all(share >= 0) and share.sum() > 0):
        raise ValueError(f"mixture: weights {share.tolist()} are not proportions")
    parts, kept = [], []
    for index, (source, function) in enumerate(
        zip(rows, _per_task(transform, names), strict=True)
    ):
        if share[index] == 0:
            continue
        part = _rows(
            source,
            seed=_task_seed(seed, index),
            transform=function,
            shuffle=True,
            repeat=True,
            shard_index=shard_index,
            num_shards=num_shards,
        ).map(functools.partial(_tag, index))
        parts.append(part.batch(batch_size) if single_task_batches else part)
        kept.append(share[index] / share.sum())
    mixed = grain.MapDataset.mix(parts, kept)
    return mixed if single_task_batches else mixed.batch(batch_size)


def _task_seed(seed: int, index: int) -> int:
    """An independent seed per task, within Grain's 32 bits."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


class _Lockstep:
    """Position n -> batch n of every task, stacked."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = parts

    def __len__(self) -> int:
        return min(len(part) for part in self._parts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batches = [part[index] for part in self._parts]
        return {key: np.stack([b[key] for b in batches]) for key in batches[0]}

    def __repr__(self) -> str:
        return f"Lockstep(tasks={len(self._parts)})"


def lockstep(
    sources: Mapping[str, Sequence[Element]] | Sequence[Sequence[Element]],
    *,
    batch_size: int,
    seed: int = 0,
    transform: Any = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.MapDataset:
    """Endless steps with one batch of every task: leaves [T, B, ...].

    What per-task gradients and losses need: every task in every step, the task axis
    leading. Tasks repeat at their own pace. Arguments as for `mixture`; transforms
    must give equal shapes.
    """
    import grain

    names, rows = _named(sources)
    parts = [
        pipeline(
            source,
            batch_size=batch_size,
            seed=_task_seed(seed, index),
            transform=function,
            shard_index=shard_index,
            num_shards=num_shards,
        )
        for index, (source, function) in enumerate(
            zip(rows, _per_task(transform, names), strict=True)
        )
    ]
    return grain.MapDataset.source(_Lockstep(parts))


def iterate(
    data: grain.MapDataset, *, num_threads: int = 4, buffer: int = 8
) -> grain.DatasetIterator:
    """An iterator that reads ahead with threads.

    Args:
      data: from any function of this module.
      num_threads: 0 reads in the caller's thread.
      buffer: most elements read ahead.

    Returns:
      An iterator with `get_state() -> {"next_index": n}` and `set_state`.
    """
    import grain

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer)
    return iter(data.to_iter_dataset(options))


class ArraySource:
    """A source over arrays in memory: element n is row n of every array."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        """Arrays with equal leading sizes.

        Raises:
          ValueError: no arrays, or sizes that differ.
        """
        sizes = {key: len(value) for key, value in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"ArraySource: leading sizes must be equal, found {sizes}")
        self._arrays = dict(arrays)
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[index] for key, value in self._arrays.items()}

    def __repr__(self) -> str:
        return f"ArraySource({', '.join(self._arrays)}: {self._size} rows)"


def to_arrays(
    source: Sequence[Element],
    transform: Transform | None = None,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """The first `limit` elements (all by default), transformed and stacked."""
    size = len(source) if limit is None else min(limit, len(source))
    if size == 0:
        raise ValueError("to_arrays: no rows")
    found = [transform(row) if transform else row for row in _read(source, size)]
    return {key: np.stack([row[key] for row in found]) for key in found[0]}


def _read(source: Sequence[Element], size: int) -> Iterator[Element]:
    """The first `size` rows, many at a time where the source can do that."""
    many = getattr(source, "__getitems__", None)
    if many is None:
        yield from (source[i] for i in range(size))
        return
    for start in range(0, size, _CHUNK):
        yield from many(range(start, min(start + _CHUNK, size)))
