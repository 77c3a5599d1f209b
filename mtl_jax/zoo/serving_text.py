"""SmolLM2 steered by tuned copies of a few of its layers, measured on real texts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import data, io, losses, models, train
from mtl_jax.data import corpora
from mtl_jax.data.instruct import encode_text
from mtl_jax.data.packing import Packed
from mtl_jax.train import causal_lm, optim
from mtl_jax.zoo import keep, language
from mtl_jax.zoo.serving import Score, Steered

GENERAL = ("sentiment_movie", "sentiment_news", "sentiment_product")
_FORMAT = 1  # Part of every address: raise it when training changes its meaning.
_CHUNK = 32  # Tokens that are fused at once: each has a row of the vocabulary.


def distilled(
    large: models.Decoder, small: models.Decoder, tx: optax.GradientTransformation
) -> train.Trainable:
    """A small decoder that learns to predict what a large one does.

    KL(large || small) of the next token, mean over the places of packed rows.

    Args:
      large: its parameters are "large", and frozen.
      small: its parameters are "small", without embeddings: those are the large one's.
      tx: optimizer.
    """

    def init(key):
        ids = jnp.zeros((1, 1), jnp.int32)
        found = {
            name: module.init(key, ids)["params"]
            for name, module in (("large", large), ("small", small))
        }
        return {**found, "small": _own(found["small"])}

    def loss_fn(params, batch, key):
        del key
        inputs = [batch[k] for k in ("input_ids", "segment_ids", "positions")]
        wanted = large.apply({"params": params["large"]}, *inputs)
        whole = {**params["small"], "embeddings": params["large"]["embeddings"]}
        found = small.apply({"params": whole}, *inputs)
        apart = losses.kl_divergence(jax.lax.stop_gradient(wanted), found)
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        return losses.weighted_mean(weights * apart, weights), {}

    return train.Trainable(init=init, loss_fn=loss_fn, tx=tx, frozen=("^large/",))


def _own(params):
    """All leaves but the embeddings."""
    return {name: x for name, x in params.items() if name != "embeddings"}


class Texts:
    """The large model as it is; small ones are some of its layers, tuned.

    The small model learns from what the large one predicts, on sentences of reviews and
    editorials and on texts of all domains; it never sees what comes next in them. An
    expert goes on from there with the texts of its domain. Embeddings stay those of the
    large model, so that all speak of the same tokens. Every token of the test texts is
    predicted from the true ones before it. What was trained is kept in the package
    cache.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        *,
        seed: int,
        domains: tuple[str, ...],
        layers: tuple[int, ...],
        documents: int,
        row_length: int,
        batch_size: int,
        small_steps: int,
        expert_steps: int,
        rate: float,
        expert_rate: float,
        test_rows: int,
        mesh: Any,
        progress: Any,
    ):
        self.domains, self.progress = tuple(domains), progress
        self.documents, self.row_length = documents, row_length
        self.batch_size, self.seed, self.mesh = batch_size, seed, mesh
        self.large = language.smollm2(progress=progress.log, scan=True)
        self.name = f"{self.large.name}, {len(layers)} of its layers"
        self.small = self.large.module.clone(depth=len(layers))
        self._large = io.digest(self.large.params)
        picked = np.array(layers)
        start = jax.tree.map(lambda x: x[picked], self.large.params["layers"])
        start = {**_own(self.large.params), "layers": start}
        texts = [t for name in (*GENERAL, *domains) for t in self._texts(name, "train")]
        small = self._fit("small", start, texts, small_steps, rate, distil=True)
        found = {
            name: self._fit(
                name, small, self._texts(name, "train"), expert_steps, expert_rate
            )
            for name in self.domains
        }
        self.params = {
            name: self._whole(own) for name, own in {"small": small, **found}.items()
        }
        with progress.task("logits of the test texts"):
            self.tests = [self._test(name, test_rows) for name in self.domains]

    def _texts(self, name, split):
        return corpora.texts(name, split, limit=self.documents)

    def _packed(self, texts, **options):
        end = self.large.special["eos"]
        rows = [encode_text(text, self.large.tokenizer, end=end) for text in texts]
        return Packed(rows, self.row_length, **options)

    def _whole(self, own):
        """A small model, from the leaves that are its own."""
        return {"embeddings": self.large.params["embeddings"], **own}

    def _fit(self, name, start, texts, steps, rate, *, distil=False):
        """Leaves of a small model but its embeddings, from others of the kind."""
        packed = self._packed(texts)
        question = {
            "format": _FORMAT,
            "large": self._large,
            "start": io.digest(start),
            "rows": io.digest(data.to_arrays(packed)),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "steps": steps,
            "rate": rate,
            "distil": distil,
        }
        tx = optim.over_steps(
            steps, {"name": "adam", "peak": rate, "warmup": 0.1, "clip_norm": 1.0}
        )

        def fit(workdir):
            del workdir
            if distil:
                trainable = distilled(self.large.module, self.small, tx)
                params = {"large": self.large.params, "small": start}
            else:
                params = self._whole(start)
                trainable = causal_lm.causal_lm(self.small, params, tx=tx)
                trainable = dataclasses.replace(trainable, frozen=("^embeddings/",))
            batches = data.pipeline(packed, batch_size=self.batch_size, seed=self.seed)
            with self.progress.task(f"{name}, {steps} steps", total=steps) as bar:
                found = train.Trainer(trainable, mesh=self.mesh).fit(
                    batches.__getitem__,
                    steps=steps,
                    seed=self.seed,
                    params=params,
                    progress=bar,
                )
            own = found.params["small"] if distil else _own(found.params)
            return own, {"loss": found.history[-1]["loss"]}

        return keep.kept(f"steered-{keep.address(question)}", start, fit)[0]

    def _test(self, name, count):
        """Labels [N], and logits [N, V] of every model: tokens that count."""
        packed = self._packed(self._texts(name, "test"), method="next_fit")
        rows = data.to_arrays(packed, limit=count)
        ids, segments = rows["input_ids"], rows["segment_ids"]
        labels, weights = losses.next_tokens(jnp.asarray(ids), jnp.asarray(segments))
        counts = np.asarray(weights) > 0
        every = {"large": (self.large.module, self.large.params)}
        every |= {name: (self.small, params) for name, params in self.params.items()}
        logits = {}
        for key, (module, params) in every.items():
            apply = jax.jit(module.apply)
            parts = []
            for i in range(0, len(ids), 2):
                part = slice(i, i + 2)
                found = apply(
                    {"params": params},
                    ids[part],
                    segments[part],
                    rows["positions"][part],
                )
                parts.append(np.asarray(found, np.float32)[counts[part]])
            logits[key] = np.concatenate(parts)
        return np.asarray(labels)[counts], logits

    def measure(self, row: Steered) -> list[Score]:
        """See `zoo.serving.Ensemble`: perplexity of the test texts."""
        if row.role == "tuned":
            raise ValueError(f"row {row.name!r}: the large model is not tuned here")
        with self.progress.task(row.name):
            return [
                self._measure(row, domain, *test)
                for domain, test in zip(self.domains, self.tests, strict=True)
            ]

    def _measure(self, row, domain, labels, logits):
        if row.role == "fused":
            names = self.domains if row.every else (domain,)
            stacked = [logits[name] for name in ("large", "small", *names)]
        else:
            stacked = [logits[domain if row.role == "expert" else row.role]]

        def chunk(parts, labels):
            found = row.fuse(parts) if row.fuse else parts[0]
            out, record = found if isinstance(found, tuple) else (found, {})
            own = -losses.softmax_cross_entropy(out, labels)
            right = jnp.argmax(out, -1).astype(labels.dtype) == labels
            return {"logprob": own, "next token right": right, **record}

        run, found = jax.jit(chunk), []
        for start in range(0, len(labels), _CHUNK):
            index = np.arange(start, start + _CHUNK) % len(labels)
            part = run(tuple(x[index] for x in stacked), labels[index])
            found.append(jax.device_get(part))
        means = {
            name: float(np.concatenate([f[name] for f in found])[: len(labels)].mean())
            for name in found[0]
        }
        return Score(value=float(np.exp(-means.pop("logprob"))), records=means)
