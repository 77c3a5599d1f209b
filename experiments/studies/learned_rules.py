"""Merge rules that look at data, as rows of a study of experts.

None but CMA-ES, which is scored on validation rows, learns from a label. Fisher,
RegMean, RegMean++, AdaSVD and Surgery read training rows; rules that minimise entropy
read the test rows, as their papers do, and say so in their names; DOGE and DOP descend
on the task vectors alone. Strengths, and the rates of AdaMerging, Gossip, Concrete and
Surgery, are chosen by accuracy on validation rows; the step of Frank-Wolfe is 0.1.
Models that route are in `routed_rules`.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import routed_rules as routed
import rule_table as table

from mtl_jax import losses, merging, models, routing, tree, zoo
from mtl_jax.train import state as train_state

ROWS, BATCH, START = 64, 16, 0.3
GATE_RANK, GENERATIONS, ROUNDS = 16, 12, 4


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
            {"model": table.expert(material.zoo.base, taus, task), "head": head},
            (_some(material, task, ROWS),),
            labels="sampled",
            key=jax.random.key(task),
        )
        found.append(diagonals["model"])
    return zoo.Fit(delta=merging.fisher(taus, tree.stack(found)))


def _capture(material: zoo.Material) -> Any:
    """Grams of all Dense layers from trained leaves; padding does not count."""
    masked = "attention_mask" in material.inputs("train", 0)
    capture = models.input_grams(
        material.zoo.encoder.features,
        mask_fn=(lambda batch: batch["attention_mask"]) if masked else None,
    )
    return lambda params, batch: capture(
        train_state.merge(params, material.zoo.frozen), batch
    )


def _in_batches(material: zoo.Material, task: int) -> Any:
    some = _some(material, task, ROWS)
    return jax.tree.map(lambda x: x.reshape(-1, BATCH, *x.shape[1:]), some)


def regmean(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Grams of what every Dense layer of each expert sees."""
    del chosen
    capture, trained, grams = _capture(material), set(tree.paths(taus)), []
    for task in range(material.count):
        expert = table.expert(material.zoo.base, taus, task)
        found = merging.mean_grams(capture, expert, _in_batches(material, task))
        named = zip(tree.paths(found), jax.tree.leaves(found), strict=True)
        grams.append({name: gram for name, gram in named if name in trained})
    return zoo.Fit(delta=merging.regmean(taus, tree.stack(grams), jitter=1e-3))


def regmean_plus_plus(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """RegMean block by block, on what leaves the merged blocks below."""
    del chosen
    blocks = {
        int(n) for path in tree.paths(taus) for n in re.findall(r"^layers_(\d+)/", path)
    }
    if not blocks:
        raise ValueError("RegMean++: the encoder has no blocks named layers_N")
    delta = merging.regmean_plus_plus(
        material.zoo.base,
        taus,
        _capture(material),
        [_in_batches(material, task) for task in range(material.count)],
        [rf"^layers_{n}/" for n in sorted(blocks)],
        jitter=1e-3,
    )
    return zoo.Fit(delta=delta)


def ada_svd(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Loads of dense SMILE layers, means over training rows of all tasks."""
    del chosen
    opened, frozen = material.zoo, material.args["frozen"]
    kernels = [x for x in jax.tree.leaves(taus) if x.ndim == 3]
    found = routing.smile_experts(
        taus, rank=max(min(x.shape[1:]) for x in kernels), gate_rank=GATE_RANK
    )
    module: Any = routed.Module(opened.encoder.features)
    whole = train_state.merge(opened.base, frozen)

    @jax.jit
    def loads(inputs):
        mask = inputs.get("attention_mask")
        return models.smile_loads(module, whole, found, inputs, mask=mask)

    seen = [loads(_some(material, task, ROWS)) for task in range(material.count)]
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
    return zoo.Fit(delta=merging.ada_svd(taus, mean))


def evolved(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Coefficients by task, by CMA-ES on the accuracy of validation rows."""
    del chosen
    evaluator, base = material.evaluator, material.zoo.base
    experts = table.expert_accuracies(taus, material)
    search = merging.cma_es(jnp.full(material.count, START))
    state, trace = search.init(), []
    for key in jax.random.split(jax.random.key(0), GENERATIONS):
        candidates = search.ask(key, state)
        scores = []
        for coeffs in candidates:
            model = tree.add_scaled(base, merging.combine(taus, coeffs))
            found = evaluator.accuracies(model, "validation")
            scores.append(-float(merging.normalised_accuracy(found, experts)))
        state = search.tell(state, candidates, jnp.asarray(scores))
        trace.append(-float(state.best_loss))
    best = search.best(state)
    details = {"validation": trace, "coefficients": best.tolist()}
    return zoo.Fit(delta=merging.combine(taus, best), details=details)


def _entropy(logits, inputs, task):
    return jnp.mean(losses.softmax_entropy(logits(inputs), task["head"]["active"]))


def adamerging(
    taus, chosen, material, *, steps: int, rate: float, kind: str, plus: bool = False
) -> zoo.Fit:
    """Coefficients by task or leaf; ++ cleans the task vectors by TIES first."""
    del chosen
    if plus:
        taus = merging.ties_select(taus, density=0.2)

    def clipped(coeffs):
        return jax.tree.map(lambda c: jnp.clip(c, 0, 1), coeffs)

    recipe = zoo.Recipe(
        steps=steps,
        batch_size=BATCH,
        optimizer={"name": "adam", "peak": rate, "decay": False},
        seed=0,
        chunk=steps,
    )
    run = zoo.coefficients(material, _entropy, recipe, spread=clipped)
    start = merging.init_coefficients(taus, START, kind=kind)
    rows = [material.inputs("test", task) for task in range(material.count)]
    trace = run(taus, start, recipe.batches(rows), {"head": material.heads()})
    return zoo.Fit(delta=merging.combine(taus, clipped(trace.variables)))


def _batches(material: zoo.Material, steps: int) -> Any:
    found = material.batches("test", steps=steps, batch_size=BATCH, seed=0)
    return jax.tree.map(jnp.asarray, next(iter(found)))


def _loss(material: zoo.Material) -> Any:
    def loss(params, batch, task, args):
        logits = material.logits(params, batch, task["head"], args)
        return jnp.mean(losses.softmax_entropy(logits, task["head"]["active"]))

    return loss


def frank_wolfe(taus, chosen, material, *, steps: int, selection: Any) -> zoo.Fit:
    """Selection by leaf, from task arithmetic, in small steps."""
    del chosen
    found = merging.frank_wolfe(
        material.zoo.base,
        taus,
        _loss(material),
        _batches(material, steps),
        selection=selection,
        start=START,
        step_size=0.1,
        tasks={"head": material.heads()},
        args=material.args,
    )
    return zoo.Fit(delta=merging.combine(taus, found.coeffs))


def gossip(taus, chosen, material, *, steps: int, rate: float) -> zoo.Fit:
    """AdaMerging by task among three neighbours of a ring, and the mean in the end."""
    del chosen
    batches, heads = _batches(material, steps), material.heads()
    loss, base = _loss(material), material.zoo.base
    met = merging.neighbours(material.count)

    def params_fn(coeffs, args):
        return merging.compose(base, args["taus"], jnp.clip(coeffs, 0, 1))

    run = merging.learner(
        params_fn,
        lambda params, batch, task, args: loss(params, batch, task, args["rest"]),
        optax.adam(rate),
    )

    def merge(taus, t):
        own = jax.tree.map(lambda x: x[:, met[t]], batches)
        tasks = {"head": jax.tree.map(lambda x: x[met[t]], heads)}
        args = {"taus": taus, "rest": material.args}
        found = run(jnp.full(3, 1 / 3), own, tasks, args=args)
        return merging.combine(taus, jnp.clip(found.variables, 0, 1))

    after = merging.gossip(taus, merge, rounds=ROUNDS)
    return zoo.Fit(delta=merging.average(after))


def concrete(
    taus, chosen, material, *, steps: int, rate: float, adapt: bool = False
) -> zoo.Fit:
    """One mask for all task vectors; then, where they adapt, coefficients by leaf."""
    found = merging.concrete(
        material.zoo.base,
        taus,
        _loss(material),
        _batches(material, steps),
        key=jax.random.key(0),
        coeffs=START,
        tx=optax.adam(rate),
        coeffs_tx=optax.adam(rate) if adapt else None,
        tasks={"head": material.heads()},
        args=material.args,
    )
    if not adapt:
        return zoo.Fit(delta=merging.concrete_merge(taus, found, kind="mean"))
    mask = merging.concrete_mask(found.logits, kind="mean")
    masked = jax.tree.map(lambda x, m: x * m, taus, mask)
    return adamerging(masked, chosen, material, steps=steps, rate=rate, kind="leaf")


def surgery(
    taus: Any, chosen: Any, material: zoo.Material, *, steps: int, rate: float
) -> zoo.Fit:
    """Task arithmetic whose features are corrected towards each expert's."""
    del chosen
    base, count = material.zoo.base, material.count
    merged = tree.add_scaled(base, merging.task_arithmetic(taus), START)
    stack = next(iter(material.batches("train", steps=steps, batch_size=BATCH, seed=0)))

    @jax.jit
    def features(params, batches):
        return jax.lax.map(
            lambda b: material.features(params, b, material.args), batches
        )

    pairs = []
    for task in range(count):
        own = jax.tree.map(lambda x, t=task: jnp.asarray(x[:, t]), stack)
        expert = table.expert(base, taus, task)
        pairs.append((features(merged, own), features(expert, own)))
    ours, theirs = (jnp.stack(x) for x in zip(*pairs, strict=True))
    found = merging.surgery(
        ours, theirs, key=jax.random.key(0), rank=16, tx=optax.adam(rate)
    )

    def corrected(params, inputs, task):
        found = material.features(params["model"], inputs, material.args)
        one = jax.tree.map(lambda x: x[task], params["surgery"])
        return merging.surgery_apply(one, found)

    return zoo.Fit(
        features=corrected, params={"model": merged, "surgery": found.params}
    )


def _alone(rule: table.Rule) -> Callable[..., zoo.Fit]:
    return lambda taus, chosen, material: zoo.Fit(delta=rule(taus))


def rows(steps: int) -> Iterable[zoo.LearnedModel]:
    """One row per rule; `steps` of what learns from rows."""
    part = functools.partial
    for name, fit in {
        "Fisher": fisher,
        "RegMean": regmean,
        "RegMean++": regmean_plus_plus,
        "AdaSVD": ada_svd,
        "DOGE": _alone(merging.doge),
        "DOP": _alone(merging.dop),
    }.items():
        yield zoo.LearnedModel(name=name, fit=fit, scales=table.MEAN)
    by_leaf = part(adamerging, kind="leaf")
    learned = {
        "AdaMerging, by task": table.rated(part(adamerging, kind="task", steps=steps)),
        "AdaMerging, by leaf": table.rated(part(by_leaf, steps=steps)),
        "AdaMerging++, by leaf": table.rated(part(by_leaf, plus=True, steps=steps)),
        "Gossip, by task": table.rated(part(gossip, steps=steps)),
        "Concrete task arithmetic": table.rated(part(concrete, steps=steps)),
        "Concrete AdaMerging, by leaf": table.rated(
            part(concrete, adapt=True, steps=steps)
        ),
        "Frank-Wolfe, by leaf": part(frank_wolfe, selection="hard", steps=steps),
        "Frank-Wolfe, by leaf, soft": part(frank_wolfe, selection="soft", steps=steps),
    }
    for name, fit in learned.items():
        yield zoo.LearnedModel(name=f"{name} (test inputs)", fit=fit)
    yield zoo.LearnedModel(name="CMA-ES, by task (validation rows)", fit=evolved)
    yield zoo.LearnedModel(
        name="Surgery on task arithmetic", fit=table.rated(part(surgery, steps=steps))
    )
