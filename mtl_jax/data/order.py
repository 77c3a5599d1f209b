"""The order in which rows are visited: a pure function of seed, epoch and shard."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np


class Ordered:
    """A source re-ordered for one host, once or for ever.

    Position p belongs to epoch p // share; within it, host i of n takes entries
    i, i + n, i + 2n ... of that epoch's permutation of all rows. Permutations are
    made when first needed and the last two are kept (4 bytes a row), so reading is
    as cheap for ten rows as for a million.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        shard_index: int = 0,
        num_shards: int = 1,
    ):
        """Makes the view.

        Args:
          source: random-access rows.
          seed: decides the permutations.
          shuffle: a new permutation every epoch; otherwise the source's order.
          repeat: endless. All hosts then have shares of equal size, or their epochs
            would drift apart and overlap: `len(source) % num_shards` rows are left
            out of each epoch.
          shard_index: this host.
          num_shards: number of hosts.

        Raises:
          ValueError: no such shard, or fewer rows than shards.
        """
        rows = len(source)
        if not 0 <= shard_index < num_shards:
            raise ValueError(
                f"pipeline: shard_index {shard_index} is not in 0..{num_shards - 1}"
            )
        if rows < num_shards:
            raise ValueError(f"pipeline: {rows} rows cannot feed {num_shards} shards")
        stop = rows - rows % num_shards if repeat else rows
        self._source = source
        self._take = slice(shard_index, stop, num_shards)
        self._share = len(range(shard_index, stop, num_shards))
        self._repeat = repeat
        self._seed = seed
        self._shuffle = shuffle
        self._rows = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rows = np.arange(len(self._source), dtype=np.uint32)
        if self._shuffle:
            np.random.default_rng([self._seed, epoch]).shuffle(rows)
        return rows[self._take]

    def __len__(self) -> int:
        return sys.maxsize if self._repeat else self._share

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(int(position), self._share)
        return self._source[int(self._rows(epoch)[place])]

    def __repr__(self) -> str:
        return f"Ordered({self._source!r}, seed={self._seed}, take={self._take})"
