"""Low-rank adapters of experts: trained as such, or cut from what was trained in full.

Rows that keep adapters in some form and bring one back per task count what they keep.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mtl_jax import tree
from mtl_jax.transforms import merging
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.quantization import nf4
from mtl_jax.zoo.encoders import Encoder
from mtl_jax.zoo.rows import TaskModels, task_delta


def adapted(
    encoder: Encoder,
    *,
    rank: int,
    alpha: float,
    rules: Sequence[str] = ("kernel$",),
    seed: int = 0,
) -> Encoder:
    """The encoder with an adapter, of which alone the leaves are trained.

    All experts start from one `a`, drawn by the seed, and from `b` = 0.

    Args:
      encoder: base, frozen as a whole.
      rank: of the adapter.
      alpha: of its scale, alpha / rank.
      rules: regular expressions of the leaves that are adapted.
      seed: of the initial `a`.

    Returns:
      An encoder whose parameters are {"base": ..., "lora": an adapter}.
    """
    start = lora.init(jax.random.key(seed), encoder.params, list(rules), rank=rank)

    def features(params, batch):
        whole = lora.merge(params["base"], params["lora"], alpha=alpha)
        return encoder.features(whole, batch)

    return dataclasses.replace(
        encoder,
        name=f"{encoder.name}-lora-{rank}-{alpha:g}",
        params={"base": encoder.params, "lora": start},
        features=features,
        frozen=("(^|/)base/",),
        rules=(("(^|/)lora/", PartitionSpec()), *encoder.rules),
    )


class Adapters:
    """Adapters of the experts, from task vectors, made once for all rows.

    Args:
      rank: of adapters that are cut from full task vectors; None where experts were
        trained as adapters, see `adapted`: their differences from the common start,
        which are factors, serve as adapters.
      svd: how singular vectors are found; see `merging.lora_from_taus`.
    """

    def __init__(self, rank: int | None = None, svd: Any = "svd"):
        self.rank = rank
        self._svd = svd
        self._of, self._loras = None, []

    def __call__(self, taus: Any) -> list[Any]:
        """One adapter with scale 1 per task."""
        if self._of is not taus:
            self._of = taus
            self._loras = (
                lora.unstack(taus["lora"])
                if self.rank is None
                else merging.lora_from_taus(taus, rank=self.rank, svd=self._svd)
            )
        return self._loras

    def bank(self, taus: Any) -> Any:
        """All of them as a task tree, leaves [T, ...]."""
        return lora.stack(self(taus))

    def added(self, like: Any, adapter: Any) -> Any:
        """What an adapter adds to the base, a tree like the trained parameters."""
        if self.rank is None:
            return {**like, "lora": adapter}
        return _product(like, adapter)

    def products(self, taus: Any) -> Any:
        """What all of them add, a task tree like `taus`."""
        like = task_delta(taus, 0)
        return jax.vmap(lambda one: self.added(like, one))(self.bank(taus))

    def row(
        self,
        name: str,
        store: Callable[[list[Any]], Any],
        restore: Callable[[Any, int], Any],
    ) -> TaskModels:
        """One model per task from what is kept of the adapters, counted as it is.

        Args:
          name: of the row.
          store: adapters -> any tree of arrays.
          restore: (that tree, task) -> adapter.
        """
        kept = {}

        def prepare(taus, _):
            state = store(self(taus))
            kept["bits"] = 8 * tree.nbytes(state)
            return state, task_delta(taus, 0)

        def bits(num_tasks, trained, frozen):
            del num_tasks
            base = frozen if self.rank is None else trained + frozen
            return 32 * base + kept["bits"]

        def delta(state, task, knob):
            del knob
            return self.added(state[1], restore(state[0], task))

        return TaskModels(name=name, prepare=prepare, delta=delta, bits=bits)


def nf4_adapters(loras: Sequence[Any]) -> list[Any]:
    """Adapters in 4 bits and a scale for every 64 values along their long axes."""
    return [nf4.quantize(_turned(each), ".") for each in loras]


def from_nf4(kept: Sequence[Any], task: int) -> Any:
    """One adapter of `nf4_adapters`."""
    return _turned(nf4.dequantize(kept[task]))


def _turned(adapter):
    """Long axes last, where the blocks of the quantiser lie; and back."""
    return tree.map_with_path(
        lambda name, x: jnp.swapaxes(x, -1, -2) if name.endswith("/a") else x, adapter
    )


@jax.jit
def _product(like, adapter):
    rank = jax.tree.leaves(adapter)[0].shape[-1]  # Of `a`, the first by name.
    zeros = jax.tree.map(jnp.zeros_like, like)
    return lora.merge(zeros, adapter, alpha=float(rank))
