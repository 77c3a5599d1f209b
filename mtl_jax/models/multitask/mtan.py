"""Multi-task attention network: soft masks per task on shared features."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.backbones.small_conv import max_pool
from mtl_jax.models.layers.norm import LayerNorm
from mtl_jax.models.multitask.base import Factory, MultiTaskModule


class Attend(nn.Module):
    """`sigmoid(out(relu(norm(in([features, carried])))))`, on the last axis.

    Attributes:
      hidden: width between the two layers; None = that of the features.
    """

    hidden: int | None = None

    @nn.compact
    def __call__(self, features: chex.Array, carried: chex.Array | None) -> chex.Array:
        """Args: [B, ..., C], [B, ..., C'] or None. Returns: mask [B, ..., C]."""
        x = features
        if carried is not None:
            x = jnp.concatenate([features, carried], axis=-1)
        dtype, width = features.dtype, features.shape[-1]
        x = nn.Dense(self.hidden or width, dtype=dtype, name="in")(x)
        x = jax.nn.relu(LayerNorm(name="norm")(x))
        return jax.nn.sigmoid(nn.Dense(width, dtype=dtype, name="out")(x))


class Carry(nn.Module):
    """Takes attended features to the shape of the next stage's.

    Maps are convolved (3x3) and max-pooled to the next height and width; anything
    else goes through a dense layer.
    """

    @nn.compact
    def __call__(self, attended: chex.Array, like: chex.Array) -> chex.Array:
        """Args: [B, ..., C], [B, ..., C']. Returns: [B, ..., C']."""
        if attended.ndim != like.ndim:
            raise ValueError(
                f"MTAN: a stage turned {attended.shape} into {like.shape}; stages must "
                "keep the number of axes"
            )
        width, dtype = like.shape[-1], like.dtype
        if like.ndim != 4:
            return jax.nn.relu(nn.Dense(width, dtype=dtype, name="dense")(attended))
        x = nn.Conv(width, (3, 3), dtype=dtype, name="conv")(attended)
        x = jax.nn.relu(x)
        strides = tuple(
            -(-before // after)
            for before, after in zip(x.shape[1:3], like.shape[1:3], strict=True)
        )
        x = max_pool(x, strides)
        if x.shape != like.shape:
            raise ValueError(
                f"MTAN: no stride takes a stage's {attended.shape} to {like.shape}"
            )
        return x


class MTAN(MultiTaskModule, kw_only=True):
    """One shared trunk in stages; every task attends to every stage.

    With p_j = stage_j(p_{j-1}) shared, per task

      a_1 = attend_1(p_1) * p_1,   a_j = attend_j([p_j, carry_j(a_{j-1})]) * p_j

    and outputs_t = head_t(a_last). Features may be vectors, token sequences or maps
    (channels last). `z["shared"]` is the last stage's output and `z["stages"]` holds
    the earlier ones, which tasks read too: gradients at `shared` alone leave those
    ways out.

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      stages: makers of the trunk's stages.
      hidden: width inside the attention modules; None = that of the features.

    **Follows**: Liu et al. 2019, "End-to-End Multi-Task Learning with Attention",
    section 3.

    **Differs**: a mask is computed from the very features that it masks (the paper
    reads a convolution inside the block and masks the block's output), and layer norm
    over channels stands for batch norm, so that a task's gradient stays a sum over
    examples.
    """

    stages: Sequence[Factory]
    hidden: int | None = None

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """The trunk."""
        return ("^trunk_",)

    def setup(self):
        """Makes trunk, attention modules and heads."""
        if not self.stages:
            raise ValueError("MTAN: stages must hold at least one maker")
        self.trunk = [make() for make in self.stages]
        names, count = self.task_names, len(self.stages)
        self.attend = {n: [Attend(self.hidden) for _ in range(count)] for n in names}
        self.carry = {n: [Carry() for _ in range(count - 1)] for n in names}
        self.heads = self._make_heads()

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Args: what the first stage takes. Returns: {"shared", "stages"}."""
        found = [self.trunk[0](*inputs, **options)]
        for stage in self.trunk[1:]:
            found.append(stage(found[-1]))
        return {"shared": found[-1], "stages": tuple(found[:-1])}

    def feature(self, z, task: int) -> chex.Array:
        """The last stage's features under the task's masks."""
        name = self.task_names[task]
        first, *later = *z["stages"], z["shared"]
        attended = self.attend[name][0](first, None) * first
        for level, shared in enumerate(later):
            carried = self.carry[name][level](attended, shared)
            attended = self.attend[name][level + 1](shared, carried) * shared
        return attended
