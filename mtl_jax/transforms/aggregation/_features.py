"""Surgery at a shared representation: one backward pass through what is shared."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import tree
from mtl_jax.transforms.aggregation._engines import check_losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitLoss:
    """A loss function that names its shared representation.

    It is itself `loss_fn(params, *args) -> losses [T]`, for every other engine.

    Attributes:
      encode: `encode(params, *args) -> features`, an array or tree of arrays.
      heads: `heads(params, copies, *args) -> losses [T]`, or `(losses, aux)`. Leaves of
        `copies` are [T, ...], the features once for every task; the loss of task t
        must be computed from `copies[t]`, from no other task's copy.
      num_tasks: T.
    """

    encode: Callable[..., Any]
    heads: Callable[..., Any]
    num_tasks: int

    def __post_init__(self):
        if self.num_tasks < 1:
            raise ValueError(f"SplitLoss: num_tasks is {self.num_tasks}, wanted >= 1")

    def __call__(self, params: Any, *args: Any) -> Any:
        """The losses, and aux where `heads` gives it."""
        return self.heads(params, self.copies(self.encode(params, *args)), *args)

    def copies(self, features: Any) -> Any:
        """Leaves [...] -> [T, ...]."""
        return jax.tree.map(
            lambda z: jnp.broadcast_to(z[None], (self.num_tasks, *jnp.shape(z))),
            features,
        )


def value_and_feature_grads(
    loss: SplitLoss, *, has_aux: bool = False, with_features: bool = False
) -> Callable[..., tuple[Any, Any, Callable[..., Any]]]:
    """Task gradients at the shared representation Z, and the way back to parameters.

      dZ[t] = dL_t / dZ,    grads = (dZ/dparams)^T z + sum_t dL_t / dparams at fixed Z

    Costs one backward pass through the heads of all tasks, and one through the encoder
    in `pullback`, however many tasks there are. By the chain rule, what a method
    decides on dZ bounds, and does not equal, what it would decide on the gradients of
    the parameters.

    Args:
      loss: encoder and heads.
      has_aux: whether `heads` returns a pair.
      with_features: whether Z comes with its gradients.

    Returns:
      `fn(params, *args) -> (losses, feature_grads, pullback)`, with `(losses, aux)`
      first where there is aux: losses [T] float32; leaves of feature_grads [T, *Z], a
      task tree for any aggregator; `pullback(z, counts=None)`, z like the features,
      gives leaves like `params`: what the encoder uses gets the gradient along z, what
      the heads use the sum over tasks, each times its entry of `counts` [T] where
      these are given, a leaf that both use the sum of the two. With features the
      second is the pair (Z, feature_grads).

    Raises:
      ValueError: the losses are not [T].

    **Follows**: Sener & Koltun 2018, "Multi-Task Learning as Multi-Objective
      Optimization", section 3.3.

    >>> loss = SplitLoss(
    ...     encode=lambda params, x: x * params["scale"],
    ...     heads=lambda params, copies, x: copies @ params["head"],
    ...     num_tasks=2,
    ... )
    >>> params = {"scale": jnp.ones(2), "head": jnp.array([1.0, 3.0])}
    >>> _, grads, pullback = value_and_feature_grads(loss)(params, jnp.ones(2))
    >>> grads.tolist(), pullback(jnp.array([0.5, 0.0]))["scale"].tolist()
    ([[1.0, 3.0], [1.0, 3.0]], [0.5, 0.0])
    """
    name = "value_and_feature_grads"

    def fn(params, *args):
        features, encoder = jax.vjp(lambda p: loss.encode(p, *args), params)

        def run_heads(params, copies):
            out = loss.heads(params, copies, *args)
            losses, aux = out if has_aux else (out, None)
            check_losses(name, losses)
            return losses.astype(tree.wide_dtype(losses.dtype)), aux

        losses, heads, aux = jax.vjp(
            run_heads, params, loss.copies(features), has_aux=True
        )
        if losses.shape != (loss.num_tasks,):
            raise ValueError(
                f"{name}: heads gave {losses.shape[0]} losses, "
                f"num_tasks is {loss.num_tasks}"
            )
        # Each copy is read by one loss, so the gradient of the sum keeps them apart.
        direct, feature_grads = heads(jnp.ones_like(losses))

        def pullback(cotangent, counts=None):
            cotangent = jax.tree.map(
                lambda c, z: c.astype(z.dtype), cotangent, features
            )
            own = direct
            if counts is not None:
                own = heads(counts.astype(losses.dtype))[0]
            return jax.tree.map(jnp.add, encoder(cotangent)[0], own)

        values = (losses, aux) if has_aux else losses
        found = (features, feature_grads) if with_features else feature_grads
        return values, found, pullback

    return fn
