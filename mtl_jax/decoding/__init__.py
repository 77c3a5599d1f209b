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
from mtl_jax.decoding._fusion import (
    DynamicFusion,
    Fusion,
    KlStats,
    StaticFusion,
    Targets,
    expert_targets,
    fuse_logits,
    logit_kl_stats,
    solve_alpha,
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
    "DynamicFusion",
    "EncoderDecoderLogprobs",
    "EncoderDecoderModel",
    "FusedModel",
    "Fusion",
    "Generation",
    "KlStats",
    "LogitsLogprobs",
    "Perplexity",
    "Ranking",
    "Reason",
    "Recorded",
    "SequenceScores",
    "StaticFusion",
    "StepModel",
    "StopStrings",
    "Targets",
    "beam_search",
    "bucket",
    "expert_targets",
    "from_decoder",
    "from_encoder_decoder",
    "fuse_logits",
    "fused",
    "generate",
    "generation_fn",
    "logit_kl_stats",
    "logits",
    "pad_candidates",
    "pad_prompts",
    "perplexity",
    "rank_classify",
    "sequence_logprob",
    "solve_alpha",
    "stream",
]
