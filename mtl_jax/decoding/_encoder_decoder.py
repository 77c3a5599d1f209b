"""Encoder-decoders in the loops of decoding and in scoring."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax import losses, models, placement
from mtl_jax.decoding._models import hashable
from mtl_jax.models.backbones.encdec import CACHE_RULES, head_operands

_SEGMENTS = "memory_segments"


@dataclasses.dataclass(frozen=True)
class EncoderDecoderModel:
    """A `StepModel` of a `models.EncoderDecoder`; see `from_encoder_decoder`."""

    module: nn.Module
    start: int = 0
    cache_dtype: DTypeLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "module", hashable(self.module))

    @property
    def encodes(self) -> bool:
        """True: prompts take no room beside what is generated."""
        return True

    @property
    def context(self) -> int | None:
        """The longest text on either side, None = any."""
        return self.module.max_positions

    @property
    def vocab_size(self) -> int:
        """V of the module."""
        return self.module.vocab_size

    def init_cache(self, params, batch, length):
        """See `StepModel`. Room for a memory is made when its size is known."""
        del params
        return models.init_cache(self.module, batch, length, self.cache_dtype, memory=0)

    def prefill(self, params, ids, lengths, cache):
        """See `StepModel`. The encoder runs here, and here only."""
        columns = jnp.arange(ids.shape[1], dtype=jnp.int32)
        segments = (columns[None] < lengths[:, None]).astype(jnp.int32)
        memory = self._apply(params, ids, segments, method="encode")
        start = jnp.full((len(ids), 1), self.start, jnp.int32)
        cache = placement.keep_by_rules(_with_memory(cache, segments), CACHE_RULES)
        logits, cache = self._apply(
            params, start, memory, segments, cache=cache, method="decode"
        )
        return logits[:, 0], cache

    def decode(self, params, token, cache):
        """See `StepModel`."""
        logits, cache = self._apply(
            params, token[:, None], cache=cache, method="decode"
        )
        return logits[:, 0], cache

    def reorder(self, cache, rows):
        """See `StepModel`.

        The rows of a prompt stay side by side, as many for each prompt: what the
        encoder put out is neither moved nor repeated.
        """
        own = {name: _own(part) for name, part in cache.items() if name != _SEGMENTS}
        moved = models.reorder_cache(own, rows)
        for name, part in cache.items():
            if isinstance(part, dict):
                moved[name] = {**part, **moved[name]}
        return {**cache, **moved}

    def _apply(self, params, *inputs, **options):
        return self.module.apply({"params": params}, *inputs, **options)


def _own(part):
    """What a row wrote itself, without what it makes of the memory."""
    if not isinstance(part, dict):
        return part
    return {kind: x for kind, x in part.items() if not kind.startswith("memory_")}


def _with_memory(cache, segments):
    """The cache with room for a memory of these segments [B, S]."""

    def leaf(kind, x):
        if not kind.startswith("memory_"):
            return x
        shape = (*x.shape[:-3], segments.shape[1], *x.shape[-2:])
        return jnp.zeros(shape, x.dtype)

    grown = {
        name: {kind: leaf(kind, x) for kind, x in part.items()}
        for name, part in cache.items()
        if isinstance(part, dict)
    }
    return {**cache, **grown, _SEGMENTS: segments}


def from_encoder_decoder(
    module: nn.Module, *, start: int = 0, cache_dtype: DTypeLike | None = None
) -> EncoderDecoderModel:
    """Lets a `models.EncoderDecoder` be decoded.

    Prompts are what the encoder reads. Processors take them for the prompt, too:
    `repetition_penalty` counts their tokens.

    Args:
      module: the encoder-decoder.
      start: token in front of every text that is written; 0 for T5, 2 for BART
        (`decoder_start_token_id` of a `config.json`).
      cache_dtype: of keys and values; None = the compute dtype of the module.

    Returns:
      A `StepModel`.

    Raises:
      ValueError: for a token that the vocabulary lacks.
    """
    _check_start("from_encoder_decoder", module, start)
    return EncoderDecoderModel(module, start, cache_dtype)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderLogprobs:
    """A `LogprobFn` of a `models.EncoderDecoder`, the vocabulary never whole.

    It wants a source, see `sequence_logprob`.

    Attributes:
      module: the encoder-decoder.
      start: token in front of every text, see `from_encoder_decoder`.
      chunk: positions whose logits exist at a time.
    """

    module: nn.Module
    start: int = 0
    chunk: int = 128

    def __post_init__(self):
        _check_start("EncoderDecoderLogprobs", self.module, self.start)
        object.__setattr__(self, "module", hashable(self.module))

    def __call__(
        self,
        params: Any,
        input_ids: chex.Array,
        labels: chex.Array,
        segment_ids: chex.Array | None = None,
        *,
        source: chex.Array,
        source_segment_ids: chex.Array | None = None,
    ) -> chex.Array:
        """See `LogprobFn`; `source` [B / G, S] is what the encoder reads."""
        hidden = self.module.apply(
            {"params": params},
            source,
            input_ids,
            source_segment_ids,
            segment_ids,
            head=False,
        )
        hidden, kernel = head_operands(self.module, params, hidden)
        return -losses.token_cross_entropy(hidden, kernel, labels, chunk=self.chunk)


def _check_start(where, module, start):
    if not 0 <= start < module.vocab_size:
        raise ValueError(
            f"{where}: start is token {start}, the vocabulary {module.vocab_size} "
            "tokens"
        )
