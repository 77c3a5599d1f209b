"""What all multi-task architectures share: task heads around a shared middle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.feed_forward import activation

Factory = Callable[[], nn.Module]
"""Makes a module; called once for every copy that an architecture needs."""

SHARDING_RULES = (
    (r"^(.*/)?heads_[^/]+/(hidden_\d+|output)/kernel$", P("data", None)),
    (r"^(.*/)?heads_[^/]+/(hidden_\d+|output)/bias$", P()),
    (r"^(.*/)?(gate|attend|carry)[^/]*(/.*)?$", P()),
    (r"^(.*/)?(stitches|branch_logits)[^/]*(/.*)?$", P()),
)


class TaskHead(nn.Module):
    """Features [B, ...], flattened, to [B, size] float32.

    Unlike `Classifier`, it does not start from zero: a zero head sends no gradient to
    the shared part, so that the first Gramian of a run would be zero.

    Attributes:
      size: width of the output.
      hidden: widths of layers before it.
      activation: a name in `layers.ACTIVATIONS`, after each hidden layer.
      dtype: compute dtype; None follows the features.
      param_dtype: dtype of the parameters.
    """

    size: int
    hidden: Sequence[int] = ()
    activation: str = "relu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: chex.Array) -> chex.Array:
        """Args: features: [B, ...]. Returns: [B, size] float32."""
        dtype = features.dtype if self.dtype is None else self.dtype
        options = {"dtype": dtype, "param_dtype": self.param_dtype}
        x = features.reshape(features.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, name=f"hidden_{i}", **options)(x)
            x = activation(self.activation)(x)
        return nn.Dense(self.size, name="output", **options)(x).astype(jnp.float32)


class MultiTaskModule(nn.Module):
    """A map from inputs to one output per task, through a named shared representation.

      z = encode(*inputs),    outputs = decode(z)

    z is a dict whose leaves all lead with the batch axis; `z["shared"]` is what more
    than one task reads, so that gradients of the task losses can be taken there:
    `lambda shared: losses(module.decode({**z, "shared": shared}))`.

    Attributes:
      outputs: task name -> width of its output, in task order.
      head: width -> module that maps the task's features to its output.

    `shared_paths` are regexes of the parameters that more than one task uses; they fit
    `Trainable(shared=...)`. All others belong to one task.
    """

    outputs: Mapping[str, int]
    head: Callable[[int], nn.Module] = TaskHead

    @property
    def task_names(self) -> tuple[str, ...]:
        """T names in task order."""
        return tuple(self.outputs)

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """Regexes that find, in path strings, the parameters of more than one task."""
        raise NotImplementedError

    def _make_heads(self) -> dict[str, nn.Module]:
        if not self.outputs:
            raise ValueError(f"{type(self).__name__}: outputs must name a task")
        return {name: self.head(size) for name, size in self.outputs.items()}

    def __call__(self, *inputs: chex.Array, **options: Any) -> dict[str, chex.Array]:
        """Args: inputs: leading B. Returns: {task: [B, size]} float32."""
        return self.decode(self.encode(*inputs, **options))

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Inputs to the representation z; `options` go to the backbone."""
        raise NotImplementedError

    def feature(self, z: Mapping[str, Any], task: int) -> chex.Array:
        """What the head of task number `task` reads, [B, ...]."""
        raise NotImplementedError

    def decode(
        self, z: Mapping[str, Any], tasks: Sequence[str] | None = None
    ) -> dict[str, chex.Array]:
        """Representation to outputs.

        Args:
          z: from `encode`, or one with other values.
          tasks: names of the outputs that are wanted; None = all.

        Returns:
          {task: [B, size]} float32.

        Raises:
          ValueError: there is no such task.
        """
        found = {}
        for name in self.task_names if tasks is None else tasks:
            if name not in self.outputs:
                raise ValueError(
                    f"{type(self).__name__}: no task {name!r}, known: "
                    f"{', '.join(self.task_names)}"
                )
            feature = self.feature(z, self.task_names.index(name))
            found[name] = self.heads[name](feature)
        return found

    def by_task(self, *inputs: chex.Array, **options: Any) -> dict[str, chex.Array]:
        """Every task on its own rows: multi-input problems.

        All rows go through the shared part at once and each through one head only.

        Args:
          *inputs: each [T, B, ...].
          **options: go to the backbone.

        Returns:
          {task: [B, size]} float32.

        Raises:
          ValueError: the leading size is not T.
        """
        count = len(self.outputs)
        for x in inputs:
            if x.ndim < 2 or x.shape[0] != count:
                raise ValueError(
                    f"{type(self).__name__}.by_task: wanted [{count}, B, ...], found "
                    f"{x.shape}"
                )
        z = self.encode(*(x.reshape(-1, *x.shape[2:]) for x in inputs), **options)
        z = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), z)
        outputs = {}
        for i, name in enumerate(self.task_names):
            own = jax.tree.map(lambda a, i=i: a[i], z)
            outputs.update(self.decode(own, (name,)))
        return outputs


def flat(x: chex.Array) -> chex.Array:
    """[B, ...] -> [B, D] float32: what gates read."""
    return x.reshape(x.shape[0], -1).astype(jnp.float32)


def mix(weights: chex.Array, features: chex.Array) -> chex.Array:
    """Weighted sum of N features: [B, N], [B, N, ...] -> [B, ...]."""
    weights = weights.astype(features.dtype)
    return jnp.einsum("bn,bn...->b...", weights, features)
