"""The losses of a batch, one per task, whole or in microbatches."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding
from mtl_jax.train.accumulate import (
    join_batch,
    mean_over_microbatches,
    split_batch,
    split_blocks,
)
from mtl_jax.train.objective import Metrics, task_objective
from mtl_jax.train.state import TrainState, merge, split_shared
from mtl_jax.train.trainable import Trainable
from mtl_jax.transforms import aggregation, loops

Values = tuple[chex.Array, Metrics]


class TaskLosses:
    """Losses [T] float32 and metrics of a trainable with an aggregator.

    The loss of a task is the mean over its rows. Where microbatches hold different
    numbers of them, each microbatch counts by its share of the task's rows, as
    `Trainable.task_counts` tells, so that the mean over microbatches is the loss of the
    whole batch.

    Args:
      trainable: one with an aggregator.
      mesh: the mesh the batch is split over.
      accumulate: number of microbatches.
    """

    def __init__(self, trainable: Trainable, mesh: Mesh, accumulate: int):
        self.trainable, self.mesh, self.accumulate = trainable, mesh, accumulate

    def at(
        self, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey, shares: Any = 1
    ) -> Values:
        """Of one batch or microbatch, each loss times its share."""
        losses, metrics = task_objective(
            self.trainable.loss_fn, params, frozen, batch, key
        )
        return losses * jnp.asarray(shares, jnp.float32), metrics

    def mean(self, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey) -> Values:
        """Over all microbatches, each run again when it is differentiated."""
        if self.accumulate == 1:
            return self.at(params, frozen, batch, key)
        wide = jax.tree.map(lambda p: p.astype(mtl_tree.wide_dtype(p.dtype)), params)
        shares = self.shares(batch, self.accumulate)

        @jax.checkpoint
        def one(each):
            index, rows = each
            narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params)
            micro = join_batch(batch, rows)
            own = jax.random.fold_in(key, index)
            return self.at(narrow, frozen, micro, own, shares(micro))

        parts = split_batch(batch, self.mesh, self.accumulate)
        each = jnp.arange(self.accumulate), parts
        _, values = loops.scan(lambda _, x: ((), one(x)), (), each)
        return jax.tree.map(lambda v: jnp.mean(v, 0), values)

    def shares(self, batch: Any, parts: int) -> Callable[[Any], chex.Array]:
        """`shares(microbatch)`: what its losses count for, of mean 1 over the parts.

        One number [] where tasks have no rows of their own, else [T]. A task without
        rows may still have a loss, such as its part of a penalty: that counts alike.
        """
        if parts == 1 or self.trainable.task_counts is None:
            return lambda micro: jnp.ones((), jnp.float32)
        total = self._counts(batch)

        def of(micro):
            share = parts * self._counts(micro) / jnp.maximum(total, 1)
            return jnp.where(total > 0, share, 1)

        return of

    def known(self, losses: chex.Array, batch: Any) -> dict[str, chex.Array]:
        """What a method may read of the losses: themselves, which tasks are there."""
        if self.trainable.task_counts is None:
            return {"losses": losses, "present": jnp.ones(losses.shape, bool)}
        counts = self._counts(batch)
        if counts.shape != losses.shape:
            raise ValueError(
                f"train step: task_counts gives {counts.shape}, loss_fn "
                f"{losses.shape}: wanted both [T]"
            )
        return {"losses": losses, "present": counts > 0}

    def count(self, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey) -> int:
        """T; computes nothing."""
        found = jax.eval_shape(lambda p: self.at(p, frozen, batch, key), params)
        return found[0].shape[0]

    def vjp(
        self, params: Any, fn: Callable[[Any], Values]
    ) -> tuple[Values, Callable[..., Any], Callable[..., Any]]:
        """Values, and the pullbacks to the shared leaves and to the others.

        Each pullback is traced alone, so the rows of heads are never computed, and the
        sum for the heads needs no pass through what is shared.
        """
        shared, rest = split_shared(params, self.trainable.shared)
        losses, pull, metrics = jax.vjp(
            lambda s, r: fn(merge(s, r)), shared, rest, has_aux=True
        )
        specs = sharding.specs_from_rules(shared, self.trainable.rules)
        placements = sharding.shardings(self.mesh, shared, specs)

        def pull_shared(cotangent):
            # Rows live where the parameters do, whoever makes them.
            return jax.lax.with_sharding_constraint(pull(cotangent)[0], placements)

        def pull_rest(cotangent):
            return pull(cotangent)[1] if jax.tree.leaves(rest) else rest

        return (losses, metrics), pull_shared, pull_rest

    def rows(
        self,
        state: TrainState,
        batch: Any,
        key: chex.PRNGKey,
        parts: int,
        *,
        apart: bool = False,
    ) -> Any:
        """`run(microbatch, key) -> ((values, shares), (task gradients, rest))`.

        What is not shared is the sum over tasks, or task gradients too, where they are
        wanted `apart`.
        """
        engine = "vmap" if self.trainable.grads == "vmap" else "map"
        ways: Any = {"engine": engine, "chunk": self.trainable.chunk}
        shares = self.shares(batch, parts)
        blocks = self.trainable.task_blocks and engine == "map"
        if blocks:
            count = self.count(state.params, state.frozen, batch, key)
            why = f"task_blocks wants equal blocks of {count} tasks"
            self.check_parts(why, batch, parts * count)

        def run(micro, key):
            own = shares(micro)
            if blocks:
                values, rows, rest = self.rows_of_blocks(
                    state.params,
                    state.frozen,
                    micro,
                    key,
                    own,
                    apart=apart,
                )
                return (values, own), (rows, rest)
            values, pull_shared, pull_rest = self.vjp(
                state.params,
                lambda p: self.at(p, state.frozen, micro, key, own),
            )
            if not apart:
                rows = aggregation.task_rows(pull_shared, values[0], **ways)
                return (values, own), (rows, pull_rest(jnp.ones_like(values[0])))
            both = aggregation.task_rows(
                lambda e: (pull_shared(e), pull_rest(e)), values[0], **ways
            )
            return (values, own), both

        return run

    def flat_rows(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Any:
        """Pairs of task gradients, at the parameters and at each task's worst place.

        Returns:
          (values, (task gradients, those at the worst places, the sum of the latter for
          what is not shared)); means over microbatches.
        """
        assert self.trainable.radii is not None
        rho_shared, rho_task = self.trainable.radii
        shares = self.shares(batch, self.accumulate)

        def run(micro, key):
            own = shares(micro)
            found = aggregation.flat_task_grads(
                lambda p: self.at(p, state.frozen, micro, key, own),
                rho_shared=rho_shared,
                rho_task=rho_task,
                shared=self.trainable.shared,
                has_aux=True,
            )(state.params)
            values = (found.losses, found.aux)
            return values, (found.shared, found.shared_sam, found.rest)

        return mean_over_microbatches(run, batch, key, self.mesh, self.accumulate)

    def check_parts(self, why: str, batch: Any, parts: int) -> None:
        """Refuses a batch that does not fall into so many parts."""
        size = max((x.shape[0] for x in jax.tree.leaves(batch) if x.ndim), default=0)
        devices = self.mesh.shape[sharding.DATA]
        if size % (parts * devices):
            raise ValueError(
                f"train step: {why}; found {size} rows, wanted a multiple of "
                f"{parts * devices} ({parts} parts of {devices} devices)"
            )

    def rows_of_blocks(
        self,
        params: Any,
        frozen: Any,
        batch: Any,
        key: chex.PRNGKey,
        shares: chex.Array,
        *,
        apart: bool = False,
    ) -> tuple[Values, Any, Any]:
        """Task gradients where block t of a batch has the rows of task t.

        Every row goes forward and back once, not once for each task. A block that
        `task_counts` finds rows of other tasks in makes its loss NaN.

        Returns:
          (values, task gradients of the shared leaves [T, ...], sum for the others, or
          their task gradients where they are wanted `apart`).
        """
        count = self.count(params, frozen, batch, key)
        blocks = split_blocks(batch, self.mesh, count)
        rest = split_shared(params, self.trainable.shared)[1]
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, mtl_tree.wide_dtype(p.dtype)), rest
        )

        def one(total, each):
            index, rows = each
            own = jax.random.fold_in(key, index)
            values, pull_shared, pull_rest = self.vjp(
                params,
                lambda p: self.at(p, frozen, join_batch(batch, rows), own, shares),
            )
            alone = jax.nn.one_hot(index, count, dtype=values[0].dtype)
            own_rest = pull_rest(alone)
            if not apart:
                total = jax.tree.map(
                    lambda t, g: t + g.astype(t.dtype), total, own_rest
                )
            loss = values[0][index]
            if self.trainable.task_counts is not None:
                counts = self._counts(join_batch(batch, rows))
                size = max(x.shape[0] for x in jax.tree.leaves(rows))
                loss = jnp.where(counts[index] == size, loss, jnp.nan)
            kept = own_rest if apart else ()
            return total, ((loss, values[1]), pull_shared(alone), kept)

        total, ((losses, metrics), rows, kept) = loops.scan(
            one, () if apart else zeros, (jnp.arange(count), blocks)
        )
        values = (losses, jax.tree.map(lambda m: jnp.mean(m, 0), metrics))
        if apart:
            return values, rows, kept
        return values, rows, jax.tree.map(lambda t, p: t.astype(p.dtype), total, rest)

    def _counts(self, batch: Any) -> chex.Array:
        assert self.trainable.task_counts is not None
        counts = jnp.asarray(self.trainable.task_counts(batch))
        if counts.ndim != 1:
            raise ValueError(
                f"train step: task_counts gives {counts.shape}, wanted [T], the rows "
                "of the batch that belong to each task"
            )
        return counts.astype(jnp.float32)
