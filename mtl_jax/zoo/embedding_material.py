"""What families of embedding models start from: invented documents, or MiniLM."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import data, models, train
from mtl_jax.data import corpora, documents
from mtl_jax.models import heads
from mtl_jax.multitask import minilm
from mtl_jax.train import optim
from mtl_jax.zoo.embedding import Group, Material, Pairs, pair_loss


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
    encoder = models.Bert(
        vocab_size=documents.VOCAB_SIZE,
        width=width,
        depth=depth,
        num_heads=4,
        mlp_dim=2 * width,
        max_positions=documents.LENGTH,
    )

    features = _of_tokens(encoder)

    rng = np.random.default_rng([seed, 0])
    groups = (
        _retrieval(rng, sizes[0], probe, test),
        _similarity(rng, sizes[1], probe, test),
    )

    def batch(step):
        found = documents.crops(np.random.default_rng([seed, 1, step]), 64)
        return _pairs(found).take(np.arange(64))

    with progress.task("base", total=pretrain_steps) as bar:
        base = _pretrainer(encoder, pretrain_steps).fit(
            batch, steps=pretrain_steps, seed=seed, progress=bar
        )
    return Material(
        name=f"transformer of {depth} layers, {width} wide",
        base=base.params,
        features=features,
        groups=groups,
    )


@functools.cache
def _of_tokens(encoder):
    def features(params, texts):
        hidden = encoder.apply({"params": params}, texts["input_ids"])
        return heads.mean_pool(hidden, jnp.ones(hidden.shape[:2], bool))

    return features


@functools.cache
def _of_hidden(encoder):
    def features(params, texts):
        mask = texts["attention_mask"]
        hidden = encoder.apply({"params": params}, texts[minilm.HIDDEN], mask)
        return heads.mean_pool(hidden, mask)

    return features


@functools.cache
def _pretrainer(encoder, steps):
    loss = pair_loss(_of_tokens(encoder), 0.05)

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
    once and stay as they are.

    Args:
      seed: of the pairs of sentences.
      sizes: pairs to train retrieval, and similarity.
      probe: pairs of each kind for searches.
      test: queries, and pairs, of the tests.
      lower: layers that stay as they are, of 6.
      length: longest text in tokens.
      progress: a `report.Progress`.
    """
    encoder = models.Bert(depth=models.Bert().depth - lower, embed=False)
    tokenize = data.Tokenize(data.minilm_tokenizer(), length)

    features = _of_hidden(encoder)

    def read(texts):
        return minilm.run_lower({"all": tokenize.texts(texts)}, lower)["all"]

    def start(key):
        hidden = jnp.zeros((1, length, encoder.width))
        return encoder.init(key, hidden)["params"]

    like = jax.eval_shape(start, jax.random.key(0))
    base = minilm.loaded({"encoder": {"encoder": like}}, lower)["encoder"]["encoder"]
    with progress.task("texts through the lower layers"):
        groups = (
            _definitions(read, sizes[0], probe, test),
            _sentiment(read, np.random.default_rng([seed, 3]), sizes[1], probe, test),
        )
    return Material(
        name="MiniLM-L6",
        base=base,
        features=features,
        groups=groups,
    )


def _definitions(read, count, probe, test):
    """Names find definitions; each is relevant to one query."""
    train_rows = _named(corpora.texts("hpo_branch", "train"), count + probe)
    test_rows = _named(corpora.texts("hpo_branch", "test"), test)

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
