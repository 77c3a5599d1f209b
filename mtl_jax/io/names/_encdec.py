"""What the tables of encoder-decoders share: one embedding under several names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from mtl_jax import tree as tree_lib
from mtl_jax.io.names._decoder import HEAD, DecoderTable, LazyTensors

_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_LOGITS_BIAS = "final_logits_bias"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecTable(DecoderTable):
    """A `NameTable` whose file may repeat the embedding, or lack what follows from it.

    Attributes:
      inside: what names begin with in a checkpoint that has its head; one of the model
        alone lacks it.
    """

    inside: str = ""

    def load(
        self,
        tensors: Mapping[str, Any],
        like: Any = None,
        *,
        dtype: DTypeLike | None = None,
        where: str = "NameTable.load",
    ) -> dict[str, Any]:
        """See `NameTable.load`.

        Copies of the embedding must equal it. A head that the model has and the file
        lacks is the embedding, a bias of the logits 0.
        """
        readers = {
            self._whole(name): (lambda name=name: tensors[name]) for name in tensors
        }
        wanted = None if like is None else set(tree_lib.paths(like))
        tied = wanted is not None and HEAD.path not in wanted
        shared = f"{self.inside}shared.weight"
        names = [shared, *(self.inside + name for name in _COPIES)]
        names += [HEAD.name] if tied else []
        there = [name for name in names if name in readers]
        for name in there[1:]:
            if not np.array_equal(readers[there[0]](), readers[name]()):
                raise ValueError(
                    f"{where}: {name!r} differs from {there[0]!r}, which the model "
                    "puts in its place"
                )
        if there:
            embedding = readers[there[0]]
            readers = {k: v for k, v in readers.items() if k not in there}
            readers[shared] = embedding
            if wanted is not None and HEAD.path in wanted:
                readers.setdefault(HEAD.name, embedding)
            if wanted is not None and "head/bias" in wanted:
                readers.setdefault(_LOGITS_BIAS, lambda: _no_bias(embedding()))
        # Not `tensors`: the readers read from those given.
        whole = LazyTensors(readers)
        return DecoderTable.load(self, whole, like, dtype=dtype, where=where)

    def _whole(self, name):
        outside = name in (HEAD.name, _LOGITS_BIAS)
        return name if outside else self.inside + name.removeprefix(self.inside)


def _no_bias(embedding):
    return np.zeros((1, embedding.shape[0]), embedding.dtype)
