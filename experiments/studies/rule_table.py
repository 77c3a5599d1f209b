"""The merge rules that leaderboards compare, at their defaults, and their grids.

Rules that look at data are in `learned_rules`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mtl_jax import merging, tree, zoo

SUM = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
MEAN = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
RATES = (1e-2, 3e-3, 1e-3)
KEY = jax.random.key(0)
Rule = Callable[[Any], Any]

# Rules whose result is a sum over tasks, and those whose result is a mean.
SUMS: dict[str, Rule] = {
    "task arithmetic": merging.task_arithmetic,
    "TIES, sum": lambda t: merging.ties(t, reduce="sum"),
    "DARE 0.5": lambda t: merging.dare(t, density=0.5, key=KEY),
    "DARE 0.2": lambda t: merging.dare(t, density=0.2, key=KEY),
    "breadcrumbs": lambda t: merging.breadcrumbs(t, axis=merging.unit_axis),
    "consensus 2": lambda t: merging.consensus(t, scale=0.4),
    "trust region": merging.trust_region,
    "LiNeS": lambda t: merging.lines(merging.task_arithmetic(t), first=0.3, last=1.0),
    "TSV-M": merging.tsv_merge,
    "Iso-C": merging.iso_c,
    "Iso-CTS": merging.iso_cts,
    "SVC": merging.svc,
    "OPCM": merging.opcm,
    "WUDI": merging.wudi,
    "RAM": merging.ram,
    "RAM+": merging.ram_plus,
}
MEANS: dict[str, Rule] = {
    "average": merging.average,
    "TIES": merging.ties,
    "TIES, per leaf": lambda t: merging.ties(t, scope="leaf"),
    "DARE-TIES 0.5": lambda t: merging.dare(
        t, density=0.5, key=KEY, elect="sum", reduce="disjoint_mean"
    ),
    "DELLA 0.5": lambda t: merging.della(
        t, density=0.5, key=KEY, axis=merging.unit_axis
    ),
    "SCE 0.5": lambda t: merging.sce(t, density=0.5),
    "PCB": merging.pcb,
    "MagMax": merging.magmax,
    "Model Stock": merging.model_stock,
    "KnOTS-TIES": merging.knots,
    "SLERP chain": merging.slerp_chain,
}
# Means of parameters on spheres, not of task vectors.
SPHERES: dict[str, Rule] = {
    "Karcher": merging.karcher,
    "multi-SLERP": merging.multislerp,
}


def on_sphere(rule: Rule, base: Any) -> Rule:
    """A rule of parameters as one of task vectors."""

    def delta(taus):
        experts = jax.tree.map(lambda b, t: b + t, base, taus)
        return jax.tree.map(lambda m, b: m - b, rule(experts), base)

    return delta


def task_models(base: Any) -> tuple[zoo.TaskModels, ...]:
    """Rules from whose result every task is restored."""

    def bits_of_masks(tasks, trained, frozen):
        return 32 * (2 * trained + frozen) + tasks * trained

    def signs(tasks, trained, frozen):
        return 32 * (trained + frozen) + tasks * trained

    @jax.jit
    def tall(state, task, knob):
        taus, merged = state
        one = jax.tree.map(lambda x: x[task][None], taus)
        mask = merging.tall_masks(one, merged=merged, scale=knob)
        return merging.restore_delta(merged, zoo.task_delta(mask, 0))

    return (
        zoo.TaskModels(
            name="TALL-masks",
            prepare=lambda taus, _: (taus, merging.task_arithmetic(taus)),
            delta=tall,
            knobs=(0.2, 0.3, 0.4, 0.5, 0.6),
            bits=bits_of_masks,
        ),
        zoo.TaskModels(
            name="EMR",
            prepare=lambda taus, _: merging.emr(taus),
            delta=lambda state, task, _: merging.emr_restore(state, task),
            bits=bits_of_masks,
        ),
        zoo.TaskModels(
            name="BitDelta",
            prepare=lambda taus, _: merging.bitdelta(taus),
            delta=lambda state, task, _: merging.bitdelta_restore(
                state, task, like=base
            ),
            bits=signs,
        ),
        zoo.TaskModels(
            name="RandES",
            prepare=lambda taus, _: merging.randes(taus, key=KEY),
            delta=lambda state, task, _: merging.randes_restore(state, task, key=KEY),
            knobs=(0.5, 1.0),
            bits=lambda tasks, trained, frozen: 32 * (2 * trained + frozen),
        ),
    )


def expert(base: Any, taus: Any, task: int) -> Any:
    """The weights of one expert."""
    return tree.add_scaled(base, zoo.task_delta(taus, task))


def expert_accuracies(taus: Any, material: zoo.Material) -> list[float]:
    """Of every expert on validation rows of its task."""
    return [
        material.evaluator.accuracy(
            expert(material.zoo.base, taus, task), task, "validation"
        )
        for task in range(material.count)
    ]


def rated(
    fit: Callable[..., zoo.Fit], rates: tuple[float, ...] = RATES
) -> Callable[..., zoo.Fit]:
    """The fit at the rate whose model is best on validation rows."""

    def best(taus, chosen, material):
        evaluator, base = material.evaluator, material.zoo.base
        experts = expert_accuracies(taus, material)
        kept, scores = None, {}
        for rate in rates:
            found = fit(taus, chosen, material, rate=rate)
            if found.features is None:
                model = tree.add_scaled(base, found.delta)
                accuracies = evaluator.accuracies(model, "validation")
            else:
                accuracies = evaluator.accuracies_of(
                    found.features, found.params, "validation"
                )
            score = float(merging.normalised_accuracy(accuracies, experts))
            if kept is None or score > max(scores.values()):
                kept = dataclasses.replace(found, details={"rate": rate})
            scores[rate] = score
        assert kept is not None, "rated: no rates"
        return dataclasses.replace(kept, details={**kept.details, "validation": scores})

    return best
