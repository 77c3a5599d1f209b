"""What families of embedding models start from: invented documents, or MiniLM."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import data, io, models, train
from mtl_jax.data import corpora, documents
from mtl_jax.models import heads
from mtl_jax.multitask import minilm
from mtl_jax.train import optim
from mtl_jax.zoo import keep
from mtl_jax.zoo.embedding import Group, Material, Pairs, pair_loss

_FORMAT = 1  # Part of every address: raise it when training changes its meaning.


def invented(
    *,
    seed: int = 0,
    sizes: tuple[int, int] = (4800, 480),
    probe: int = 192,
    test: int = 300,
    pretrain_steps: int = 150,
    width: int = 64,
    depth: int = 2,
    progress: Any,
) -> Material:
    """Documents with topic and meaning, and a small encoder that knows both.

    Args:
      seed: everything follows from it.
      sizes: pairs to train retrieval, and similarity.
      probe: pairs of each kind for searches.
      test: queries, and pairs, of the tests.
      pretrain_steps: of the base, on two documents of one topic and meaning.
      width: of the encoder.
      depth: of the encoder.
      progress: a `report.Progress`.
    """
    outline = _invented_outline(width=width, depth=depth)
    rng = np.random.default_rng([seed, 0])
    groups = (
        _retrieval(rng, sizes[0], probe, test),
        _similarity(rng, sizes[1], probe, test),
    )

    def batch(step):
        found = documents.crops(np.random.default_rng([seed, 1, step]), 64)
        return _pairs(found).take(np.arange(64))

    def fit(workdir):
        del workdir
        with progress.task("base", total=pretrain_steps) as bar:
            found = _pretrainer(outline.encoder, pretrain_steps).fit(
                batch, steps=pretrain_steps, seed=seed, progress=bar
            )
        return found.params, {}

    name = f"transformer of {depth} layers, {width} wide"
    question = {"format": _FORMAT, "name": name, "steps": pretrain_steps, "seed": seed}
    stem = f"invented-{keep.address({**question, 'first': io.digest(batch(0))})}"
    base, _ = keep.kept(stem, outline.params, fit)
    return outline.material(name, base, groups)


@dataclasses.dataclass(frozen=True)
class Outline:
    """An encoder of texts, without weights.

    Attributes:
      encoder: module; it reads columns of `texts`.
      texts: column -> shape and dtype of one text.
    """

    encoder: models.Bert
    texts: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def features(self) -> Any:
        """`features(params, texts) -> [B, D]`; one function per encoder."""
        return _features(self.encoder)

    @property
    def params(self) -> Any:
        """Shapes of the parameters."""
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch(1))
        start = jax.random.key(0)
        return jax.eval_shape(
            lambda key: self.encoder.init(key, _inputs(rows))["params"], start
        )

    @property
    def rules(self) -> Any:
        """Where parameters lie on a mesh."""
        return models.sharding_rules(self.encoder)

    def material(self, name: str, base: Any, groups: tuple[Group, ...]) -> Material:
        """With weights and pairs."""
        return Material(
            name=name,
            base=base,
            features=self.features,
            groups=groups,
            rules=self.rules,
        )

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of so many texts."""
        return {
            name: jax.ShapeDtypeStruct((size, *shape), dtype)
            for name, (shape, dtype) in self.texts.items()
        }


def _inputs(texts):
    return texts[minilm.HIDDEN] if minilm.HIDDEN in texts else texts["input_ids"]


@functools.cache
def _features(encoder):
    def features(params, texts):
        mask = texts.get("attention_mask")
        hidden = encoder.apply({"params": params}, _inputs(texts), mask)
        if mask is None:
            mask = jnp.ones(hidden.shape[:2], bool)
        return heads.mean_pool(hidden, mask)

    return features


def _invented_outline(*, width: int = 64, depth: int = 2, **rest: Any) -> Outline:
    del rest
    encoder = models.Bert(
        vocab_size=documents.VOCAB_SIZE,
        width=width,
        depth=depth,
        num_heads=4,
        mlp_dim=2 * width,
        max_positions=documents.LENGTH,
    )
    return Outline(encoder, {"input_ids": ((documents.LENGTH,), "int32")})


def _minilm_outline(*, lower: int = 4, length: int = 24, **rest: Any) -> Outline:
    """MiniLM without its lowest layers; with all of them it reads tokens."""
    del rest
    mask = {"attention_mask": ((length,), "int32")}
    if not lower:
        return Outline(models.Bert(), {"input_ids": ((length,), "int32"), **mask})
    encoder = models.Bert(depth=models.Bert().depth - lower, embed=False)
    return Outline(
        encoder, {minilm.HIDDEN: ((length, encoder.width), "float32"), **mask}
    )


@functools.cache
def _pretrainer(encoder, steps):
    loss = pair_loss(_features(encoder), 0.05)

    def init(key):
        return encoder.init(key, jnp.zeros((1, documents.LENGTH), jnp.int32))["params"]

    trainable = train.Trainable(
        init=init,
        loss_fn=lambda params, batch, key: (loss(params, batch), {}),
        tx=optim.over_steps(steps, {"name": "adam", "peak": 2e-3}),
    )
    return train.Trainer(trainable, mesh=train.make_mesh(devices=jax.devices()[:1]))


def _columns(ids):
    return {"input_ids": ids}


def _pairs(found: documents.Pairs) -> Pairs:
    return Pairs(
        first=_columns(found.first), second=_columns(found.second), label=found.label
    )


def _retrieval(rng, count, probe, test):
    """Queries among documents of all topics."""
    found = documents.retrieval(rng, test)
    relevant = found.label[:, None] == found.label[None]
    return Group(
        name="retrieval",
        train=_pairs(documents.retrieval(rng, count)),
        probe=_pairs(documents.retrieval(rng, probe)),
        first=_columns(found.first),
        second=_columns(found.second),
        judged=relevant,
    )


def _similarity(rng, count, probe, test):
    found, alike = documents.judged(rng, test)
    return Group(
        name="similarity",
        train=_pairs(documents.similarity(rng, count)),
        probe=_pairs(documents.similarity(rng, probe)),
        first=_columns(found.first),
        second=_columns(found.second),
        judged=alike,
    )


def minilm_texts(
    *,
    seed: int = 0,
    sizes: tuple[int, int] = (960, 96),
    probe: int = 96,
    test: int = 160,
    lower: int = 4,
    length: int = 24,
    progress: Any,
) -> Material:
    """MiniLM on names and definitions of phenotypes, and on sentences by sentiment.

    Retrieval finds the definition of a phenotype (HPO) by its name. Two sentences of
    product reviews are alike if both praise or both blame. The lower layers are run
    once and stay as they are, if any do.

    Args:
      seed: of the pairs of sentences.
      sizes: pairs to train retrieval, and similarity.
      probe: pairs of each kind for searches.
      test: queries, and pairs, of the tests.
      lower: layers that stay as they are, of 6.
      length: longest text in tokens.
      progress: a `report.Progress`.
    """
    outline = _minilm_outline(lower=lower, length=length)
    tokenize = data.Tokenize(data.minilm_tokenizer(), length)

    def read(texts):
        rows = tokenize.texts(texts)
        return minilm.run_lower({"all": rows}, lower)["all"] if lower else rows

    like = {"encoder": {"encoder": outline.params}}
    base = minilm.loaded(like, lower)["encoder"]["encoder"]
    with progress.task("texts through the lower layers"):
        groups = (
            _definitions(read, sizes[0], probe, test),
            _sentiment(read, np.random.default_rng([seed, 3]), sizes[1], probe, test),
        )
    return outline.material("MiniLM-L6", base, groups)


def _definitions(read, count, probe, test):
    """Names find definitions; each is relevant to one query."""
    train_rows = _named(corpora.texts("hpo_branch", "train"), count + probe)
    test_rows = _named(corpora.texts("hpo_branch", "test"), test)
    if len(train_rows) < count + probe or len(test_rows) < test:
        raise ValueError(
            f"minilm: wanted {count + probe} and {test} pairs of a name and its "
            f"definition, there are {len(train_rows)} and {len(test_rows)}"
        )

    def pairs(rows):
        first, second = (read([row[i] for row in rows]) for i in (0, 1))
        label = np.arange(len(rows), dtype=np.int32)
        return Pairs(first=first, second=second, label=label)

    own = pairs(test_rows)
    return Group(
        name="definitions",
        train=pairs(train_rows[:count]),
        probe=pairs(train_rows[count:]),
        first=own.first,
        second=own.second,
        judged=np.eye(len(test_rows), dtype=bool),
    )


def _named(texts, count):
    """(name, definition) of the texts that have one."""
    rows = [text.split(". ", 1) for text in texts]
    return [tuple(row) for row in rows if len(row) == 2][:count]


def _sentiment(read, rng, count, probe, test):
    """Pairs of one sentiment; the test has as many of two."""
    rows = {split: _rows(split) for split in ("train", "validation", "test")}

    def pairs(split, count):
        texts, label = rows[split]
        first = rng.choice(len(texts), count)
        second = np.array(
            [rng.choice(np.flatnonzero(label == label[i])) for i in first]
        )
        return Pairs(
            first=read([texts[i] for i in first]),
            second=read([texts[i] for i in second]),
            label=label[first],
        )

    texts, label = rows["test"]
    first, second = (rng.choice(len(texts), test) for _ in range(2))
    return Group(
        name="sentiment",
        train=pairs("train", count),
        probe=pairs("validation", probe),
        first=read([texts[i] for i in first]),
        second=read([texts[i] for i in second]),
        judged=(label[first] == label[second]).astype(np.float32),
    )


def _rows(split):
    source = data.load_source("sentiment_product", split)
    rows = [source[i] for i in range(len(source))]
    label = np.array([row["label"] for row in rows], np.int32)
    return corpora.texts("sentiment_product", split), label


MATERIALS = {"invented": invented, "minilm": minilm_texts}
OUTLINES = {"invented": _invented_outline, "minilm": _minilm_outline}
