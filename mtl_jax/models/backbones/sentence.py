"""A token encoder with the mean over its tokens: one vector per text."""

from collections.abc import Callable

import chex
import flax.linen as nn

from mtl_jax.models.heads.pooling import mean_pool


class SentenceEncoder(nn.Module):
    """`mean_pool(encoder(input_ids, attention_mask), attention_mask)`.

    Attributes:
      make_encoder: makes the token encoder, `Bert` for instance; its parameters are
        under "encoder".
    """

    make_encoder: Callable[[], nn.Module]

    def setup(self):
        """Makes the encoder."""
        self.encoder = self.make_encoder()

    def __call__(
        self, input_ids: chex.Array, attention_mask: chex.Array, **options
    ) -> chex.Array:
        """Args: both [B, L]. Returns: [B, D]."""
        hidden = self.encoder(input_ids, attention_mask, **options)
        return mean_pool(hidden, attention_mask)
