"""Entries selected by chance, and what was drawn kept for later passes."""

from typing import Any

import jax
import numpy as np

from mtl_jax.checkpoints import _draw_programs
from mtl_jax.checkpoints._stream import KEPT, Chunk
from mtl_jax.checkpoints._thresholds import ALL
from mtl_jax.checkpoints._work import Work, halves


class Coin:
    """Selects each entry with the probability of its task, drawn in every pass."""

    kind, rows = "coin", False

    def __init__(self, work: Work):
        density = work.weights("density")
        edges = np.floor(np.clip(density, 0, 1) * 2.0**32)
        self._args = {
            "keys": work.keys(),
            "edges": np.minimum(edges, ALL).astype(np.uint32),
            "always": density >= 1,
        }

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """Keys, edges, and where the chunk starts."""
        return {**self._args, "start": halves(chunk.start)}


class Drawn:
    """Draws once, and keeps one bit per entry and task unless the tensor is too large.

    Args:
      work: the job.
    """

    kind = "mask"

    def __init__(self, work: Work):
        self._keeps = work.stream.size * -(-work.count // 8) <= KEPT
        self._masks: dict[int, np.ndarray] = {}

    def args(self, chunk: Chunk) -> dict[str, Any]:
        """The mask of what was drawn."""
        mask = self._masks.get(chunk.number)
        if mask is None:
            mask = np.asarray(self._draw(chunk))
            if self._keeps:
                self._masks[chunk.number] = mask
        return {"mask": mask}

    def _draw(self, chunk: Chunk) -> jax.Array:
        raise NotImplementedError


class Coins(Drawn):
    """Selects what `Coin` does, for rules of two passes."""

    rows = False

    def __init__(self, work: Work):
        super().__init__(work)
        self._coin = Coin(work)

    def _draw(self, chunk: Chunk) -> jax.Array:
        args = self._coin.args(chunk)
        return _draw_programs.coin_mask(args, length=chunk.data.shape[1])
