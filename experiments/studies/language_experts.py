"""A language model, an adapter for each of several domains, and texts to judge by."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mtl_jax import configs, data, report, train, tree
from mtl_jax.data.packing import Packed
from mtl_jax.run import language
from mtl_jax.train import causal_lm

DOMAINS = ("hpo_branch", "esco_kind", "icd10_chapter", "sentiment_tweets")
CONFIG = pathlib.Path(__file__).parents[1] / "configs/lm_demo.py"
# Rows of each domain, and tokens in a row.
VALIDATION, TEST, TOKENS = 1, 4, 128


def settings(domains: Sequence[str] = DOMAINS, seeds: Sequence[int] = (0, 1)) -> Any:
    """The language demo with these domains and seeds."""
    config = configs.load_config(f"{CONFIG}:demo")
    config.domains, config.seeds = tuple(domains), tuple(seeds)
    return config


class Experts:
    """The base, adapters of every domain and seed, and texts to measure models on.

    Attributes:
      base: all parameters.
      adapted: those leaves of it that adapters change.
    """

    def __init__(self, config: ConfigDict, workdir: Any, progress: report.Progress):
        document = report.Report("Adapters to merge", config=config)
        study = language.LanguageStudy(config, document, progress, train.make_mesh())
        self.study, self.names, self.lora = study, study.domains, study.lora
        self.model, self.base = study.model, study.model.params
        self.folder = epath.Path(workdir) / "adapters"
        compute = causal_lm.token_losses(study.model.module)
        self._sums = jax.jit(lambda p, b: [jnp.sum(x, -1) for x in compute(p, b)])
        own = [self.rows(name, "validation", VALIDATION) for name in self.names]
        self.validation = {k: np.concatenate([x[k] for x in own]) for k in own[0]}
        self.test = [self.rows(name, "test", TEST) for name in self.names]
        like = study.start(0)["lora"]
        self.adapted = adapters_of(self.base, like)

    def rows(self, name: str, split: str, count: int) -> dict[str, np.ndarray]:
        """Packed rows of texts in the order of the documents."""
        texts = self.study._documents(name, split, 200)
        packed = Packed(texts, TOKENS, method="next_fit")
        if len(packed) < count:
            raise SystemExit(f"{name}: {len(packed)} {split} rows, wanted {count}")
        return data.to_arrays(packed, limit=count)

    def adapters(self, seed: int) -> list[Any]:
        """One of every domain, trained or read back."""
        return [self.study.fit(name, seed, self.folder)[0] for name in self.names]

    def moved(self, delta: Any, scale: float = 1.0) -> Any:
        """All parameters, with a difference of the adapted ones."""
        return put(self.base, tree.add_scaled(self.adapted, delta, scale))

    def losses(self, params: Any, batch: Any) -> np.ndarray:
        """Mean loss of a token [rows]."""
        total, count = jax.device_get(self._sums(params, batch))
        return total / count

    def validate(self, params: Any) -> np.ndarray:
        """Loss of each domain's validation row [D]."""
        return self.losses(params, self.validation)

    def measure(self, params: Any, domain: int) -> float:
        """Mean loss of a token of a domain's test rows."""
        total, count = jax.device_get(self._sums(params, self.test[domain]))
        return float(total.sum() / count.sum())


def adapters_of(params: Any, like: Any) -> Any:
    """The leaves of nested dicts that an adapter has pairs for."""
    if set(like) == {"a", "b"}:
        return params
    return {key: adapters_of(params[key], value) for key, value in like.items()}


def product(lora: Any) -> Any:
    """What an adapter of scale 1 adds."""
    if set(lora) == {"a", "b"}:
        return jnp.matmul(lora["a"], lora["b"], precision="highest")
    return {key: product(value) for key, value in lora.items()}


def put(params: Any, part: Any) -> Any:
    """Nested dicts with some of their leaves replaced."""
    if not isinstance(part, dict):
        return part
    return {**params, **{key: put(params[key], part[key]) for key in part}}
