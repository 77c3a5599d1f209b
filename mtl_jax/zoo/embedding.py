"""Embedding models of one base, trained on groups of pairs apart, together, merged."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import io, losses, metrics, train, tree
from mtl_jax.models import heads
from mtl_jax.train import optim
from mtl_jax.transforms import merging
from mtl_jax.zoo import keep

_FORMAT = 1  # Part of every address: raise it when training changes its meaning.
_WHOLE = ((".*", jax.sharding.PartitionSpec()),)
Texts = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of texts that belong together.

    Attributes:
      first: columns [N, ...] as the encoder reads them.
      second: the same of the other texts.
      label: [N] int32; pairs with the same label are not each other's negatives.
    """

    first: Texts
    second: Texts
    label: np.ndarray

    def take(self, index: np.ndarray) -> dict[str, Any]:
        """A batch of pairs by number, from the front again beyond the end."""
        index = np.asarray(index) % len(self.label)
        return {
            "first": {name: x[index] for name, x in self.first.items()},
            "second": {name: x[index] for name, x in self.second.items()},
            "label": self.label[index],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One kind of data: what an expert learns from, and how it is measured.

    Attributes:
      name: unique.
      train: pairs for the expert.
      probe: pairs that nobody trains on, for searches.
      first: texts of the test, queries [Q, ...] or the first of each pair.
      second: documents [M, ...], or the second of each pair.
      judged: bool [Q, M], relevant documents, measured by nDCG@10; or float [Q], how
        alike the texts of a pair are, measured by Spearman's correlation.
    """

    name: str
    train: Pairs
    probe: Pairs
    first: Texts
    second: Texts
    judged: np.ndarray

    @property
    def metric(self) -> str:
        """What the test measures."""
        return "nDCG@10" if self.judged.ndim == 2 else "Spearman"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """A base model and groups of pairs.

    Attributes:
      name: of the model, in reports.
      base: parameters.
      features: `features(params, texts) -> [B, D]`.
      groups: two or more.
      rules: where parameters lie on a mesh, see `train.Trainable`.
    """

    name: str
    base: Any
    features: Callable[[Any, Texts], Any]
    groups: tuple[Group, ...]
    rules: Any = _WHOLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How everything of a family is trained.

    Attributes:
      batch_size: pairs of a batch, all of one group: what is relevant differs.
      temperature: of the contrastive loss.
      rate: of Adam, constant: the way grows with the data.
      seed: of the order of pairs.
    """

    batch_size: int
    temperature: float
    rate: float
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a merge ended.

    Attributes:
      kappa: [T], coefficients of the task vectors.
      details: numbers and lists for analyses.
    """

    kappa: Any
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """A line of the table: a merge of the experts.

    Attributes:
      name: unique in the study.
      place: `place(family) -> Place`; it may look at the probe, not at the test.
    """

    name: str
    place: Callable[["Family"], Place]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merges:
    """A system that merges embedding models.

    Attributes:
      rows: the lines of the comparison, in order.
      analyses: `analysis(study) -> None`, called in order after the table.
    """

    rows: tuple[Merge, ...]
    analyses: tuple[Callable[[Any], None], ...] = ()


@functools.cache
def pair_loss(
    features: Callable[[Any, Texts], Any], temperature: float
) -> Callable[[Any, Any], Any]:
    """Mean InfoNCE of a batch of pairs, `loss(params, batch) -> scalar`."""

    def loss(params, batch):
        first, second = (features(params, batch[k]) for k in ("first", "second"))
        scores = heads.prototype_logits(
            first, heads.l2_normalize(second), 1 / temperature
        )
        label = batch["label"]
        apart = label[:, None] != label[None]
        rows = jnp.arange(len(label), dtype=jnp.int32)
        return jnp.mean(losses.infonce(scores, rows, active=apart))

    return loss


class Family:
    """A base, one expert per group, and models trained on all groups.

    Attributes:
      material: base and data.
      settings: of the trainings.
      experts: parameters, one tree per group.
      norms: per group [K, 2], steps and length of the task vector after them.
      taus: task vectors.
      gram: [T, T], their inner products.
      loss_fn: of one batch of pairs.
    """

    def __init__(self, material: Material, settings: Settings, mesh: Any, bar: Any):
        self.material, self.settings = material, settings
        self.loss_fn = pair_loss(material.features, settings.temperature)
        self._bar = bar
        self._question = {
            "format": _FORMAT,
            "model": material.name,
            "base": io.digest(material.base),
            "pairs": [io.digest(vars(group.train)) for group in material.groups],
            "settings": dataclasses.asdict(settings),
        }
        self._features = jax.jit(material.features)
        self._trainer = _trainer(self.loss_fn, material, settings.rate, mesh)
        self._loss = jax.jit(self.loss_fn)
        self.experts, self.norms = [], []
        for number in range(len(material.groups)):
            plan = [number] * self.steps(number)
            params, norms = self.fit(plan, f"expert: {material.groups[number].name}")
            self.experts.append(params)
            self.norms.append(norms)
        self.taus = merging.task_vectors(material.base, self.experts)
        self.gram = np.asarray(tree.gram(self.taus), np.float64)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Of the material."""
        return self.material.groups

    def steps(self, group: int) -> int:
        """Batches of a group, all pairs once."""
        count = len(self.groups[group].train.label)
        return max(1, count // self.settings.batch_size)

    def fit(self, plan: Sequence[int], name: str) -> tuple[Any, np.ndarray]:
        """Trains from the base; step i takes the next batch of group `plan[i]`.

        What was trained before is read from the package cache.
        """
        plan = [int(group) for group in plan]
        address = keep.address({**self._question, "plan": plan})

        def train_it(workdir):
            del workdir
            return self._fit(plan, name)

        stem = f"embedding-{address}"
        params, record = keep.kept(stem, self.material.base, train_it)
        return params, np.array(record["norms"])

    def _fit(self, plan, name):
        """Parameters, and a record of the lengths of the way."""
        size = self.settings.batch_size
        rng = np.random.default_rng(self.settings.seed)
        orders = [rng.permutation(len(group.train.label)) for group in self.groups]
        used, batches = [0] * len(self.groups), []
        for group in plan:
            start = used[group] * size
            index = np.arange(start, start + size) % len(orders[group])
            batches.append((group, orders[group][index]))
            used[group] += 1

        def batch(step):
            group, index = batches[step]
            return self.groups[group].train.take(index)

        base = self.material.base

        def moved(params):
            gap = jax.tree.map(lambda x, b: (x - b)[None], params, base)
            return {"norm": float(jnp.sqrt(tree.gram(gap)[0, 0]))}

        with self._bar.task(name, total=len(plan)) as bar:
            found = self._trainer.fit(
                batch,
                steps=len(plan),
                params=base,
                seed=self.settings.seed,
                progress=bar,
                eval_fn=moved,
                eval_every=max(1, len(plan) // 8),
            )
        norms = [
            (record["step"], record["eval/norm"])
            for record in found.history
            if "eval/norm" in record
        ]
        return found.params, {"norms": norms}

    def joint(self) -> Any:
        """All pairs of all groups once, batches shuffled: the large group decides."""
        plan = np.repeat(
            np.arange(len(self.groups)),
            [self.steps(g) for g in range(len(self.groups))],
        )
        rng = np.random.default_rng([self.settings.seed, 1])
        return self.fit(rng.permutation(plan).tolist(), "joint training")[0]

    def balanced(self) -> Any:
        """As many steps as `joint`, groups in turn; small groups come again."""
        total = sum(self.steps(g) for g in range(len(self.groups)))
        plan = [step % len(self.groups) for step in range(total)]
        return self.fit(plan, "balanced training")[0]

    def cosines(self, params: Any) -> np.ndarray:
        """[T], between the way to a model and the task vectors."""
        gap = merging.task_vectors(self.material.base, [params])
        both = jax.tree.map(lambda t, g: jnp.concatenate([g, t]), self.taus, gap)
        gram = np.asarray(tree.gram(both), np.float64)
        norms = np.sqrt(np.diag(gram))
        return gram[0, 1:] / (norms[0] * norms[1:])

    def probe_batches(self, steps: int, *, seed: int = 0) -> Any:
        """Leaves [S, T, B, ...]: batches of every group's probe, at random."""
        rng = np.random.default_rng([self.settings.seed, 2, seed])
        size = self.settings.batch_size

        def one(group):
            count = len(group.probe.label)
            return group.probe.take(rng.choice(count, size, replace=count < size))

        every = [[one(group) for group in self.groups] for _ in range(steps)]
        rows = [jax.tree.map(lambda *x: np.stack(x), *step) for step in every]
        return jax.tree.map(lambda *x: np.stack(x), *rows)

    def probe_loss(self, params: Any, batches: Any) -> float:
        """Mean loss over probe batches and groups."""
        shape = jax.tree.leaves(batches)[0].shape[:2]
        found = [
            self._loss(params, jax.tree.map(lambda x, i=i: x[i], batches))
            for i in np.ndindex(shape)
        ]
        return float(np.mean(found))

    def merged(self, kappa: Any) -> Any:
        """The base moved by coefficients of the task vectors."""
        return merging.compose(
            self.material.base, self.taus, jnp.asarray(kappa, jnp.float32)
        )

    def measure(self, params: Any) -> np.ndarray:
        """[T] test metric of every group."""
        return np.array([self._measure(params, group) for group in self.groups])

    def _measure(self, params, group):
        first, second = (self._embed(params, x) for x in (group.first, group.second))
        if group.judged.ndim == 1:
            alike = np.sum(first * second, 1)
            return float(metrics.spearman(alike, group.judged))
        scores = jnp.asarray(first @ second.T, jnp.float32)
        return float(jnp.mean(metrics.ndcg(scores, jnp.asarray(group.judged), 10)))

    def _embed(self, params, texts):
        """Unit vectors, in batches of one shape."""
        count, size = len(next(iter(texts.values()))), 2 * self.settings.batch_size
        found = []
        for start in range(0, count, size):
            index = np.arange(start, start + size) % count
            part = self._features(params, {name: x[index] for name, x in texts.items()})
            found.append(np.asarray(heads.l2_normalize(part), np.float64))
        return np.concatenate(found)[:count]


def contrastive(
    loss_fn: Callable[[Any, Any], Any], like: Any, rate: float, rules: Any
) -> train.Trainable:
    """How every model of a family is trained.

    Args:
      loss_fn: see `pair_loss`.
      like: parameters or their shapes; `init` makes zeros like them.
      rate: of Adam.
      rules: where leaves lie on a mesh, see `train.Trainable`.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)

    def init(key):
        del key
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return train.Trainable(
        init=init,
        loss_fn=lambda params, batch, key: (loss_fn(params, batch), {}),
        tx=optim.optimizer("adam", rate),
        rules=rules,
    )


_TRAINERS: dict[Any, train.Trainer] = {}


def _trainer(loss_fn, material, rate, mesh):
    """One per loss and rate: all models of all seeds share the step."""
    key = (loss_fn, rate, mesh)
    if key not in _TRAINERS:
        trainable = contrastive(loss_fn, material.base, rate, material.rules)
        _TRAINERS[key] = train.Trainer(trainable, mesh=mesh)
    return _TRAINERS[key]
