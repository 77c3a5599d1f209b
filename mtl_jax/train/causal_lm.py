"""Next-token training of a decoder: the whole model, or an adapter of a frozen one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mtl_jax import losses, models
from mtl_jax.models.adapted import apply_adapted
from mtl_jax.models.layers.token_embeddings import head_kernel
from mtl_jax.train.trainable import Rules, Trainable
from mtl_jax.transforms.adapters import lora as lora_lib
from mtl_jax.transforms.quantization import nf4

PER = ("token", "segment")
MODES = ("merge", "intercept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What is adapted and how; see `adapters.lora`.

    Attributes:
      rules: regexes on leaf names, or a mapping of such to ranks.
      rank: r, where the rules give none.
      alpha: see `adapters.lora.scale`.
      rslora: see `adapters.lora.scale`.
      init: of the first factor.
      mode: "merge" forms the adapted kernels in the loss, for leaves of any kind;
        "intercept" lets Dense layers add the product, see `models.apply_adapted`.
    """

    rules: tuple[str, ...] | Mapping[str, int]
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    init: str = "kaiming"
    mode: str = "merge"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(
                f"LoraSettings: mode is {self.mode!r}, wanted one of {MODES}"
            )

    def start(self, key: chex.PRNGKey, base: Any) -> dict[str, Any]:
        """{"base", "lora"}: what `Trainer.fit` takes as `params`."""
        lora = lora_lib.init(key, base, self.rules, rank=self.rank, init=self.init)
        return {"base": base, "lora": lora}

    def merge(self, params: Mapping[str, Any]) -> Any:
        """Parameters of the model itself, from {"base", "lora"}; decoded."""
        scaling = {"alpha": self.alpha, "rslora": self.rslora}
        return nf4.dequantize(lora_lib.merge(params["base"], params["lora"], **scaling))


def token_losses(
    module: models.Decoder,
    lora: LoraSettings | None = None,
    *,
    chunk: int = 128,
) -> Callable[[Any, Mapping[str, Any]], tuple[chex.Array, chex.Array]]:
    """The loss of every token of packed rows, without all logits at once.

    Args:
      module: the decoder.
      lora: None for parameters of the module itself.
      chunk: see `losses.token_cross_entropy`.

    Returns:
      `f(params, batch) -> (losses [B, L], weights [B, L])`, place i for the token that
      follows place i. Of the batch it reads `input_ids` [B, L] and, where there,
      `segment_ids`, `positions` and `weights` [B, L], of each token as something to
      predict; see `data.Packed`.
    """

    def apply(params, *inputs):
        if lora is None or lora.mode == "merge":
            params = nf4.dequantize(params) if lora is None else lora.merge(params)
            return module.apply({"params": params}, *inputs, head=False), params
        scaling = {"alpha": lora.alpha, "rslora": lora.rslora}
        hidden = apply_adapted(
            module, params["base"], params["lora"], *inputs, **scaling, head=False
        )
        return hidden, params["base"]

    def compute(params, batch):
        ids, segments = batch["input_ids"], batch.get("segment_ids")
        hidden, own = apply(params, ids, segments, batch.get("positions"))
        labels, weights = losses.next_tokens(ids, segments)
        if "weights" in batch:
            ahead = jnp.pad(batch["weights"][:, 1:], ((0, 0), (0, 1)))
            weights = weights * ahead.astype(weights.dtype)
        found = losses.token_cross_entropy(
            hidden,
            _head(module, own),
            labels,
            weights,
            chunk=chunk,
            softcap=module.logit_softcap,
        )
        return found, weights

    return compute


def causal_lm(
    module: models.Decoder,
    base: Any,
    *,
    tx: optax.GradientTransformation,
    lora: LoraSettings | None = None,
    per: str = "token",
    max_segments: int | None = None,
    chunk: int = 128,
) -> Trainable:
    """Next-token prediction on packed rows, for the one trainer.

    With `lora` the parameters are {"base", "lora"}, and the base is frozen: it gets no
    gradient and no optimizer state. It may hold `quantization.nf4` leaves.

    Args:
      module: the decoder.
      base: its parameters or their shapes; `init` makes zeros like it, so hand the
        weights to `Trainer.fit(params=...)`, of `lora.start(key, base)` or themselves.
      tx: optimizer.
      lora: what is adapted; None trains every leaf.
      per: what counts alike: every "token" of the batch, by its weight, or every
        "segment", be it long or short.
      max_segments: N, most segments of a row, for `per="segment"`; segments beyond it
        would not count, so take `data.Packed.max_segments`.
      chunk: see `losses.token_cross_entropy`.

    Returns:
      A `Trainable` whose metrics are `token_loss`, the mean over tokens, and `tokens`,
      how many count.

    Raises:
      ValueError: for options that do not go together, or as `adapters.lora.init`.

    With microbatches (`Trainer(accumulate=n)`) the loss is the mean of theirs, which
    weighs tokens by the microbatch that they are in.
    """
    if per not in PER:
        raise ValueError(f"causal_lm: per is {per!r}, wanted one of {PER}")
    if (per == "segment") != (max_segments is not None):
        raise ValueError(
            f"causal_lm: per={per!r} with max_segments={max_segments}; it goes with "
            "per='segment'"
        )
    compute = token_losses(module, lora, chunk=chunk)

    def loss_fn(params, batch, key):
        del key
        found, weights = compute(params, batch)
        mean = losses.weighted_mean(found, weights)
        metrics = {"token_loss": mean, "tokens": jnp.sum(weights)}
        if per == "token":
            return mean, metrics
        return _mean_of_segments(found, weights, batch, max_segments), metrics

    def init(key):
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), base)
        return start if lora is None else lora.start(key, start)

    leaves = models.sharding_rules(module)
    rules = _with_codes(leaves)
    if lora is None:
        return Trainable(init=init, loss_fn=loss_fn, tx=tx, rules=rules)
    return Trainable(
        init=init,
        loss_fn=loss_fn,
        tx=tx,
        rules=(*_of_factors(leaves), *rules),
        frozen=("^base/",),
    )


def _mean_of_segments(found, weights, batch, max_segments):
    segments = batch.get("segment_ids")
    if segments is None:
        segments = jnp.ones(found.shape, jnp.int32)
    means = losses.segment_means(found, weights, segments, max_segments)
    ones = (weights > 0).astype(jnp.float32)
    counts = losses.segment_means(ones, ones, segments, max_segments)
    return losses.weighted_mean(means, counts)


def _head(module, params):
    part = "embeddings" if module.tied else "head"
    return head_kernel({part: nf4.dequantize(params[part])}, module.tied)


def _of_factors(rules: Rules) -> Rules:
    """Factors [..., in, r] and [..., r, out] are split where their leaf is."""
    found = []
    for regex, spec in rules:
        if len(spec) > 1:
            *lead, rows, columns = spec
            leaf = regex.removesuffix("$")
            found.append((f"{leaf}/a$", PartitionSpec(*lead, rows, None)))
            found.append((f"{leaf}/b$", PartitionSpec(*lead, None, columns)))
    return (*found, ("^lora/", PartitionSpec()))


def _with_codes(rules: Rules) -> Rules:
    """Codes of a quantised leaf lie as the leaf would; its scales are everywhere."""
    leaves = tuple((regex.removesuffix("$"), spec) for regex, spec in rules)
    codes = tuple((f"{regex}/codes$", spec) for regex, spec in leaves)
    return (*rules, *codes, ("/(scales|steps|shift)$", PartitionSpec()))
