"""Text from language models: sampling, beam search, scoring, all of static shapes.

Any model takes part that can read a prompt and then one token after the other
(`StepModel`): `from_decoder` makes one of a `models.Decoder`, `from_encoder_decoder`
of a `models.EncoderDecoder`, `fused` one of several.
"""

from mtl_jax.decoding import logits
from mtl_jax.decoding._ahead import generation_fn
from mtl_jax.decoding._beam import Beams, beam_search
from mtl_jax.decoding._encoder_decoder import (
    EncoderDecoderLogprobs,
    EncoderDecoderModel,
    from_encoder_decoder,
)
from mtl_jax.decoding._generate import Generation, Reason, generate, stream
from mtl_jax.decoding._models import (
    DecoderModel,
    FusedModel,
    Recorded,
    StepModel,
    from_decoder,
    fused,
)
from mtl_jax.decoding._perplexity import Perplexity, perplexity
from mtl_jax.decoding._prompts import bucket, pad_prompts
from mtl_jax.decoding._scoring import (
    Candidates,
    DecoderLogprobs,
    LogitsLogprobs,
    Ranking,
    SequenceScores,
    pad_candidates,
    rank_classify,
    sequence_logprob,
)
from mtl_jax.decoding._text import Detokenizer, StopStrings

__all__ = [
    "Beams",
    "Candidates",
    "DecoderLogprobs",
    "DecoderModel",
    "Detokenizer",
    "EncoderDecoderLogprobs",
    "EncoderDecoderModel",
    "FusedModel",
    "Generation",
    "LogitsLogprobs",
    "Perplexity",
    "Ranking",
    "Reason",
    "Recorded",
    "SequenceScores",
    "StepModel",
    "StopStrings",
    "beam_search",
    "bucket",
    "from_decoder",
    "from_encoder_decoder",
    "fused",
    "generate",
    "generation_fn",
    "logits",
    "pad_candidates",
    "pad_prompts",
    "perplexity",
    "rank_classify",
    "sequence_logprob",
    "stream",
]
