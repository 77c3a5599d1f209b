"""The gradient of a step whose loss function returns one loss per task."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mtl_jax import tree as mtl_tree
from mtl_jax.train.accumulate import (
    mean_of_two,
    mean_over_microbatches,
    mean_over_parts,
    split_batch,
)
from mtl_jax.train.conflicts import conflict_metrics
from mtl_jax.train.held_out import held_out_gradients
from mtl_jax.train.objective import RESERVED, Metrics, check_metrics, check_tasks
from mtl_jax.train.state import TrainState, lenient_promotion, merge, split_shared
from mtl_jax.train.task_losses import TaskLosses, Values
from mtl_jax.train.trainable import Trainable
from mtl_jax.transforms import aggregation


class Found(NamedTuple):
    """What one batch says.

    Attributes:
      loss: float32 [], the sum of the losses.
      metrics: float32 scalars.
      grads: tree like the trained leaves.
      aggregator: the new state of the aggregator.
      finite: bool [], whether losses, and task gradients where they or their inner
        products are had, were finite.
    """

    loss: chex.Array
    metrics: Metrics
    grads: Any
    aggregator: Any
    finite: chex.Array


_ROWS = 2**30  # Bytes of task gradients up to which "auto" forms them.
_WHOLE = {
    "features": "decides on the features",
    "flat": "moves each task along its gradient",
    "bilevel": "holds out a half",
}


class PerTaskGradients:
    """`(state, batch, key) -> Found`, by the engine that the trainable asks for.

    Args:
      trainable: one with an aggregator.
      mesh: the mesh the batch is split over.
      accumulate: number of microbatches. Task gradients are averaged over them; the
        Gramian is that of the averages. Weights that depend on losses are those of the
        averages too, so every microbatch runs forward once before.

    Raises:
      ValueError: when the engine cannot work on microbatches.
    """

    def __init__(self, trainable: Trainable, mesh: Mesh, accumulate: int):
        apart = trainable.sharpness == "microbatch"
        if trainable.grads in _WHOLE and accumulate > 1 and not apart:
            raise ValueError(
                f"Trainer: grads={trainable.grads!r} {_WHOLE[trainable.grads]} of one "
                f"whole batch, found accumulate={accumulate}; use accumulate=1"
            )
        assert trainable.aggregator is not None
        self.trainable, self.mesh, self.accumulate = trainable, mesh, accumulate
        self.aggregator = optax.with_extra_args_support(trainable.aggregator)
        self.rule = getattr(trainable.aggregator, "rule", None)
        self.reads = ("gram",) if self.rule is None else self.rule.reads
        self.heads = getattr(trainable.aggregator, "heads", None)
        self.losses = TaskLosses(trainable, mesh, accumulate)
        self.num_tasks: int | None = None  # Of the first trace.

    def __call__(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Traces one step's losses and gradient."""
        engine = self.trainable.grads
        if engine == "features":
            return self._from_features(state, batch, key)
        if engine == "flat":
            return self._from_flat(state, batch, key)
        if engine == "bilevel":
            self.losses.check_parts(
                "the aggregator holds out a half of the batch", batch, 2
            )
            values, grads, new, weights = held_out_gradients(
                self.losses, state, batch, key
            )
            return self._found(values, grads, new, None, weights)
        if self.rule is not None and self.rule.due is not None:
            return self._when_due(state, batch, key)
        return self._whole(state, batch, key)

    def _when_due(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Looks at the tasks only where the method is going to; without conflicts."""
        assert self.rule is not None and self.rule.due is not None

        def known():
            way = self._from_constants if self.accumulate > 1 else self._from_losses
            return way(state, batch, key)

        names = jax.eval_shape(known).metrics

        def whole():
            found = self._whole(state, batch, key)
            return found._replace(metrics={n: found.metrics[n] for n in names})

        due = self.rule.due(state.opt_state.aggregator.method)
        return jax.lax.cond(due, whole, known)

    def _whole(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """By the engines that form task gradients, or as little of them as will do."""
        engine = self.trainable.grads
        if "cross_gram" in self.reads:
            return self._from_halves(state, batch, key)
        if engine == "auto" and "gram" not in self.reads:
            if self.accumulate > 1 and "losses" not in self.reads:
                return self._from_constants(state, batch, key)
            return self._from_losses(state, batch, key)
        if engine == "auto" and self._row_bytes(state, batch, key) <= _ROWS:
            engine = "map"
        if engine in ("auto", "gramian") and self.rule is not None:
            found = self._from_gramian(state, batch, key)
            if found is not None:
                return found
        return self._from_rows(state, batch, key)

    def after(
        self, found: Found, state: TrainState, batch: Any, key: chex.PRNGKey
    ) -> Found:
        """What the method learns from the losses of the same batch after the update.

        Args:
          found: what the batch said.
          state: with the new parameters.
          batch: the batch.
          key: that of the step, so that the random draws are the same.
        """
        if self.rule is None or self.rule.after is None:
            return found
        losses, _ = self.losses.mean(state.params, state.frozen, batch, key)
        new = found.aggregator
        new = new._replace(method=self.rule.after(new.method, losses))
        finite = found.finite & jnp.all(jnp.isfinite(losses))
        return found._replace(aggregator=new, finite=finite)

    def _row_bytes(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> int:
        """Bytes of all task gradients of the shared leaves, over all devices."""
        shared = split_shared(state.params, self.trainable.shared)[0]
        count = self.losses.count(state.params, state.frozen, batch, key)
        return count * mtl_tree.nbytes(shared)

    def _from_losses(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Weighs the losses and goes back once."""
        values, pull_shared, pull_rest = self.losses.vjp(
            state.params, lambda p: self.losses.mean(p, state.frozen, batch, key)
        )
        extra = self.losses.known(values[0], batch)
        weights, new = self._weigh(None, state.opt_state.aggregator, extra)
        rest = pull_rest(self._counts(values[0], weights))
        return self._found(
            values, merge(pull_shared(weights), rest), new, None, weights
        )

    def _counts(self, losses: chex.Array, weights: chex.Array | None) -> chex.Array:
        """What losses count for in leaves that are not shared, [T]."""
        ones = jnp.ones_like(losses)
        return ones if self.heads is None else self.heads(losses, weights) * ones

    def _rest(self, rest: Any, losses: chex.Array, weights: chex.Array | None) -> Any:
        """The sum over tasks, of what `_rows` gives for leaves that are not shared."""
        if self.heads is None or not jax.tree.leaves(rest):
            return rest
        return mtl_tree.combine(rest, self._counts(losses, weights))

    def _from_constants(
        self, state: TrainState, batch: Any, key: chex.PRNGKey
    ) -> Found:
        """The same for weights known before the batch: every microbatch runs once."""
        count = self.losses.count(state.params, state.frozen, batch, key)
        extra = self.losses.known(jnp.zeros(count), batch)
        weights, new = self._weigh(None, state.opt_state.aggregator, extra)
        shares = self.losses.shares(batch, self.accumulate)

        def run(micro, key):
            values, pull_shared, pull_rest = self.losses.vjp(
                state.params,
                lambda p: self.losses.at(p, state.frozen, micro, key, shares(micro)),
            )
            rest = pull_rest(self._counts(values[0], weights))
            return values, merge(pull_shared(weights), rest)

        values, grads = mean_over_microbatches(
            run, batch, key, self.mesh, self.accumulate
        )
        return self._found(values, grads, new, None, weights)

    def _from_rows(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Forms the task gradients of the shared leaves."""
        apart = self.heads is not None
        run = self.losses.rows(state, batch, key, self.accumulate, apart=apart)
        (values, _), (rows, rest) = mean_over_microbatches(
            run, batch, key, self.mesh, self.accumulate
        )
        with jax.named_scope("aggregate"):
            gram = mtl_tree.gram(rows)
            shared = split_shared(state.params, self.trainable.shared)[0]
            update, weights, new = self._combine(
                rows,
                gram,
                state.opt_state.aggregator,
                shared,
                self.losses.known(values[0], batch),
            )
            rest = self._rest(rest, values[0], weights)
        return self._found(values, merge(update, rest), new, gram, weights)

    def _from_halves(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Forms task gradients of two halves of the batch, whose products are unbiased.

        The update combines their averages, the task gradients of the whole batch. A
        task with rows in one half only has no product of two, so zeros stand in.
        """
        parts = self.accumulate * (1 + self.accumulate % 2)
        self.losses.check_parts("the aggregator needs cross_gram", batch, parts)
        apart = self.heads is not None
        run = self.losses.rows(state, batch, key, parts, apart=apart)
        each = (jnp.arange(parts), split_batch(batch, self.mesh, parts))
        half = parts // 2
        first, second = (
            mean_over_parts(run, batch, key, jax.tree.map(lambda x, at=at: x[at], each))
            for at in (slice(half), slice(half, None))
        )
        ((values, _), (rows, rest)) = mean_of_two(first, second)
        with jax.named_scope("aggregate"):
            # A half holds its share of each task's rows, not one half of them.
            cross = aggregation.cross_gram(first[1][0], second[1][0])
            held = first[0][1], second[0][1]
            a, b = (1 / jnp.where(share > 0, share, 1) for share in held)
            cross = cross * a.reshape(-1, 1) * b.reshape(1, -1)
            gram = mtl_tree.gram(rows)
            extra = self.losses.known(values[0], batch) | {"cross_gram": cross}
            weights, new = self._weigh(gram, state.opt_state.aggregator, extra)
            update = mtl_tree.combine(rows, weights)
            rest = self._rest(rest, values[0], weights)
        found = self._found(values, merge(update, rest), new, gram, weights)
        if self.trainable.task_counts is None:
            return found
        alone = jnp.sum((held[0] == 0) | (held[1] == 0)).astype(jnp.float32)
        return found._replace(metrics=found.metrics | {"tasks_in_one_half": alone})

    def _from_gramian(
        self, state: TrainState, batch: Any, key: chex.PRNGKey
    ) -> Found | None:
        """Forms inner products only; None where "auto" has to do it otherwise."""
        values, pull_shared, pull_rest = self.losses.vjp(
            state.params, lambda p: self.losses.mean(p, state.frozen, batch, key)
        )
        if not aggregation.has_transpose(pull_shared, values[0]):
            if self.trainable.grads == "auto":
                return None
            raise ValueError(
                "train step: grads='gramian' wants a backward pass that can be "
                "transposed; loss_fn holds a custom_vjp whose backward rule cannot, "
                "use 'map' or 'auto'"
            )
        with jax.named_scope("gramian"):
            gram = aggregation.task_gramian(pull_shared, values[0])
        extra = self.losses.known(values[0], batch)
        weights, new = self._weigh(gram, state.opt_state.aggregator, extra)
        rest = pull_rest(self._counts(values[0], weights))
        return self._found(
            values, merge(pull_shared(weights), rest), new, gram, weights
        )

    def _from_features(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Acts on the gradients at the shared representation."""
        loss: Any = self.trainable.loss_fn
        whole = aggregation.SplitLoss(
            encode=lambda p, *args: loss.encode(merge(p, state.frozen), *args),
            heads=lambda p, z, *args: check_tasks(
                *loss.heads(merge(p, state.frozen), z, *args)
            ),
            num_tasks=loss.num_tasks,
        )
        values, (features, rows), pullback = aggregation.value_and_feature_grads(
            whole, has_aux=True, with_features=True
        )(state.params, batch, key)
        gram = mtl_tree.gram(rows)
        direction, weights, new = self._combine(
            rows,
            gram,
            state.opt_state.aggregator,
            None,
            self.losses.known(values[0], batch) | {"features": features},
        )
        counts = None if self.heads is None else self._counts(values[0], weights)
        return self._found(values, pullback(direction, counts), new, gram, weights)

    def _from_flat(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Acts on pairs of task gradients; heads get those at the perturbed place."""
        values, (rows, sam_rows, rest) = self.losses.flat_rows(state, batch, key)
        gram = mtl_tree.gram(rows)
        with lenient_promotion():
            update, new = self.aggregator.update(
                rows,
                state.opt_state.aggregator,
                split_shared(state.params, self.trainable.shared)[0],
                **self.losses.known(values[0], batch),
                sam_grads=sam_rows,
            )
        return self._found(values, merge(update, rest), new, gram, None)

    def _weigh(
        self, gram: chex.Array | None, state: Any, extra: dict[str, chex.Array]
    ) -> tuple[chex.Array, Any]:
        """Weights and the new state, from a Gramian or, where none is read, without."""
        assert self.rule is not None
        count = extra["losses"].shape[0]
        given = jnp.zeros((count, count), jnp.float32) if gram is None else gram
        if "cross_gram" in self.reads:
            extra = {"cross_gram": given} | extra
        with lenient_promotion():
            weights, method = self.rule.weigh(given, state.method, **extra)
        finite = jnp.all(jnp.isfinite(given)) & jnp.all(jnp.isfinite(weights))
        return weights, aggregation.AggregationState(method=method, finite=finite)

    def _combine(
        self,
        rows: Any,
        gram: chex.Array,
        state: Any,
        params: Any,
        extra: dict[str, chex.Array],
    ) -> tuple[Any, chex.Array | None, Any]:
        """(update, weights where the method has them, new state of the aggregator)."""
        if self.rule is not None:
            weights, new = self._weigh(gram, state, extra)
            return mtl_tree.combine(rows, weights), weights, new
        with lenient_promotion():
            update, new = self.aggregator.update(rows, state, params, **extra)
        return update, None, new

    def _found(
        self,
        values: Values,
        grads: Any,
        new: Any,
        gram: chex.Array | None,
        weights: chex.Array | None,
    ) -> Found:
        losses, metrics = values
        names = self._names(losses.shape[0])
        own = {f"loss_{name}": losses[t] for t, name in enumerate(names)}
        if weights is not None:
            own |= {f"weight_{name}": weights[t] for t, name in enumerate(names)}
        finite = jnp.all(jnp.isfinite(losses))
        if gram is not None:
            own |= conflict_metrics(gram)
            # The Gramian sees whatever is not finite in any task gradient.
            finite &= jnp.all(jnp.isfinite(gram))
        metrics = check_metrics(metrics, (*RESERVED, *own))
        finite &= jnp.asarray(getattr(new, "finite", True))
        return Found(jnp.sum(losses), own | metrics, grads, new, finite)

    def _names(self, count: int) -> tuple[str, ...]:
        names = self.trainable.task_names
        if names is not None and len(names) != count:
            raise ValueError(
                f"train step: loss_fn returned {count} losses, there are "
                f"{len(names)} task_names: {', '.join(names)}"
            )
        if self.num_tasks not in (None, count):
            raise ValueError(
                f"train step: loss_fn returned {count} losses, before "
                f"{self.num_tasks}: T must not change within a run"
            )
        self.num_tasks = count
        return names or tuple(str(t) for t in range(count))
