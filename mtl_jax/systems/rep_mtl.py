"""Rep-MTL: regularise what every task asks of the shared representation."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mtl_jax import losses, multitask
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import aggregation

SPEC = SystemSpec(
    name="rep-mtl",
    title=(
        "Rep-MTL: Unleashing the Power of Representation-level Task Saliency for "
        "Multi-Task Learning"
    ),
    year=2025,
    family="gradients",
    kind="trainable",
    summary=(
        "Adds two regularisers of the task saliencies, the gradients of the losses at "
        "the shared features: few tasks own a position, all agree on the channels."
    ),
    reference="""@article{rep-mtl,
  title = {{Rep-MTL: Unleashing the Power of Representation-level Task Saliency for
            Multi-Task Learning}},
  year = {2025},
  eprint = {2507.21049},
  archiveprefix = {arXiv}
}""",
    uses=(
        "aggregation.pcgrad",
        "losses.rep_mtl_loss",
        "multitask.aggregated",
        "multitask.regularised",
    ),
    deviations=(
        "The temperature 0.1, the mean over tasks in the contrast and the small "
        "constants are our reading: the text that was read gives none.",
        "Losses pass log(L + 1e-8), the form known from DB-MTL; equal weights and all "
        "other rows train on plain losses.",
        "Overlaid digits, the Adult census and, at scale, CelebA with a ViT stand for "
        "the paper's dense problems and Office sets; TFDS lacks the labels of NYUv2.",
        "Problems whose rows belong to one task each are refused: which rows of "
        "several tasks stand for one sample the paper does not say.",
        "Vector features count as one position: the affinity of a task has rank one.",
        "Both weights share one value, chosen on validation data, where the paper "
        "searches them for each data set.",
    ),
)


def _total(tsr: float, csa: float, temperature: float):
    """The regularised loss as `multitask.regularised` takes it."""

    def total(problem, params, batch, key):
        if problem.own_rows:
            raise ValueError(
                "rep-mtl: wants a problem whose rows have all labels: saliencies of "
                f"several tasks meet in one row; each row of {problem.name!r} belongs "
                "to one task"
            )
        z, penalty = problem.encode_with_penalty(params, batch, key)
        if "shared" not in z:
            raise ValueError(
                f"rep-mtl: {type(problem.model).__name__} has no shared representation"
            )

        def heads(params, shared):
            outputs = problem.decode(params, {**z, "shared": shared})
            return problem.task_losses(outputs, batch)

        loss, parts = losses.rep_mtl_loss(
            heads, params, z["shared"], tsr=tsr, csa=csa, temperature=temperature
        )
        metrics = {name: parts[name] for name in ("tsr", "csa") if name in parts}
        metrics |= {"task_loss": jnp.sum(parts["losses"])}
        if penalty is None:
            return loss, metrics
        return loss + penalty, metrics | {"penalty": penalty}

    return total


def _row(name: str, weights, temperature: float) -> multitask.Row:
    """One candidate per pair of weights."""
    return multitask.Row(
        name=name,
        candidates=tuple(
            multitask.regularised(
                f"{tsr:g} {csa:g}",
                _total(tsr, csa, temperature),
                {"rep-mtl": [tsr, csa, temperature]},
            )
            for tsr, csa in weights
        ),
    )


def build(config: ConfigDict) -> multitask.Contest:
    """Both regularisers, each alone, and neither."""
    grid, temperature = tuple(config.study.weights), config.study.temperature
    rows = (
        multitask.Row(
            name="PCGrad",
            candidates=(multitask.aggregated("PCGrad", aggregation.pcgrad),),
        ),
        _row("log losses", ((0.0, 0.0),), temperature),
        _row("TSR only", tuple((w, 0.0) for w in grid), temperature),
        _row("CSA only", tuple((0.0, w) for w in grid), temperature),
        _row("Rep-MTL", tuple((w, w) for w in grid), temperature),
    )
    return multitask.Contest(rows=rows, analyses=(_claims,))


def _claims(comparison) -> None:
    """What the paper's tables say of the full method and of its parts."""
    seeds = len(comparison.seeds)
    won, gap = comparison.wins("Rep-MTL", "equal weights")
    comparison.claim(
        "Rep-MTL is at least as good as equal weights in 4 of 5 seeds",
        f"{won} of {seeds} seeds, mean difference {gap:+.2f} points",
        won >= 0.8 * seeds,
    )
    won, gap = comparison.wins("CSA only", "TSR only")
    comparison.claim(
        "The alignment alone is at least as good as the entropy alone, on average",
        f"mean difference {gap:+.2f} points ({won} of {seeds} seeds)",
        gap >= 0,
    )
    won, gap = comparison.wins("Rep-MTL", "log losses")
    comparison.claim(
        "The regularisers add to what the logarithm alone brings, on average",
        f"mean difference {gap:+.2f} points ({won} of {seeds} seeds)",
        gap > 0,
    )
