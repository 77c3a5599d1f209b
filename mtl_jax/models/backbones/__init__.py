"""Backbones, one file each."""

from mtl_jax.models.backbones.bert import Bert
from mtl_jax.models.backbones.clip import Clip, ClipText
from mtl_jax.models.backbones.decoder import Decoder
from mtl_jax.models.backbones.encdec import EncoderDecoder
from mtl_jax.models.backbones.encdec_inputs import shift_right
from mtl_jax.models.backbones.mlp import Mlp
from mtl_jax.models.backbones.sentence import SentenceEncoder
from mtl_jax.models.backbones.small_conv import ConvStage, SmallConv
from mtl_jax.models.backbones.vit import ViT

__all__ = [
    "Bert",
    "Clip",
    "ClipText",
    "ConvStage",
    "Decoder",
    "EncoderDecoder",
    "Mlp",
    "SentenceEncoder",
    "SmallConv",
    "ViT",
    "shift_right",
]
