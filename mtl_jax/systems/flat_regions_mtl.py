"""Seeking task-based flat regions: one sharpness-aware perturbation per task."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mtl_jax import multitask
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import aggregation

SPEC = SystemSpec(
    name="flat-regions-mtl",
    title="Improving Multi-task Learning via Seeking Task-based Flat Regions",
    year=2022,
    family="gradients",
    kind="trainable",
    summary=(
        "Gives every task its own sharpness-aware perturbation and lets any aggregator "
        "combine gradients of losses and of their flatness apart."
    ),
    reference="""@article{flat-regions-mtl,
  title = {{Improving Multi-task Learning via Seeking Task-based Flat Regions}},
  year = {2022},
  eprint = {2211.13723},
  archiveprefix = {arXiv}
}""",
    uses=(
        "aggregation.cagrad",
        "aggregation.flat_mtl",
        "aggregation.mgda",
        "aggregation.pcgrad",
        "aggregation.sam_perturbation",
        "aggregation.sum",
        "multitask.aggregated",
    ),
    deviations=(
        "The radii are ours, chosen on validation data: the text that was read gives "
        "none.",
        "Composites of 8 x 8 digits on a 12 x 12 canvas stand for Multi-MNIST, with a "
        "small convolutional network for ResNet-18; at scale a ViT takes CelebA.",
    ),
)

_SHARPNESS = 0.1  # Not for a config: results are remembered by the measure's name.
_AGGREGATORS = {
    "sum": aggregation.sum,
    "PCGrad": aggregation.pcgrad,
    "CAGrad": aggregation.cagrad,
    "MGDA": aggregation.mgda,
}


def _flat(aggregator, rho: float) -> multitask.Method:
    """The aggregator inside `flat_mtl`, with one radius for both parts."""

    def flat():
        return aggregation.flat_mtl(aggregator())

    return multitask.aggregated(
        f"{rho:g}",
        flat,
        grads="flat",
        radii=(rho, rho),
        about={"flat": aggregator.__name__, "rho": rho},
    )


def _sharpness(problem, params):
    """Mean over tasks of the rise of a task's loss at its own perturbation."""
    rows = {k: jnp.asarray(x[:512]) for k, x in problem.splits["train"].items()}

    @jax.jit
    def one(params, task):
        def loss(params):
            return problem.loss_fn(params, rows, None)[0][task]

        here, grads = jax.value_and_grad(loss)(params)
        step = aggregation.sam_perturbation(grads, _SHARPNESS)
        return loss(jax.tree.map(jnp.add, params, step)) - here

    return float(np.mean([one(params, t) for t in range(len(problem.targets))]))


def build(config: ConfigDict) -> multitask.Contest:
    """Every aggregator with and without."""
    study = config.study
    rows = []
    for name, aggregator in _AGGREGATORS.items():
        plain = multitask.aggregated(name, aggregator)
        flat = tuple(_flat(aggregator, rho) for rho in study.radii)
        rows += [
            multitask.Row(name=name, candidates=(plain,)),
            multitask.Row(name=f"{name}, flat", candidates=flat),
        ]
    return multitask.Contest(
        rows=tuple(rows),
        measures={"sharpness": _sharpness},
        analyses=(_claims,),
    )


def _claims(comparison) -> None:
    """What the paper's tables say of accuracy, sharpness and conflicts."""
    seeds = len(comparison.seeds)
    for name in ("PCGrad", "CAGrad"):
        won, gap = comparison.wins(f"{name}, flat", name)
        comparison.claim(
            f"Flat regions help {name}, in 4 of 5 seeds",
            f"{won} of {seeds} seeds, mean difference {gap:+.2f} points",
            won >= 0.8 * seeds,
        )
    for what, key in (("sharpness", "sharpness"), ("conflict rate", "conflict_rate")):
        for name in ("PCGrad", "CAGrad"):
            plain = comparison.results[name].last(key)
            flat = comparison.results[f"{name}, flat"].last(key)
            lower = int(np.sum(flat < plain))
            comparison.claim(
                f"The {what} of {name} is lower with flat regions, in every seed",
                f"{np.mean(flat):.3g} against {np.mean(plain):.3g}, lower in {lower} "
                f"of {seeds}",
                lower == seeds,
            )
