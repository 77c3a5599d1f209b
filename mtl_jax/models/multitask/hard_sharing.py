"""Hard parameter sharing: one trunk, one head per task."""

from typing import Any

import chex

from mtl_jax.models.multitask.base import Factory, MultiTaskModule


class HardSharing(MultiTaskModule, kw_only=True):
    """outputs_t = head_t(encoder(x)).

    `z["shared"]` is the encoder's output, [B, ...].

    Attributes:
      outputs: task name -> width of its output.
      head: width -> head module.
      backbone: makes the encoder.

    **Follows**: Caruana 1997, "Multitask Learning".

    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models
    >>> module = HardSharing(
    ...     backbone=lambda: models.Mlp((8,)), outputs={"income": 1, "married": 1}
    ... )
    >>> y, variables = module.init_with_output(jax.random.key(0), jnp.ones((3, 5)))
    >>> y["married"].shape, sorted(variables["params"])
    ((3, 1), ['encoder', 'heads_income', 'heads_married'])
    """

    backbone: Factory

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """The encoder."""
        return ("^encoder/",)

    def setup(self):
        """Makes encoder and heads."""
        self.encoder = self.backbone()
        self.heads = self._make_heads()

    def encode(self, *inputs: chex.Array, **options: Any) -> dict[str, Any]:
        """Args: what the backbone takes. Returns: {"shared": [B, ...]}."""
        return {"shared": self.encoder(*inputs, **options)}

    def feature(self, z, task: int) -> chex.Array:
        """The same for every task."""
        del task
        return z["shared"]
