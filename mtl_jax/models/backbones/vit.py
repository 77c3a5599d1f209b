"""Vision transformer, and the image tower of CLIP as options of the same module."""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mtl_jax.models.layers.encoder_block import PreNormBlock
from mtl_jax.models.layers.norm import LayerNorm
from mtl_jax.models.layers.sharding import BLOCK_RULES
from mtl_jax.models.layers.stack import run_stack

SHARDING_RULES = (
    (r"^(.*/)?patch_embed/kernel$", P(None, "data")),
    (r"^(.*/)?patch_embed/bias$", P()),
    (r"^(.*/)?(cls_token|position_embedding)$", P()),
    (r"^(.*/)?(norm_pre|norm_post)/(scale|bias)$", P()),
    (r"^(.*/)?projection/kernel$", P("data", None)),
    *BLOCK_RULES,
)

SIZES = {
    "ti": {"width": 192, "depth": 12, "num_heads": 3},
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
}

CLIP_OPTIONS = {
    "norm_pre": True,
    "patch_bias": False,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
}


def patches(images: chex.Array, size: int) -> chex.Array:
    """Cuts images into flattened square patches, row by row.

    Args:
      images: [B, H, W, C]; `size` divides H and W.
      size: side of a patch.

    Returns:
      [B, H/size * W/size, size * size * C]; inside a patch (row, column, channel).
    """
    b, h, w, c = images.shape
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * c)


class ViT(nn.Module):
    """Images to features.

    The patch embedding is a Dense layer over flattened patches (`patch_embed`).

    Attributes:
      image_size: side of the square images.
      patch_size: side of a patch; must divide `image_size`.
      width: D.
      depth: number of blocks.
      num_heads: heads per block.
      mlp_dim: hidden width of the feed-forward layers; None = 4 D.
      pool: "cls" (class token), "mean" (over patches; no class token exists) or
        "none" (all tokens, class token first).
      norm_pre: layer norm right after the embeddings, as in CLIP.
      patch_bias: give the patch embedding a bias.
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

    **Follows**: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; with
    `CLIP_OPTIONS`, Radford et al. 2021, "Learning Transferable Visual Models From
    Natural Language Supervision".
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_dim: int | None = None
    pool: str = "cls"
    norm_pre: bool = False
    patch_bias: bool = True
    projection: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scan: bool = False
    remat: bool | str = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: chex.Array,
        *,
        deterministic: bool = True,
        return_hidden: bool = False,
    ) -> chex.Array | tuple[chex.Array, ...]:
        """Encodes a batch of images.

        Args:
          images: [B, image_size, image_size, C] floating point.
          deterministic: False switches dropout on.
          return_hidden: return every hidden state instead of the features.

        Returns:
          [B, D] (or [B, projection]); [B, L, D] for pool "none". With
          `return_hidden` a tuple of `depth + 1` arrays [B, L, D], what enters the
          first block first and without the last layer norm.

        Raises:
          ValueError: if the image shape or an attribute does not fit.
        """
        self._check(images)
        x = embedded = self._embed(images)

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
            None,
            scan=self.scan,
            remat=self.remat,
            collect=return_hidden,
        )
        features = self._pool(x)
        return (embedded, *outputs) if return_hidden else features

    def _embed(self, images):
        """[B, H, W, C] -> tokens [B, L, D], positions added."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(
            self.width, use_bias=self.patch_bias, name="patch_embed", **options
        )(patches(images, self.patch_size))
        init = nn.initializers.normal(0.02)
        if self.pool != "mean":
            cls = self.param("cls_token", init, (self.width,), self.param_dtype)
            cls = jnp.broadcast_to(
                cls.astype(x.dtype)[None, None], (x.shape[0], 1, self.width)
            )
            x = jnp.concatenate([cls, x], axis=1)
        position = self.param(
            "position_embedding", init, (x.shape[1], self.width), self.param_dtype
        )
        x = x + position.astype(x.dtype)[None]
        if self.norm_pre:
            x = LayerNorm(self.norm_eps, name="norm_pre", **options)(x)
        return x

    def _pool(self, x):
        """Tokens [B, L, D] -> features; the norm acts on each token alone."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.pool == "cls":
            x = x[:, 0]
        x = LayerNorm(self.norm_eps, name="norm_post", **options)(x)
        if self.pool == "mean":
            x = jnp.mean(x, axis=1)
        if self.projection is not None:
            x = nn.Dense(self.projection, use_bias=False, name="projection", **options)(
                x
            )
        return x

    def _check(self, images):
        if self.pool not in ("cls", "mean", "none"):
            raise ValueError(f"ViT: pool must be cls, mean or none, is {self.pool!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViT: patch_size must divide image_size, found {self.patch_size} "
                f"and {self.image_size}"
            )
        if images.ndim != 4 or images.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(
                f"ViT: images must be [B, {self.image_size}, {self.image_size}, C], "
                f"found {images.shape}"
            )
