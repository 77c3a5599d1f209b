"""T models as one base, one shared delta and T packed masks."""

import dataclasses
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mtl_jax import kernels, tree
from mtl_jax.transforms.masking._packing import check_packed, pack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskBank:
    """T models in the space of two, plus one bit per parameter and task.

      restore(t) = base + scale * mask[t] * delta

    A pytree: passes through `jit`, checkpoints and `jax.device_put`. Build it with
    `MaskBank.create`.

    Attributes:
      base: parameters all tasks share, leaves [...].
      delta: the merged task vector, tree like `base`.
      masks: packed masks, tree like `base` of uint8 [T, ceil(n / 8)].
      scale: float32 scalar, 1 in the paper.

    >>> bank = MaskBank.create(
    ...     {"w": jnp.zeros(2)},
    ...     {"w": jnp.array([1.0, 2.0])},
    ...     {"w": jnp.array([[True, False], [True, True]])},
    ... )
    >>> bank.restore(0)["w"].tolist(), bank.restore(1)["w"].tolist()
    ([1.0, 0.0], [1.0, 2.0])

    **Follows**: Wang et al. 2024, "Localizing Task Information for Improved Model
    Merging and Compression", TALL-masks as compression.
    """

    base: Any
    delta: Any
    masks: Any
    scale: Any

    @classmethod
    def create(
        cls,
        base: chex.ArrayTree,
        delta: chex.ArrayTree,
        masks: chex.ArrayTree,
        *,
        scale: chex.Numeric = 1.0,
    ) -> "MaskBank":
        """Packs masks and checks that everything fits.

        Args:
          base: parameters, leaves [...].
          delta: merged task vector, tree like `base`.
          masks: tree like `base` of bool [T, ...], or of packed uint8
            [T, ceil(n / 8)].
          scale: scalar.

        Returns:
          The bank.

        Raises:
          ValueError: naming the leaf that does not fit, or holds NaN or infinity.
        """
        tree.check_match("MaskBank", base, delta, other_name="delta")
        num_tasks = tree.num_tasks("MaskBank", masks)
        if all(jnp.result_type(leaf) == np.bool_ for leaf in jax.tree.leaves(masks)):
            shapes = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct((num_tasks, *m.shape[1:]), bool), masks
            )
            wanted = jax.tree.map(
                lambda b: jax.ShapeDtypeStruct((num_tasks, *jnp.shape(b)), bool), base
            )
            tree.check_match("MaskBank", wanted, shapes, other_name="masks")
            masks = pack(masks, per_task=True)
        check_packed("MaskBank", masks, base)
        tree.check_finite("MaskBank: base", base)
        tree.check_finite("MaskBank: delta", delta)
        base, delta = jax.tree.map(jnp.asarray, (base, delta))
        return cls(
            base=base, delta=delta, masks=masks, scale=jnp.asarray(scale, jnp.float32)
        )

    @property
    def num_tasks(self) -> int:
        """T."""
        return jax.tree.leaves(self.masks)[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of base, delta and masks together."""
        return sum(map(tree.nbytes, (self.base, self.delta, self.masks)))

    def restore(
        self, task: chex.Numeric, *, implementation: str | None = None
    ) -> chex.ArrayTree:
        """The parameters of one task.

        Args:
          task: index in [0, T); may be traced, then values outside are clamped.
          implementation: of `kernels.masked_restore`.

        Returns:
          Tree like `base`; leaves that are not floats are those of `base`.

        Raises:
          ValueError: if a concrete index is out of range.
        """
        if not isinstance(task, jax.core.Tracer) and not 0 <= task < self.num_tasks:
            raise ValueError(
                f"MaskBank.restore: task is {task}, wanted 0 to {self.num_tasks - 1}"
            )

        def leaf(base, delta, masks):
            if not tree.is_inexact(base):
                return base
            packed = jax.lax.dynamic_index_in_dim(masks, task, keepdims=False)
            return kernels.masked_restore(
                base, delta, packed, scale=self.scale, implementation=implementation
            )

        return jax.tree.map(leaf, self.base, self.delta, self.masks)
