"""Cross-stitch networks: one column per task, mixed after every stage."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from mtl_jax.models.multitask.base import Factory, MultiTaskModule


class StitchMatrix(nn.Module):
    """The matrix of one mixing, float32.

    Attributes:
      count: T.
      keep: diagonal at the start; the rest of each row is shared out equally.
      per_channel: [T, T, C] instead of [T, T].
    """

    count: int
    keep: float = 0.9
    per_channel: bool = False

    @nn.compact
    def __call__(self, channels: int) -> chex.Array:
        """Args: channels: C. Returns: [T, T] or [T, T, C]."""
        rest = (1 - self.keep) / max(self.count - 1, 1)
        start = jnp.full((self.count, self.count), rest, jnp.float32)
        start = jnp.where(jnp.eye(self.count, dtype=bool), self.keep, start)
        if self.per_channel:
            start = jnp.repeat(start[..., None], channels, -1)
        return self.param("matrix", lambda key: start)


class CrossStitch(MultiTaskModule, kw_only=True):
    r"""Columns of equal architecture whose features are mixed linearly.

    After stage l, with a column x_t per task and learned A of shape [T, T],

      x_t <- sum_s A[t, s] x_s

    Starts at A[t, t] = `keep` and equal shares of the rest; `keep=1` starts from
    independent columns. `z["shared"]` are the columns before the last mixing,
    [B, T, ...].

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      stages: makers of the stages; each is called once per task.
      keep: diagonal of A at the start.
      per_channel: one A per channel (the last axis) instead of one per stage.

    **Follows**: Misra et al. 2016, "Cross-Stitch Networks for Multi-task Learning",
    section 3.

    **Differs**: A follows every stage, the last one included.
    """

    stages: Sequence[Factory]
    keep: float = 0.9
    per_channel: bool = False

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """All columns and matrices."""
        return ("^columns_", "^stitches_")

    def setup(self):
        """Makes T columns of stages, the matrices and the heads."""
        if not self.stages:
            raise ValueError("CrossStitch: stages must hold at least one maker")
        self.columns = [[make() for make in self.stages] for _ in self.outputs]
        self.stitches = [
            StitchMatrix(len(self.outputs), self.keep, self.per_channel)
            for _ in self.stages
        ]
        self.heads = self._make_heads()

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Args: what the first stage takes. Returns: {"shared": [B, T, ...]}."""
        found = jnp.stack([column[0](*inputs, **options) for column in self.columns], 1)
        for level in range(1, len(self.stages)):
            mixed = self._mix(level - 1, found)
            columns = [own[level](mixed[:, t]) for t, own in enumerate(self.columns)]
            found = jnp.stack(columns, 1)
        return {"shared": found}

    def feature(self, z, task: int) -> chex.Array:
        """The task's column after the last mixing."""
        return self._mix(-1, z["shared"], slice(task, task + 1))[:, 0]

    def _mix(self, level: int, columns: chex.Array, rows: slice = slice(None)):
        """[B, T, ..., C] -> the given rows of the mixed columns."""
        matrix = self.stitches[level](columns.shape[-1])[rows].astype(columns.dtype)
        equation = "tsc,bs...c->bt...c" if self.per_channel else "ts,bs...->bt..."
        return jnp.einsum(equation, matrix, columns)
