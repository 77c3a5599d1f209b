"""CLIP: a text tower, and both towers with the scale that joins them."""

from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.backbones import vit
from mtl_jax.models.backbones.vit import ViT
from mtl_jax.models.heads.prototype import l2_normalize, prototype_logits
from mtl_jax.models.layers.attention import causal_bias, mask_bias
from mtl_jax.models.layers.encoder_block import PreNormBlock
from mtl_jax.models.layers.norm import LayerNorm
from mtl_jax.models.layers.sharding import BLOCK_RULES
from mtl_jax.models.layers.stack import run_stack
from mtl_jax.models.layers.token_embeddings import TokenEmbeddings

TEXT_SHARDING_RULES = (
    (r"^(.*/)?embeddings/(word|position)/embedding$", P(None, "data")),
    (r"^(.*/)?norm_post/(scale|bias)$", P()),
    (r"^(.*/)?projection/kernel$", P("data", None)),
    *BLOCK_RULES,
)
SHARDING_RULES = (
    (r"^(.*/)?logit_scale$", P()),
    *TEXT_SHARDING_RULES,
    *vit.SHARDING_RULES,
)

TEXT_SIZES = {
    "b": {"width": 512, "num_heads": 8, "projection": 512},
    "l": {"width": 768, "num_heads": 12, "projection": 768},
}

# The temperature that training starts from, 0.07.
_LOGIT_SCALE = float(np.log(1 / 0.07))


def both(size: str, patch_size: int) -> dict[str, Any]:
    """Options of `Clip` for a published size, "b" or "l"."""
    text = TEXT_SIZES[size]
    vision = {"patch_size": patch_size, "projection": text["projection"]}
    return {"vision_options": {**vision, **vit.SIZES[size]}, "text_options": text}


class ClipText(nn.Module):
    """Texts to features; the defaults are those of CLIP ViT-B.

    Blocks are causal, and the features of a text are those of its end token, after
    which nothing is read: padding to the right of it needs no mask.

    Attributes:
      vocab_size: V.
      width: D.
      depth: number of blocks.
      num_heads: heads per block.
      mlp_dim: hidden width of the feed-forward layers; None = 4 D.
      max_positions: longest text that has position embeddings.
      end_token: its first occurrence is pooled; a text without it gives its first
        position. None pools the first occurrence of the highest number in each text,
        as checkpoints want whose end token is the last of the vocabulary.
      pool: "end" or "none" (all tokens).
      projection: width of a final bias-free linear map, or None.
      activation: a name in `layers.ACTIVATIONS`.
      norm_eps: epsilon of every layer norm.
      dropout: rate on both residual branches; needs an rng named "dropout" when
        `deterministic=False`.
      scan: one scanned block, parameters stacked under `layers`.
      remat: True recomputes each block in the backward pass, "products" all of it
        but its large products; see `layers.rematerialised`.
      dtype: compute dtype; None follows the parameters.
      param_dtype: dtype of the parameters.

    **Follows**: Radford et al. 2021, "Learning Transferable Visual Models From Natural
    Language Supervision", section 2.4.
    """

    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_dim: int | None = None
    max_positions: int = 77
    end_token: int | None = 49407
    pool: str = "end"
    projection: int | None = 512
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: chex.Array,
        attention_mask: chex.Array | None = None,
        *,
        deterministic: bool = True,
        return_hidden: bool = False,
    ) -> chex.Array | tuple[chex.Array, ...]:
        """Encodes a batch of texts.

        Args:
          input_ids: [B, L] integer.
          attention_mask: [B, L] bool or integer, non-zero = token; None = all.
          deterministic: False switches dropout on.
          return_hidden: return every hidden state instead of the features.

        Returns:
          [B, D] (or [B, projection]); [B, L, D] for pool "none". With
          `return_hidden` a tuple of `depth + 1` arrays [B, L, D], the embeddings
          first and without the last layer norm.

        Raises:
          ValueError: if shapes disagree or L exceeds `max_positions`.
        """
        self._check(input_ids, attention_mask)
        length = input_ids.shape[1]
        slots = jnp.arange(length, dtype=jnp.int32)[None]
        x = embedded = TokenEmbeddings(
            vocab_size=self.vocab_size,
            width=self.width,
            num_positions=self.max_positions,
            scale=None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embeddings",
        )(input_ids, slots)
        bias = causal_bias(length)
        if attention_mask is not None:
            bias = bias + mask_bias(attention_mask)

        def make_block(name):
            return PreNormBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim or 4 * self.width,
                activation=self.activation,
                norm_eps=self.norm_eps,
                dropout=self.dropout,
                deterministic=deterministic,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        x, outputs = run_stack(
            make_block,
            self.depth,
            x,
            bias,
            scan=self.scan,
            remat=self.remat,
            collect=return_hidden,
        )
        features = self._pool(x, input_ids)
        return (embedded, *outputs) if return_hidden else features

    def _pool(self, x, input_ids):
        """Tokens [B, L, D] -> features; the norm acts on each token alone."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.pool == "end":
            rank = input_ids
            if self.end_token is not None:
                rank = (input_ids == self.end_token).astype(jnp.int32)
            end = jnp.argmax(rank, axis=1)[:, None, None]
            x = jnp.take_along_axis(x, end, axis=1)[:, 0]
        x = LayerNorm(self.norm_eps, name="norm_post", **options)(x)
        if self.projection is None:
            return x
        return nn.Dense(self.projection, use_bias=False, name="projection", **options)(
            x
        )

    def _check(self, input_ids, attention_mask):
        if self.pool not in ("end", "none"):
            raise ValueError(f"ClipText: pool must be end or none, is {self.pool!r}")
        if input_ids.ndim != 2 or input_ids.shape[1] > self.max_positions:
            raise ValueError(
                f"ClipText: input_ids must be [B, L], L at most {self.max_positions}, "
                f"found {input_ids.shape}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"ClipText: attention_mask is {attention_mask.shape}, input_ids "
                f"{input_ids.shape}"
            )


class Clip(nn.Module):
    """Images and texts as features of one space, compared by cosine.

    Parameters lie under `vision`, `text` and `logit_scale`.

    Attributes:
      vision_options: attributes of the `ViT`; `projection` is wanted.
      text_options: attributes of the `ClipText`; `projection` is wanted.
      scan: of both towers.
      remat: of both towers.
      dtype: compute dtype; None follows the parameters.
      param_dtype: dtype of the parameters.

    **Follows**: Radford et al. 2021, "Learning Transferable Visual Models From Natural
    Language Supervision", figure 3.
    """

    vision_options: Mapping[str, Any]
    text_options: Mapping[str, Any]
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes both towers and the scale."""
        own = {
            "scan": self.scan,
            "remat": self.remat,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        self.vision = ViT(**{**vit.CLIP_OPTIONS, **self.vision_options, **own})
        self.text = ClipText(**{**self.text_options, **own})
        if self.vision.projection is None or (
            self.vision.projection != self.text.projection
        ):
            raise ValueError(
                "Clip: both towers need projections of one width, found "
                f"{self.vision.projection} and {self.text.projection}"
            )
        self.logit_scale = self.param(
            "logit_scale",
            nn.initializers.constant(_LOGIT_SCALE),
            (),
            self.param_dtype,
        )

    def encode_images(
        self, images: chex.Array, *, deterministic: bool = True
    ) -> chex.Array:
        """Args: images: [B, H, W, C]. Returns: [B, P], of any length."""
        return jnp.asarray(self.vision(images, deterministic=deterministic))

    def encode_texts(
        self,
        input_ids: chex.Array,
        attention_mask: chex.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> chex.Array:
        """Args: input_ids, attention_mask: [T, L]. Returns: [T, P], of any length."""
        found = self.text(input_ids, attention_mask, deterministic=deterministic)
        return jnp.asarray(found)

    def __call__(
        self,
        images: chex.Array,
        input_ids: chex.Array,
        attention_mask: chex.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> chex.Array:
        """Similarity of every image and every text.

          logits[i, j] = exp(logit_scale) <image_i, text_j> / (|image_i| |text_j|)

        Args:
          images: [B, H, W, C] floating point.
          input_ids: [T, L] integer.
          attention_mask: [T, L] bool or integer, non-zero = token; None = all.
          deterministic: False switches dropout on.

        Returns:
          [B, T] float32.

        Raises:
          ValueError: as the towers, or if their projections differ.
        """
        options = {"deterministic": deterministic}
        found = self.encode_images(images, **options)
        texts = self.encode_texts(input_ids, attention_mask, **options)
        scale = jnp.exp(self.logit_scale.astype(jnp.float32))
        return prototype_logits(found, l2_normalize(texts), scale)
