"""Language models that are steered while they run: a large one, small ones, experts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import decoding, models, train
from mtl_jax.data import mini_domains
from mtl_jax.train import causal_lm, optim

Fuse = Callable[[tuple[Any, ...]], Any]
ROLES = ("large", "small", "expert", "tuned", "fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steered:
    """A line of the table: which models answer, and how they do it together.

    Attributes:
      name: unique in the study.
      role: "large" and "small", the models as they are; "expert", the small model
        tuned on the domain; "tuned", the large one; "fused", large, small and experts.
      fuse: of "fused": logits of (large, small, *experts) to those of one model, see
        `decoding.fused`; defined once.
      every: experts of all domains instead of the one of the domain.
    """

    name: str
    role: str = "fused"
    fuse: Fuse | None = None
    every: bool = False

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(
                f"row {self.name!r}: role is {self.role!r}, wanted one of {ROLES}"
            )
        if (self.role == "fused") != (self.fuse is not None):
            raise ValueError(f"row {self.name!r}: fuse goes with role 'fused'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """A system that acts while models run.

    Attributes:
      rows: the lines of the comparison, in order.
      analyses: `analysis(study) -> None`, called in order after the table.
    """

    rows: tuple[Steered, ...]
    analyses: tuple[Callable[[Any], None], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Of a row on one domain.

    Attributes:
      value: of the metric of the ensemble.
      records: means over the tokens that count, of what the fusion recorded.
    """

    value: float
    records: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Ensemble(Protocol):
    """Models trained for one seed, and how rows are measured."""

    name: str
    domains: tuple[str, ...]
    metric: str
    higher_is_better: bool

    def measure(self, row: Steered) -> list[Score]:
        """One score per domain."""
        ...


class Strings:
    """Small and large decoders on strings with four questions.

    Both learn from rows whose tags mean nothing: they know all four domains, and not
    which one is asked for. Fine-tuning teaches that, beside what else is to be learnt
    from rows of the domain; half of its rows are those of before, with other tags.
    """

    metric = "exact match"
    higher_is_better = True
    domains = mini_domains.DOMAINS

    def __init__(
        self,
        *,
        seed: int,
        small: Mapping[str, int],
        large: Mapping[str, int],
        small_steps: int,
        large_steps: int,
        expert_steps: int,
        tuned_steps: int,
        longest: int,
        batch_size: int,
        rate: float,
        test: int,
        mesh: Any,
        progress: Any,
    ):
        self.seed, self.longest, self.batch_size = seed, longest, batch_size
        self.rate, self.test, self.mesh, self.progress = rate, test, mesh, progress
        self.facts = mini_domains.draw_facts(seed)
        self.rows = {
            domain: mini_domains.draw(
                np.random.default_rng([seed, number]),
                4096 if large_steps > 50 else 128,
                self.facts,
                longest=longest,
                domain=domain,
            )
            for number, domain in enumerate((None, *self.domains))
        }
        self.modules = {
            "small": _decoder(small, longest),
            "large": _decoder(large, longest),
        }
        self.params = {}
        for size, steps in (("small", small_steps), ("large", large_steps)):
            self.params[size] = self._fit(size, None, None, steps)
        for role, size, steps in (
            ("expert", "small", expert_steps),
            ("tuned", "large", tuned_steps),
        ):
            for domain in self.domains:
                start = self.params[size]
                self.params[role, domain] = self._fit(size, start, domain, steps)
        self.name = f"decoders of {small['depth']} and {large['depth']} layers"

    def _fit(self, size, start, domain, steps):
        module, rows = self.modules[size], self.rows[domain]
        if start is None:
            ids = jnp.zeros((1, 4), jnp.int32)
            start = jax.jit(module.init)(jax.random.key(self.seed), ids)["params"]

        def batch(step):
            rng = np.random.default_rng([self.seed, 9, step])
            index = rng.integers(0, len(rows.weights), self.batch_size)
            return {"input_ids": rows.input_ids[index], "weights": rows.weights[index]}

        peak = self.rate if domain is None else self.rate / 3
        trainer = _trainer(module, steps, peak, self.mesh)
        name = f"{size}, {domain or 'all domains'}"
        with self.progress.task(name, total=steps) as bar:
            found = trainer.fit(
                batch, steps=steps, params=start, seed=self.seed, progress=bar
            )
        return found.params

    def measure(self, row: Steered) -> list[Score]:
        """See `Ensemble`: whole answers, greedy."""
        return [self._measure(row, domain) for domain in self.domains]

    def _measure(self, row, domain):
        small, large = (
            decoding.from_decoder(self.modules[size]) for size in ("small", "large")
        )
        if row.role == "fused":
            names = self.domains if row.every else (domain,)
            experts = [self.params["expert", name] for name in names]
            model = decoding.fused((large, small, *[small] * len(experts)), row.fuse)
            params = (self.params["large"], self.params["small"], *experts)
        else:
            model = large if row.role in ("large", "tuned") else small
            alone = row.role in ("large", "small")
            params = self.params[row.role if alone else (row.role, domain)]
        rng = np.random.default_rng([self.seed, 8, self.domains.index(domain)])
        prompts = mini_domains.prompts(rng, self.test, domain, self.longest)
        found = decoding.generate(
            model,
            params,
            prompts,
            max_new_tokens=self.longest + 2,
            stop=mini_domains.END,
        )
        wanted = [mini_domains.answer(p[1:-1], domain, self.facts) for p in prompts]
        right = np.mean([a == b for a, b in zip(found.rows(), wanted, strict=True)])
        return Score(value=float(right), records=_means(found))


def _decoder(sizes, longest):
    return models.Decoder(
        vocab_size=mini_domains.VOCAB_SIZE,
        max_positions=32,
        num_heads=4,
        num_kv_heads=4,
        scan=True,
        mlp_dim=2 * sizes["width"],
        **sizes,
    )


_TRAINERS: dict[Any, train.Trainer] = {}


def _trainer(module, steps, peak, mesh):
    """One per module and length of training: seeds and domains share the step."""
    key = (module, steps, peak, mesh)
    if key not in _TRAINERS:
        ids = jnp.zeros((1, 4), jnp.int32)
        like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
        tx = optim.over_steps(steps, {"name": "adam", "peak": peak, "warmup": 0.05})
        trainable = causal_lm.causal_lm(module, like, tx=tx)
        _TRAINERS[key] = train.Trainer(trainable, mesh=mesh)
    return _TRAINERS[key]


def _means(found: decoding.Generation) -> dict[str, float]:
    """Of what was recorded, over all tokens that were generated."""
    if found.records is None:
        return {}
    steps = np.arange(found.tokens.shape[1])[:, None] < np.asarray(found.lengths)
    return {
        name: float(np.asarray(x, np.float64)[: len(steps)][steps].mean())
        for name, x in found.records.items()
        if x.ndim == 2
    }
