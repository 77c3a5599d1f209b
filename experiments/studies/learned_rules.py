"""Merge rules that look at data, as rows of a study of experts.

None sees a label. Fisher, RegMean and Surgery read training rows; the rules that
minimise entropy read the test rows, as their papers do, and say so in their names.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax import losses, merging, models, tree, zoo
from mtl_jax.train import state as train_state

ROWS, BATCH, STEPS = 64, 16, 100
START = 0.3


def _expert(base: Any, taus: Any, task: int) -> Any:
    return tree.add_scaled(base, zoo.task_delta(taus, task))


def _some(material: zoo.Material, task: int, count: int) -> Any:
    """The first training rows of a task, which come in random order."""
    rows = material.inputs("train", task)
    return jax.tree.map(lambda x: jnp.asarray(x[:count]), dict(rows))


def fisher(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Diagonals from labels that each expert draws for itself."""
    del chosen

    def logits(params, inputs):
        return material.logits(params["model"], inputs, params["head"], material.args)

    found = []
    for task in range(material.count):
        head = jax.tree.map(lambda x, t=task: x[t], material.heads())
        diagonals = merging.fisher_diagonal(
            logits,  # One function for all tasks: it compiles once.
            {"model": _expert(material.zoo.base, taus, task), "head": head},
            (_some(material, task, ROWS),),
            labels="sampled",
            key=jax.random.key(task),
        )
        found.append(diagonals["model"])
    return zoo.Fit(delta=merging.fisher(taus, tree.stack(found)))


def regmean(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Grams of what every Dense layer of each expert sees; padding does not count."""
    del chosen

    def mask(batch):
        return batch["attention_mask"]

    opened, trained = material.zoo, set(tree.paths(taus))
    rows = [_some(material, task, ROWS) for task in range(material.count)]
    masked = "attention_mask" in rows[0]
    capture = models.input_grams(
        opened.encoder.features, mask_fn=mask if masked else None
    )
    grams = []
    for task, some in enumerate(rows):
        expert = _expert(opened.base, taus, task)
        found = merging.mean_grams(
            capture,
            train_state.merge(expert, opened.frozen),
            jax.tree.map(lambda x: x.reshape(-1, BATCH, *x.shape[1:]), some),
        )
        named = zip(tree.paths(found), jax.tree.leaves(found), strict=True)
        grams.append({name: gram for name, gram in named if name in trained})
    return zoo.Fit(delta=merging.regmean(taus, tree.stack(grams), jitter=1e-3))


def _entropy(logits, inputs, task):
    return jnp.mean(losses.softmax_entropy(logits(inputs), task["head"]["active"]))


def adamerging(taus, chosen, material, *, kind: str, plus: bool = False) -> zoo.Fit:
    """Coefficients by task or leaf; ++ cleans the task vectors by TIES first."""
    del chosen
    if plus:
        taus = merging.ties_select(taus, density=0.2)

    def clipped(coeffs):
        return jax.tree.map(lambda c: jnp.clip(c, 0, 1), coeffs)

    recipe = zoo.Recipe(
        steps=STEPS,
        batch_size=BATCH,
        optimizer={"name": "adam", "peak": 1e-2, "decay": False},
        seed=0,
        chunk=STEPS,
    )
    run = zoo.coefficients(material, _entropy, recipe, spread=clipped)
    start = merging.init_coefficients(taus, START, kind=kind)
    rows = [material.inputs("test", task) for task in range(material.count)]
    trace = run(taus, start, recipe.batches(rows), {"head": material.heads()})
    return zoo.Fit(delta=merging.combine(taus, clipped(trace.variables)))


def _batches(material: zoo.Material) -> Any:
    found = material.batches("test", steps=STEPS, batch_size=BATCH, seed=0)
    return jax.tree.map(jnp.asarray, next(iter(found)))


def _loss(material: zoo.Material) -> Any:
    def loss(params, batch, task, args):
        logits = material.logits(params, batch, task["head"], args)
        return jnp.mean(losses.softmax_entropy(logits, task["head"]["active"]))

    return loss


def frank_wolfe(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Hard selection by leaf, from task arithmetic, in small steps."""
    del chosen
    found = merging.frank_wolfe(
        material.zoo.base,
        taus,
        _loss(material),
        _batches(material),
        start=START,
        step_size=0.1,
        tasks={"head": material.heads()},
        args=material.args,
    )
    return zoo.Fit(delta=merging.combine(taus, found.coeffs))


def concrete(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """One mask for all task vectors, coefficients fixed."""
    del chosen
    found = merging.concrete(
        material.zoo.base,
        taus,
        _loss(material),
        _batches(material),
        key=jax.random.key(0),
        coeffs=START,
        tx=optax.adam(1e-2),
        tasks={"head": material.heads()},
        args=material.args,
    )
    return zoo.Fit(delta=merging.concrete_merge(taus, found, kind="mean"))


def surgery(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Task arithmetic whose features are corrected towards each expert's."""
    del chosen
    base, count = material.zoo.base, material.count
    merged = tree.add_scaled(base, merging.task_arithmetic(taus), START)
    stack = next(iter(material.batches("train", steps=STEPS, batch_size=BATCH, seed=0)))

    @jax.jit
    def features(params, batches):
        return jax.lax.map(
            lambda b: material.features(params, b, material.args), batches
        )

    pairs = []
    for task in range(count):
        own = jax.tree.map(lambda x, t=task: jnp.asarray(x[:, t]), stack)
        expert = _expert(base, taus, task)
        pairs.append((features(merged, own), features(expert, own)))
    ours, theirs = (jnp.stack(x) for x in zip(*pairs, strict=True))
    found = merging.surgery(
        ours, theirs, key=jax.random.key(0), rank=16, tx=optax.adam(1e-2)
    )

    def corrected(params, inputs, task):
        found = material.features(params["model"], inputs, material.args)
        one = jax.tree.map(lambda x: x[task], params["surgery"])
        return merging.surgery_apply(one, found)

    return zoo.Fit(
        features=corrected, params={"model": merged, "surgery": found.params}
    )


def rows() -> Iterable[zoo.LearnedModel]:
    """One row per rule."""
    partial = functools.partial
    for name, fit in {
        "Fisher": fisher,
        "RegMean": regmean,
        "AdaMerging, by task (test inputs)": partial(adamerging, kind="task"),
        "AdaMerging, by leaf (test inputs)": partial(adamerging, kind="leaf"),
        "AdaMerging++, by leaf (test inputs)": partial(
            adamerging, kind="leaf", plus=True
        ),
        "Frank-Wolfe, by leaf (test inputs)": frank_wolfe,
        "Concrete task arithmetic (test inputs)": concrete,
        "Surgery on task arithmetic": surgery,
    }.items():
        yield zoo.LearnedModel(name=name, fit=fit)
