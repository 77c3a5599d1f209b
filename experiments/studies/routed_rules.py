"""Merge rules that route, and adapters restored from bases, as rows of a study.

No router is told the task. SMILE reads no rows; WEMoE, experts of rank one and DAWE
learn from the entropy of predictions on test inputs, as in their papers, at rates
chosen on validation rows; the router of Twin-Merging from training inputs and the names
of their tasks.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rule_table as table

from mtl_jax import losses, merging, models, routing, tree, zoo
from mtl_jax.train import state as train_state
from mtl_jax.zoo import experts

RANK, BATCH, START = 16, 16, 0.3
POOL = 32
ROUTER_STEPS, ROUTER_BATCH = 1000, 128
RATES = (1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class Module:
    """An encoder as what `models.apply_routed` and `apply_smile` call of a module."""

    features: Callable[[Any, Any], Any]

    def apply(self, variables, batch):
        """Features [B, D]."""
        return self.features(variables["params"], batch)


def smile(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """Experts and gates from singular vectors; norms and the like averaged."""
    del chosen
    opened = material.zoo
    module: Any = Module(opened.encoder.features)
    found = routing.smile_experts(taus, rank=RANK, gate_rank=RANK)
    dense = tuple(f"{name.rpartition('/')[0]}/" for name in tree.paths(found))
    average = tree.map_with_path(
        lambda name, x: jnp.zeros_like(x) if name.startswith(dense) else x,
        merging.average(taus),
    )

    def features(params, inputs, task):
        del task
        whole = train_state.merge(params["model"], material.args["frozen"])
        return models.apply_smile(module, whole, params["experts"], inputs)

    base = tree.add_scaled(opened.base, average)
    return zoo.Fit(features=features, params={"model": base, "experts": found})


def we_moe(
    taus: Any,
    chosen: Any,
    material: zoo.Material,
    *,
    steps: int,
    rate: float,
    pool: int | None = None,
) -> zoo.Fit:
    """One router per MLP, or per layer of one, learned from entropy of test inputs.

    With a pool, of that many experts of rank one for each task, and linear routers.
    """
    del chosen
    opened, frozen = material.zoo, material.args["frozen"]
    module: Any = Module(opened.encoder.features)
    widths = {
        match[1]: x.shape[-2]
        for name, x in zip(tree.paths(taus), jax.tree.leaves(taus), strict=True)
        if (match := re.match(r"(.*/mlp(?=/in)|layers_\d+)(?:/in)?/kernel$", name))
    }
    groups = {name: f"^{name}/" for name in widths}
    if pool is None:
        model = routing.upscale(opened.base, taus, groups, static_scale=START)
    else:
        model = routing.rank_one(
            opened.base, taus, groups, rank=pool, static_scale=START
        )
    routers = {
        name: routing.init_router(
            jax.random.key(i),
            width,
            material.count * (pool or 1),
            depth=1 if pool else 2,
            bias=START,
        )
        for i, (name, width) in enumerate(widths.items())
    }

    def apply(routers, model, inputs):
        whole = model._replace(params=train_state.merge(model.params, frozen))
        mask = inputs.get("attention_mask")
        return models.apply_routed(module, routers, whole, inputs, mask=mask)

    def loss_fn(routers, batch, task, model):
        found = apply(routers, model, batch)
        logits = experts.head_logits(found, task, opened.settings)
        return losses.softmax_entropy(logits, task["active"]).mean()

    batches = material.batches("test", steps=steps, batch_size=BATCH, seed=0)
    run = merging.learner(lambda routers, _: routers, loss_fn, optax.adam(rate))
    stack = jax.tree.map(jnp.asarray, next(iter(batches)))
    learned = run(routers, stack, material.heads(), args=model)

    def features(params, inputs, task):
        del task
        return apply(params["routers"], params["model"], inputs)

    params = {"routers": learned.variables, "model": model}
    return zoo.Fit(features=features, params=params)


def dawe(
    taus: Any, chosen: Any, material: zoo.Material, *, steps: int, rate: float
) -> zoo.Fit:
    """One router for the whole model, on features of the base, learned from entropy."""
    del chosen
    opened = material.zoo
    model = routing.upscale(opened.base, taus, {"all": "."})

    def features_fn(params, inputs):
        return material.features(params, inputs, material.args)

    apply = routing.dawe(features_fn, lambda inputs: features_fn(opened.base, inputs))

    def loss_fn(router, batch, task, model):
        found = apply(router, model, batch)
        logits = experts.head_logits(found, task, opened.settings)
        return losses.softmax_entropy(logits, task["active"]).mean()

    batches = material.batches("test", steps=steps, batch_size=BATCH, seed=0)
    stack = jax.tree.map(jnp.asarray, next(iter(batches)))
    some = jax.tree.map(lambda x: x[0, 0], stack)
    width = jax.eval_shape(features_fn, opened.base, some).shape[-1]
    start = routing.init_router(
        jax.random.key(0), width, material.count, depth=1, bias=START
    )
    run = merging.learner(lambda router, _: router, loss_fn, optax.adam(rate))
    learned = run(start, stack, material.heads(), args=model)

    def features(params, inputs, task):
        del task
        return apply(params["router"], params["model"], inputs)

    params = {"router": learned.variables, "model": model}
    return zoo.Fit(features=features, params=params)


def twin(taus: Any, chosen: Any, material: zoo.Material) -> zoo.Fit:
    """A router on features of the shared model, learned as a classifier of tasks."""
    del chosen
    base, count = material.zoo.base, material.count
    model = routing.twin(taus, scale=START, rank=RANK)

    def features_fn(params, inputs):
        return material.features(params, inputs, material.args)

    compiled, shared = jax.jit(features_fn), tree.add_scaled(base, model.shared)
    stack = next(iter(material.batches("train", steps=32, batch_size=32, seed=0)))
    seen = [
        compiled(shared, jax.tree.map(lambda x, i=i, t=t: x[i, t], stack))
        for t in range(count)
        for i in range(32)
    ]
    args = jnp.concatenate(seen), jnp.repeat(jnp.arange(count), 32 * 32)
    start = routing.init_router(
        jax.random.key(0), seen[0].shape[1], count, hidden=64, bias=0.0
    )

    def loss_fn(router, rows, _, args):
        logits = routing.router(router, args[0][rows])
        return losses.softmax_cross_entropy(logits, args[1][rows]).mean()

    size = (ROUTER_STEPS, 1, ROUTER_BATCH)
    rows = np.random.default_rng(0).integers(0, len(args[0]), size)
    run = merging.learner(lambda router, _: router, loss_fn, optax.adam(3e-3))
    router = run(start, jnp.asarray(rows), args=args).variables
    apply = routing.twin_apply(features_fn, features_fn)

    def features(params, inputs, task):
        del task
        model = params["model"]  # Its shared part holds the base.
        zeros = jax.tree.map(jnp.zeros_like, model.shared)
        return apply(params["router"], model, zeros, inputs)

    params = {"router": router, "model": model._replace(shared=shared)}
    return zoo.Fit(features=features, params=params)


def rows(steps: int) -> Iterable[zoo.Row]:
    """One row per rule; `steps` of what learns from rows."""
    part = functools.partial
    rated = part(table.rated, rates=RATES)
    for name, fit in {
        f"SMILE, rank {RANK}": smile,
        "WEMoE (test inputs)": rated(part(we_moe, steps=steps)),
        "rank-one experts (test inputs)": rated(part(we_moe, steps=steps, pool=POOL)),
        "DAWE (test inputs)": rated(part(dawe, steps=steps)),
        f"Twin, rank {RANK}": twin,
    }.items():
        yield zoo.LearnedModel(name=name, fit=fit)
    adapters = zoo.Adapters(RANK, "gram")
    for p in (0, 1, 2):
        yield adapters.row(
            f"RMM of rank {RANK}, p={p}",
            functools.partial(merging.rmm_basis, p=p),
            merging.rmm_restore,
        )
