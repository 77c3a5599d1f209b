"""The gradient of a step whose loss function returns one loss per task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mtl_jax import tree as mtl_tree
from mtl_jax.train import sharding
from mtl_jax.train.accumulate import (
    join_batch,
    mean_over_microbatches,
    split_batch,
)
from mtl_jax.train.conflicts import conflict_metrics
from mtl_jax.train.objective import (
    RESERVED,
    Metrics,
    check_metrics,
    check_tasks,
    task_objective,
)
from mtl_jax.train.state import (
    TrainState,
    lenient_promotion,
    merge,
    split_shared,
)
from mtl_jax.train.trainable import Trainable
from mtl_jax.transforms import aggregation


class Found(NamedTuple):
    """What one batch says.

    Attributes:
      loss: float32 [], the sum of the losses.
      metrics: float32 scalars.
      grads: tree like the trained leaves.
      aggregator: the new state of the aggregator.
      finite: bool [], whether losses and task gradients were finite.
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
}


class PerTaskGradients:
    """`(state, batch, key) -> Found`, by the engine that the trainable asks for.

    Args:
      trainable: one with an aggregator.
      mesh: the mesh the batch is split over.
      accumulate: number of microbatches. Task gradients are averaged over them; the
        Gramian is that of the averages.

    Raises:
      ValueError: when the engine cannot work on microbatches.
    """

    def __init__(self, trainable: Trainable, mesh: Mesh, accumulate: int):
        if trainable.grads in _WHOLE and accumulate > 1:
            raise ValueError(
                f"Trainer: grads={trainable.grads!r} {_WHOLE[trainable.grads]} of one "
                f"whole batch, found accumulate={accumulate}; use accumulate=1"
            )
        assert trainable.aggregator is not None
        self.trainable, self.mesh, self.accumulate = trainable, mesh, accumulate
        self.aggregator = optax.with_extra_args_support(trainable.aggregator)
        self.rule = getattr(trainable.aggregator, "rule", None)
        self.num_tasks: int | None = None  # Of the first trace.

    def __call__(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Traces one step's losses and gradient."""
        engine = self.trainable.grads
        if engine == "features":
            return self._from_features(state, batch, key)
        if engine == "flat":
            return self._from_flat(state, batch, key)
        if engine == "auto" and self._row_bytes(state, batch, key) <= _ROWS:
            engine = "map"
        if engine in ("auto", "gramian") and self.rule is not None:
            found = self._from_gramian(state, batch, key)
            if found is not None:
                return found
        return self._from_rows(state, batch, key)

    def _row_bytes(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> int:
        """Bytes of all task gradients of the shared leaves, over all devices."""
        shared = split_shared(state.params, self.trainable.shared)[0]
        losses, _ = jax.eval_shape(
            lambda p: self._losses(p, state.frozen, batch, key), state.params
        )
        return losses.shape[0] * mtl_tree.nbytes(shared)

    def _from_rows(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Forms the task gradients of the shared leaves."""
        engine = "vmap" if self.trainable.grads == "vmap" else "map"

        def run(batch, key):
            values, pull_shared, pull_rest = self._vjp(
                state, lambda p: self._losses(p, state.frozen, batch, key)
            )
            rows = aggregation.task_rows(pull_shared, values[0], engine=engine)
            return values, (rows, pull_rest(jnp.ones_like(values[0])))

        values, (rows, rest) = mean_over_microbatches(
            run, batch, key, self.mesh, self.accumulate
        )
        with jax.named_scope("aggregate"):
            gram = mtl_tree.gram(rows)
            shared = split_shared(state.params, self.trainable.shared)[0]
            update, weights, new = self._combine(
                rows, gram, state.opt_state.aggregator, shared, values[0]
            )
        return self._found(values, merge(update, rest), new, gram, weights)

    def _from_gramian(
        self, state: TrainState, batch: Any, key: chex.PRNGKey
    ) -> Found | None:
        """Forms inner products only; None where "auto" has to do it otherwise."""
        values, pull_shared, pull_rest = self._vjp(
            state, lambda p: self._mean_losses(p, state.frozen, batch, key)
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
        weights, new = self._weigh(gram, state.opt_state.aggregator, values[0])
        rest = pull_rest(jnp.ones_like(values[0]))
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
        values, rows, pullback = aggregation.value_and_feature_grads(
            whole, has_aux=True
        )(state.params, batch, key)
        gram = mtl_tree.gram(rows)
        direction, weights, new = self._combine(
            rows, gram, state.opt_state.aggregator, None, values[0]
        )
        return self._found(values, pullback(direction), new, gram, weights)

    def _from_flat(self, state: TrainState, batch: Any, key: chex.PRNGKey) -> Found:
        """Acts on pairs of task gradients; heads get those at the perturbed place."""
        assert self.trainable.radii is not None
        rho_shared, rho_task = self.trainable.radii
        found = aggregation.flat_task_grads(
            lambda p: self._losses(p, state.frozen, batch, key),
            rho_shared=rho_shared,
            rho_task=rho_task,
            shared=self.trainable.shared,
            has_aux=True,
        )(state.params)
        gram = mtl_tree.gram(found.shared)
        with lenient_promotion():
            update, new = self.aggregator.update(
                found.shared,
                state.opt_state.aggregator,
                split_shared(state.params, self.trainable.shared)[0],
                losses=found.losses,
                sam_grads=found.shared_sam,
            )
        values = (found.losses, found.aux)
        return self._found(values, merge(update, found.rest), new, gram, None)

    def _losses(
        self, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey
    ) -> tuple[chex.Array, Metrics]:
        return task_objective(self.trainable.loss_fn, params, frozen, batch, key)

    def _mean_losses(
        self, params: Any, frozen: Any, batch: Any, key: chex.PRNGKey
    ) -> tuple[chex.Array, Metrics]:
        """The same over microbatches, each run again when it is differentiated."""
        if self.accumulate == 1:
            return self._losses(params, frozen, batch, key)
        wide = jax.tree.map(lambda p: p.astype(mtl_tree.wide_dtype(p.dtype)), params)

        @jax.checkpoint
        def one(each):
            index, rows = each
            narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params)
            micro = join_batch(batch, rows)
            return self._losses(narrow, frozen, micro, jax.random.fold_in(key, index))

        parts = split_batch(batch, self.mesh, self.accumulate)
        values = jax.lax.map(one, (jnp.arange(self.accumulate), parts))
        return jax.tree.map(lambda v: jnp.mean(v, 0), values)

    def _vjp(
        self, state: TrainState, fn: Callable[[Any], tuple[chex.Array, Metrics]]
    ) -> tuple[tuple[chex.Array, Metrics], Callable[..., Any], Callable[..., Any]]:
        """Values, and the pullbacks to the shared leaves and to the others.

        Each pullback is traced alone, so the rows of heads are never computed, and the
        sum for the heads needs no pass through what is shared.
        """
        shared, rest = split_shared(state.params, self.trainable.shared)
        losses, pull, metrics = jax.vjp(
            lambda s, r: fn(merge(s, r)), shared, rest, has_aux=True
        )
        specs = sharding.specs_from_rules(shared, self.trainable.rules)
        placements = sharding.shardings(self.mesh, shared, specs)

        def pull_shared(cotangent):
            # Rows live where the parameters do, whoever makes them.
            return jax.lax.with_sharding_constraint(pull(cotangent)[0], placements)

        return (losses, metrics), pull_shared, lambda cotangent: pull(cotangent)[1]

    def _weigh(
        self, gram: chex.Array, state: Any, losses: chex.Array
    ) -> tuple[chex.Array, Any]:
        assert self.rule is not None
        with lenient_promotion():
            weights, method = self.rule.weigh(gram, state.method, losses=losses)
        finite = jnp.all(jnp.isfinite(gram))
        return weights, aggregation.AggregationState(method=method, finite=finite)

    def _combine(
        self, rows: Any, gram: chex.Array, state: Any, params: Any, losses: chex.Array
    ) -> tuple[Any, chex.Array | None, Any]:
        """(update, weights where the method has them, new state of the aggregator)."""
        if self.rule is not None:
            weights, new = self._weigh(gram, state, losses)
            return mtl_tree.combine(rows, weights), weights, new
        with lenient_promotion():
            update, new = self.aggregator.update(rows, state, params, losses=losses)
        return update, None, new

    def _found(
        self,
        values: tuple[chex.Array, Metrics],
        grads: Any,
        new: Any,
        gram: chex.Array,
        weights: chex.Array | None,
    ) -> Found:
        losses, metrics = values
        names = self._names(losses.shape[0])
        own = {f"loss_{name}": losses[t] for t, name in enumerate(names)}
        if weights is not None:
            own |= {f"weight_{name}": weights[t] for t, name in enumerate(names)}
        own |= conflict_metrics(gram)
        metrics = check_metrics(metrics, (*RESERVED, *own))
        # The Gramian sees whatever is not finite in any task gradient.
        finite = jnp.all(jnp.isfinite(losses)) & jnp.all(jnp.isfinite(gram))
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
