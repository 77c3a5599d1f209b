"""Self Positioning: where to merge, learned on a small probe set."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from mtl_jax import tree
from mtl_jax.transforms.merging import _compose
from mtl_jax.transforms.merging._coefficients import compose
from mtl_jax.transforms.merging._learning import learner
from mtl_jax.transforms.merging._slerp_chain import permutation, slerp_chain_weights

Search = Literal["joint", "pairwise"]
Rule = Callable[[Any, Any], jax.Array]


class Position(NamedTuple):
    """A place in the span of the task vectors.

    Attributes:
      kappa: [T], coefficients of the task vectors, for `compose` or `combine`.
      weights: per stage of the search the weights it learned, in the order of the
        search: one row of T for "joint", T - 1 pairs for "pairwise".
      scales: per stage the learned length.
      losses: [stages, S] float32, mean loss over probe tasks of every step.
    """

    kappa: jax.Array
    weights: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    losses: jax.Array


class _Searcher(NamedTuple):
    """What `positioner` makes.

    Attributes:
      learn: from `learner`.
      place: `place(variables, args) -> kappa`.
    """

    learn: Callable[..., Any]
    place: Callable[..., jax.Array]

    def __call__(
        self,
        base: Any,
        taus: Any,
        batches: Any,
        *,
        norm_penalty: float = 0.01,
        search: Search = "joint",
        order: Sequence[int] | None = None,
    ) -> Position:
        """See `positioner`."""
        if search not in get_args(Search):
            raise ValueError(
                f"positioner: search is {search!r}, wanted one of {get_args(Search)}"
            )
        penalty = _compose.number("positioner", "norm_penalty", norm_penalty)
        count = tree.num_tasks("positioner", taus)
        order = permutation("positioner", order, count)
        probes = jax.tree.leaves(batches)[0].shape[1]
        args = {
            "base": base,
            "taus": taus,
            "gram": tree.gram(taus),
            "share": jnp.float32(1 / probes),
        }
        units = jnp.eye(count, dtype=jnp.float32)[order]
        if search == "joint":
            return _told([self._stage(units, batches, penalty, args)])
        kappa, found = units[0], []
        for unit in units[1:]:
            found.append(self._stage(jnp.stack([kappa, unit]), batches, penalty, args))
            kappa = found[-1][0]
        return _told(found or [self._stage(units, batches, penalty, args)])

    def _stage(self, basis, batches, penalty, args):
        """Learns one weight for each row of the basis [M, T], and a length."""
        args = {**args, "basis": basis}
        start = {
            "log_weights": jnp.zeros(len(basis), jnp.float32),
            "scale": jnp.ones((), jnp.float32),
            "penalty": jnp.float32(penalty),
        }
        learned = self.learn(start, batches, args=args)
        kappa = self.place(learned.variables, args)
        return kappa, learned.variables, jnp.sum(learned.losses, 1)


def positioner(
    loss_fn: Callable[[Any, Any], Any],
    tx: optax.GradientTransformation,
    *,
    rule: Rule = slerp_chain_weights,
) -> Callable[..., Position]:
    r"""Makes a search for weights and length of a merge on probe data.

      (a, scale)* = argmin mean_t L_t(base + scale sum_i kappa_i(a) V_i) + mu scale

    by stochastic gradient descent on T + 1 numbers; a = exp of what is learned, from
    a = 1 and scale = 1, which is never clamped.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, of one batch of one probe task.
      tx: of the numbers, without weight decay; Adam at 0.01 for instance.
      rule: `rule(gram [M, M], weights [M]) -> kappa [M]`, pure: any merge that is a
        combination of task vectors; `lambda gram, w: w / w.sum()` is the average.

    Returns:
      `run(base, taus, batches, *, norm_penalty=0.01, search="joint", order=None) ->
      Position`. Batches have leaves [S, P, ...], one step of one batch of each of P
      probe tasks; norm_penalty is mu, which pulls the length down. "joint" learns all
      weights at once; "pairwise" learns angle and length of the first two of the order,
      takes the result for one vector and goes on with the next, every stage over all S
      steps. Runs of equal shapes share their compilation.

    Raises:
      ValueError: a search that does not exist; when run, an order that is no
        permutation.

    Follows: as `slerp_chain_weights`; "pairwise" is how a note on a later embedding
      model describes it.
    Differs: the parametrisation of a, its start and the optimizer are our reading.

    >>> def loss_fn(params, batch):
    ...     return jnp.sum((params["w"] - batch) ** 2)
    >>> run = positioner(loss_fn, optax.adam(0.05))
    >>> base, taus = {"w": jnp.zeros(2)}, {"w": jnp.eye(2)}
    >>> found = run(base, taus, jnp.ones((200, 1, 2)), norm_penalty=0.0)
    >>> [round(x, 2) for x in found.kappa.tolist()]
    [1.0, 1.0]
    """

    def coefficients(variables, args):
        basis = args["basis"]
        inner = jnp.matmul(
            basis, jnp.matmul(args["gram"], basis.T, precision="highest")
        )
        inner = rule(inner, jnp.exp(variables["log_weights"]))
        return variables["scale"] * jnp.matmul(inner, basis, precision="highest")

    def params_fn(variables, args):
        return compose(args["base"], args["taus"], coefficients(variables, args))

    def one(params, batch, task, args):
        del task
        return loss_fn(params, batch) * args["share"]

    # The penalty is a variable that has no slope: values of it share a compilation.
    def shorten(variables):
        return jax.lax.stop_gradient(variables["penalty"]) * variables["scale"]

    return _Searcher(
        learner(params_fn, one, tx, penalty=shorten), jax.jit(coefficients)
    )


def _told(stages) -> Position:
    return Position(
        stages[-1][0],
        tuple(jnp.exp(variables["log_weights"]) for _, variables, _ in stages),
        tuple(variables["scale"] for _, variables, _ in stages),
        jnp.stack([losses for _, _, losses in stages]),
    )
