"""SmolLM2 steered by tuned copies of its first layers, measured on real texts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import data, losses, train
from mtl_jax.data import corpora
from mtl_jax.data.instruct import encode_text
from mtl_jax.data.packing import Packed
from mtl_jax.train import causal_lm, optim
from mtl_jax.zoo import language
from mtl_jax.zoo.serving import Score, Steered

GENERAL = ("sentiment_movie", "sentiment_news", "sentiment_product")
_CHUNK = 32  # Tokens that are fused at once: each has a row of the vocabulary.


class Texts:
    """The large model as it is; small ones are its first layers, tuned.

    What is left of the model after its first layers is tuned on sentences of reviews
    and editorials until it is a language model again, then on each domain. Embeddings
    stay those of the large model, so that all speak of the same tokens. Every token of
    the test texts is predicted from the true ones before it.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        *,
        seed: int,
        domains: tuple[str, ...],
        depth: int,
        documents: int,
        row_length: int,
        batch_size: int,
        small_steps: int,
        expert_steps: int,
        rate: float,
        test_rows: int,
        mesh: Any,
        progress: Any,
    ):
        self.domains, self.progress = tuple(domains), progress
        self.documents, self.row_length = documents, row_length
        self.batch_size, self.seed, self.rate, self.mesh = batch_size, seed, rate, mesh
        self.large = language.smollm2(progress=progress.log, scan=True)
        self.name = f"{self.large.name}, its first {depth} layers"
        self.small = self.large.module.clone(depth=depth)
        start = {
            **self.large.params,
            "layers": jax.tree.map(lambda x: x[:depth], self.large.params["layers"]),
        }
        texts = [t for name in GENERAL for t in self._texts(name, "train")]
        self.params = {"small": self._fit(start, texts, small_steps, "small")}
        for name in self.domains:
            self.params[name] = self._fit(
                self.params["small"], self._texts(name, "train"), expert_steps, name
            )
        with progress.task("logits of the test texts"):
            self.tests = [self._test(name, test_rows) for name in self.domains]

    def _texts(self, name, split):
        return corpora.texts(name, split, limit=self.documents)

    def _packed(self, texts, **options):
        end = self.large.special["eos"]
        rows = [encode_text(text, self.large.tokenizer, end=end) for text in texts]
        return Packed(rows, self.row_length, **options)

    def _fit(self, start, texts, steps, name):
        tx = optim.over_steps(
            steps, {"name": "adam", "peak": self.rate, "warmup": 0.1, "clip_norm": 1.0}
        )
        trainable = causal_lm.causal_lm(self.small, start, tx=tx)
        trainable = dataclasses.replace(trainable, frozen=("^embeddings/",))
        batches = data.pipeline(
            self._packed(texts), batch_size=self.batch_size, seed=self.seed
        )
        with self.progress.task(f"{name}, {steps} steps", total=steps) as bar:
            found = train.Trainer(trainable, mesh=self.mesh).fit(
                batches.__getitem__,
                steps=steps,
                seed=self.seed,
                params=start,
                progress=bar,
            )
        return found.params

    def _test(self, name, count):
        """Labels [N], and logits [N, V] of every model: tokens that count."""
        packed = self._packed(self._texts(name, "test"), method="next_fit")
        rows = data.to_arrays(packed, limit=count)
        ids, segments = rows["input_ids"], rows["segment_ids"]
        labels, weights = losses.next_tokens(jnp.asarray(ids), jnp.asarray(segments))
        counts = np.asarray(weights) > 0
        models = {"large": (self.large.module, self.large.params)}
        models |= {name: (self.small, params) for name, params in self.params.items()}
        logits = {}
        for key, (module, params) in models.items():
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
