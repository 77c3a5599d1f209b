"""Self Positioning: embedding models merged where a small probe says."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mtl_jax import report
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import merging
from mtl_jax.zoo import embedding

SPEC = SystemSpec(
    name="self-positioning",
    title=(
        "Improving General Text Embedding Model: Tackling Task Conflict and Data "
        "Imbalance through Model Merging"
    ),
    year=2024,
    family="merging",
    kind="posthoc",
    summary=(
        "Learns the interpolation angles and norm of task vectors of embedding models "
        "on a small probe set."
    ),
    reference="""@misc{self-positioning,
  title = {{Improving General Text Embedding Model: Tackling Task Conflict and Data
            Imbalance through Model Merging}},
  year = {2024}
}""",
    uses=(
        "merging.positioner",
        "merging.slerp_chain_weights",
    ),
    deviations=(
        "The paper was not read, only its abstract and notes with its equations: which "
        "share pulls towards which vector, the parametrisation by exp, Adam and its "
        "rate are our reading.",
        "Task vectors are one flat vector each for angles and lengths.",
        "All models are trained apart from the base; the sequential variant is left "
        "out.",
        "Probe pairs come from the data of each group, as many of each, apart from "
        "training and test; hundreds instead of 32,000.",
        "Invented documents, or two layers of MiniLM, stand for the paper's language "
        "model and MTEB.",
    ),
)


def _average(gram, weights):
    """The average as a rule to search, `w / sum w`."""
    del gram
    return weights / jnp.sum(weights)


def build(config: ConfigDict) -> embedding.Merges:
    """Merges without a search, the search, and a grid in its place."""
    study = config.study

    def fixed(name, rule) -> embedding.Merge:
        return embedding.Merge(
            name=name, place=lambda family: embedding.Place(kappa=rule(family.gram))
        )

    def searched(
        name, rule=merging.slerp_chain_weights, search="joint"
    ) -> embedding.Merge:
        def place(family):
            found = _search(family, study, study.norm_penalty, rule, search)
            return embedding.Place(
                kappa=found.kappa, details=_told(family, study, found)
            )

        return embedding.Merge(name=name, place=place)

    rows = [
        fixed("average", lambda gram: np.full(len(gram), 1 / len(gram))),
        fixed("SLERP, equal shares", merging.slerp_chain_weights),
        embedding.Merge(name="SLERP, grid", place=lambda f: _grid(f, study)),
        searched("average, searched", _average),
        searched("self positioning"),
    ]
    if study.pairwise:
        rows.append(searched("self positioning, pairwise", search="pairwise"))
    return embedding.Merges(rows=tuple(rows), analyses=(_claims, _growth))


@functools.cache
def _positioner(loss_fn, rate, rule):
    """One for all seeds and penalties."""
    return merging.positioner(loss_fn, optax.adam(rate), rule=rule)


def _search(family, study, penalty, rule, search="joint"):
    run = _positioner(family.loss_fn, study.rate, rule)
    batches = family.probe_batches(study.steps)
    base, taus = family.material.base, family.taus
    return run(base, taus, batches, norm_penalty=penalty, search=search)


def _told(family, study, found):
    """Probe loss at the end and, of the chain, the length by penalty."""
    batches = family.probe_batches(study.probe_batches, seed=1)
    return {
        "probe": family.probe_loss(family.merged(found.kappa), batches),
        "scale": float(found.scales[-1]),
        "losses": np.mean(found.losses, 0).tolist(),
    }


def _grid(family, study) -> embedding.Place:
    """Shares and lengths tried on the probe; of more than two groups, of the last."""
    batches = family.probe_batches(study.probe_batches, seed=1)
    trials = []
    for share, scale in itertools.product(study.shares, study.lengths):
        weights = np.ones(len(family.gram))
        weights[-1] = share / (1 - share)
        kappa = merging.slerp_chain_weights(family.gram, weights, scale=scale)
        loss = family.probe_loss(family.merged(kappa), batches)
        trials.append((loss, share, scale, np.asarray(kappa)))
    best = min(trials, key=lambda trial: trial[0])
    table = np.reshape([t[0] for t in trials], (len(study.shares), len(study.lengths)))
    scales = [
        float(_search(family, study, mu, merging.slerp_chain_weights).scales[-1])
        for mu in study.norm_penalties
    ]
    details = {"probe": best[0], "table": table, "place": best[1:3], "scales": scales}
    return embedding.Place(kappa=best[3], details=details)


def _claims(study) -> None:
    """Search against grid, merging against training together, and the penalty."""
    ours, grid = study.results["self positioning"], study.results["SLERP, grid"]
    reached, best = (np.array([d["probe"] for d in r.details]) for r in (ours, grid))
    study.claim(
        "The search reaches the probe loss of the best of the grid, to 1%",
        f"{_list(reached, '.3f')} against {_list(best, '.3f')}",
        np.all(reached <= 1.01 * best),
    )
    for other in (
        "joint training",
        "balanced training",
        "average",
        "SLERP, equal shares",
    ):
        won, gap = study.wins("self positioning", other)
        study.claim(
            f"Self positioning is at least as good as {other} in 4 of 5 seeds",
            f"{won} of {len(gap)} seeds, {_list(100 * gap, '+.1f')} points",
            won >= 0.8 * len(gap),
        )
    scales = np.array([details["scales"] for details in grid.details])
    study.claim(
        "A larger penalty gives a shorter vector, in every seed",
        f"lengths {_list(scales.mean(0), '.3f')} for penalties "
        f"{_list(study.config.study.norm_penalties, 'g')}",
        np.all(np.diff(scales, axis=1) < 0),
    )
    first = grid.details[0]
    options = study.config.study
    study.report.add_figure(
        "Probe loss by share (down) and length, first seed",
        report.Heatmap(
            rows=[f"{x:g}" for x in options.shares],
            columns=[f"{x:g}" for x in options.lengths],
            values=first["table"].tolist(),
            value_range=(float(first["table"].min()), float(first["table"].max())),
        ),
    )


def _growth(study) -> None:
    """Length of a task vector against data, and whom joint training takes after."""
    large = int(np.argmax([norms[-1, 0] for norms in study.norms[0]]))
    fits = [np.corrcoef(*norms[large].T)[0, 1] ** 2 for norms in study.norms]
    study.claim(
        "The length of a task vector grows linearly with its data (R^2 at least 0.9)",
        f"R^2 {_list(fits, '.3f')}",
        min(fits) >= 0.9,
    )
    cosines = np.array(study.cosines)
    others = np.delete(cosines, large, axis=1).max(1)
    study.claim(
        "Joint training points towards the expert of the largest group",
        f"cosines {_list(cosines.mean(0), '.3f')}",
        np.all(cosines[:, large] > others),
    )


def _list(values, shape) -> str:
    return ", ".join(format(float(x), shape) for x in values)
