"""What decoding asks of a model, and how decoders and mixtures of models answer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtl_jax import models, placement
from mtl_jax.models.backbones.decoder import CACHE_RULES


class Recorded(NamedTuple):
    """Logits, and what else is worth keeping of a step.

    Attributes:
      logits: [B, V].
      record: tree of arrays [B, ...], of the same shapes at every step, or None.
    """

    logits: chex.Array
    record: Any = None


def recorded(found: "chex.Array | Recorded") -> Recorded:
    """What a step model puts out, with or without a record."""
    return found if isinstance(found, Recorded) else Recorded(found)


class StepModel(Protocol):
    """A model that reads a prompt and then one token after the other.

    It is a static argument of compiled functions: hashable, and equal to whatever
    does the same. Logits are [B, V], or `Recorded` with them.
    """

    @property
    def context(self) -> int | None:
        """Tokens that a row can hold, None = any number."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """V, or None where it is not known beforehand."""
        ...

    def init_cache(self, params: Any, batch: int, length: int) -> Any:
        """An empty cache for `batch` rows of up to `length` tokens, a pytree."""
        ...

    def prefill(
        self, params: Any, ids: chex.Array, lengths: chex.Array, cache: Any
    ) -> tuple[chex.Array | Recorded, Any]:
        """Reads prompts [B, P], right-padded; logits after the last token of each."""
        ...

    def decode(
        self, params: Any, token: chex.Array, cache: Any
    ) -> tuple[chex.Array | Recorded, Any]:
        """Reads one token [B] per row; logits after it."""
        ...

    def reorder(self, cache: Any, rows: chex.Array) -> Any:
        """The cache of the rows [B'] given by number; beam search only.

        Rows of a prompt lie side by side, as many for each, before and after.
        """
        ...


def hashable(module: nn.Module) -> nn.Module:
    """The module with mappings among its attributes frozen."""
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.name not in ("parent", "name")
    }
    mappings = {k: flax.core.freeze(v) for k, v in fields.items() if _open(v)}
    return module.clone(**mappings) if mappings else module


def _open(value):
    return isinstance(value, Mapping) and not isinstance(value, flax.core.FrozenDict)


@dataclasses.dataclass(frozen=True)
class DecoderModel:
    """A `StepModel` of a `models.Decoder`; see `from_decoder`."""

    module: nn.Module
    cache_dtype: DTypeLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "module", hashable(self.module))

    @property
    def context(self) -> int:
        """The longest context that the module is made for."""
        return self.module.max_positions

    @property
    def vocab_size(self) -> int:
        """V of the module."""
        return self.module.vocab_size

    def init_cache(self, params, batch, length):
        """See `StepModel`. Split over the mesh in context, see `placement`."""
        del params
        cache = models.init_cache(self.module, batch, length, self.cache_dtype)
        return placement.keep_by_rules(cache, CACHE_RULES)

    def prefill(self, params, ids, lengths, cache):
        """See `StepModel`."""
        columns = jnp.arange(ids.shape[1], dtype=jnp.int32)
        segments = (columns[None] < lengths[:, None]).astype(jnp.int32)
        last = jnp.maximum(lengths - 1, 0)[:, None]
        logits, cache = self.module.apply(
            {"params": params}, ids, segments, cache=cache, logits_at=last
        )
        return logits[:, 0], cache

    def decode(self, params, token, cache):
        """See `StepModel`."""
        logits, cache = self.module.apply(
            {"params": params}, token[:, None], cache=cache
        )
        return logits[:, 0], cache

    def reorder(self, cache, rows):
        """See `StepModel`."""
        return models.reorder_cache(cache, rows)


def from_decoder(
    module: nn.Module, *, cache_dtype: DTypeLike | None = None
) -> DecoderModel:
    """Lets a `models.Decoder` be decoded.

    Args:
      module: the decoder.
      cache_dtype: of keys and values; None = the compute dtype of the module.

    Returns:
      A `StepModel`.
    """
    return DecoderModel(module, cache_dtype)


def _encodes(model):
    return bool(getattr(model, "encodes", False))


Fuse = Callable[[tuple[chex.Array, ...]], chex.Array | tuple[chex.Array, Any]]


@dataclasses.dataclass(frozen=True)
class FusedModel:
    """A `StepModel` of several; see `fused`."""

    models: tuple[StepModel, ...]
    fuse: Fuse
    vocab_size: int | None

    @property
    def encodes(self) -> bool:
        """Whether prompts take no room beside what is generated."""
        return _encodes(self.models[0])

    @property
    def context(self) -> int | None:
        """The shortest context among the models."""
        known = [m.context for m in self.models if m.context is not None]
        return min(known, default=None)

    def init_cache(self, params, batch, length):
        """See `StepModel`."""
        self._check(params)
        return tuple(
            model.init_cache(p, batch, length)
            for model, p in zip(self.models, params, strict=True)
        )

    def prefill(self, params, ids, lengths, cache):
        """See `StepModel`."""
        return self._all("prefill", params, (ids, lengths), cache)

    def decode(self, params, token, cache):
        """See `StepModel`."""
        return self._all("decode", params, (token,), cache)

    def reorder(self, cache, rows):
        """See `StepModel`."""
        return tuple(
            model.reorder(own, rows)
            for model, own in zip(self.models, cache, strict=True)
        )

    def _all(self, name, params, arguments, cache):
        self._check(params)
        logits, caches = [], []
        for model, p, own in zip(self.models, params, cache, strict=True):
            found, own = getattr(model, name)(p, *arguments, own)
            found = recorded(found)
            if found.record is not None:
                raise ValueError("fused: a model inside records something itself")
            found = found.logits
            logits.append(found[:, : self.vocab_size].astype(jnp.float32))
            caches.append(own)
        return self._fused(tuple(logits)), tuple(caches)

    def _fused(self, logits):
        out = self.fuse(logits)
        if not isinstance(out, tuple):
            return out
        if len(out) != 2:
            raise ValueError(
                f"fused: fuse makes {len(out)} things, wanted logits or (logits, "
                "record)"
            )
        return Recorded(out[0], jax.tree.map(jnp.asarray, out[1]))

    def _check(self, params):
        if len(params) != len(self.models):
            raise ValueError(
                f"fused: {len(self.models)} models, but the parameters of {len(params)}"
            )


def fused(
    step_models: Sequence[StepModel],
    fuse: Fuse,
    *,
    vocab_size: int | None = None,
) -> FusedModel:
    """Several models over one vocabulary that decode as one.

    All of them read the same prompts and the tokens chosen from the fused logits.

    Args:
      step_models: the models; parameters of the whole are a tuple, one entry each.
      fuse: pure; the logits of the models, each [B, V] float32, to logits [B, V], or
        to (logits, record): a tree of arrays [B, ...] that `generate` hands back for
        every step, as `Generation.records`. Compiled in: define it once.
      vocab_size: V where models pad their vocabularies differently: logits beyond it
        are cut off. None wants vocabularies of one size.

    Returns:
      A `StepModel`.

    Raises:
      ValueError: without models, if vocabularies differ or are smaller, or for decoders
        beside encoder-decoders; when run, if a model inside records something.
    """
    step_models = tuple(step_models)
    if not step_models:
        raise ValueError("fused: wanted one or more models")
    if len({_encodes(model) for model in step_models}) > 1:
        raise ValueError(
            "fused: decoders and encoder-decoders keep prompts in different places"
        )
    sizes = [m.vocab_size for m in step_models]
    known = {size for size in sizes if size is not None}
    if vocab_size is None and len(known) > 1:
        raise ValueError(
            f"fused: vocabularies are of {', '.join(map(str, sizes))} tokens; give "
            "vocab_size where the first tokens are the same"
        )
    if vocab_size is not None and known and min(known) < vocab_size:
        raise ValueError(
            f"fused: vocab_size is {vocab_size}, the smallest vocabulary {min(known)}"
        )
    size = vocab_size or next(iter(known), None)
    return FusedModel(step_models, fuse, size)
