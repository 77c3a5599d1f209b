"""TALL-masks and Consensus Merging: where each task lives in a sum of task vectors."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mtl_jax import report, tree, zoo
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import masking, merging

SPEC = SystemSpec(
    name="tall-masks",
    title="Localizing Task Information for Improved Model Merging and Compression",
    year=2024,
    family="merging",
    kind="posthoc",
    summary=(
        "Pulls single tasks back out of a merged task vector with one bit per weight, "
        "and merges anew from the weights that several tasks use."
    ),
    reference="""@inproceedings{tall-masks,
  title = {{Localizing Task Information for Improved Model Merging and Compression}},
  author = {Wang, Ke and Dimitriadis, Nikolaos and Ortiz-Jim\\'enez, Guillermo and
            Fleuret, Fran\\c{c}ois and Frossard, Pascal},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2405.07813},
  archiveprefix = {arXiv}
}""",
    uses=(
        "masking.MaskBank",
        "merging.breadcrumbs",
        "merging.consensus",
        "merging.dare",
        "merging.compression_bits",
        "merging.magnitude_masks",
        "merging.mask_statistics",
        "merging.restore_delta",
        "merging.tall_masks",
        "merging.task_arithmetic",
        "merging.ties",
        "merging.unit_axis",
    ),
    deviations=(
        "Storage counts 32 bits per weight of base and merged vector and one per "
        "task and trained weight: our reading of the abstract's figures.",
        "Masks compare float32 differences, where the authors compare parameters; "
        "entries that tie within rounding may fall to the other side.",
    ),
)


def _tall_bits(num_tasks: int, trained: int, frozen: int) -> int:
    return merging.compression_bits(trained, num_tasks, frozen=frozen).masked


def _tall(name, merge, knobs) -> zoo.TaskModels:
    """Each task's mask over a merged vector, its lambda chosen on validation data."""

    @jax.jit  # Once for all tasks and knobs.
    def delta(state, task, knob):
        taus, merged = state
        one = jax.tree.map(lambda x: x[task][None], taus)
        mask = merging.tall_masks(one, merged=merged, scale=knob)
        return merging.restore_delta(merged, zoo.task_delta(mask, 0))

    return zoo.TaskModels(
        name=name,
        prepare=lambda taus, chosen: (taus, merge(taus)),
        delta=delta,
        knobs=knobs,
        bits=_tall_bits,
    )


def _consensus(name, source, merge, min_tasks, scales) -> zoo.SharedModel:
    """Keeps what at least `min_tasks` of the masks chosen for `source` use."""

    def delta(taus, chosen):
        merged = merge(taus)
        scale = jnp.asarray(chosen[source], jnp.float32)
        return merging.consensus(taus, merged=merged, scale=scale, min_tasks=min_tasks)

    return zoo.SharedModel(name=name, delta=delta, scales=scales)


def _chosen_masks(taus, merged, chosen):
    """The masks of all tasks, each at the lambda that validation chose."""
    scale = jnp.asarray(chosen, jnp.float32)
    return merging.tall_masks(taus, merged=merged, scale=scale)


def _magnitude(source) -> zoo.TaskModels:
    """The paper's baseline: the largest of tau_t, as many as TALL keeps on average."""

    def prepare(taus, chosen):
        merged = merging.task_arithmetic(taus)
        masks = _chosen_masks(taus, merged, chosen[source])
        density = float(merging.mask_statistics(masks).density.mean())
        return merged, merging.magnitude_masks(taus, density=density)

    return zoo.TaskModels(
        name="magnitude masks",
        prepare=prepare,
        delta=lambda state, task, knob: merging.restore_delta(
            state[0], zoo.task_delta(state[1], task)
        ),
        bits=_tall_bits,
    )


def _ties_sum(taus):
    return merging.ties(taus, density=0.2, scope="global", reduce="sum")


def build(config: ConfigDict) -> zoo.PostHoc:
    """The paper's comparison, and the packed bank that serves all tasks."""
    scales, knobs = tuple(config.study.scales), tuple(config.study.mask_scales)
    sparse = tuple(config.study.sparse_scales)
    rows = (
        *zoo.baselines(scales, sparse),
        zoo.SharedModel(
            name="DARE",
            delta=lambda taus, _: merging.dare(
                taus, density=0.2, key=jax.random.key(config.study.seed)
            ),
            scales=scales,
        ),
        zoo.SharedModel(
            name="breadcrumbs",
            delta=lambda taus, _: merging.breadcrumbs(
                taus, density=0.15, drop_top=0.01, axis=merging.unit_axis
            ),
            scales=sparse,
        ),
        _tall("TALL-masks", merging.task_arithmetic, knobs),
        _tall("TALL-masks (TIES)", _ties_sum, knobs),
        _magnitude("TALL-masks"),
        *(
            _consensus(
                f"consensus {k}", "TALL-masks", merging.task_arithmetic, k, scales
            )
            for k in config.study.min_tasks
        ),
        _consensus("consensus 2 (TIES)", "TALL-masks (TIES)", _ties_sum, 2, scales),
    )
    return zoo.PostHoc(rows=rows, analyses=(_overlap, _claims))


def _overlap(study) -> None:
    """How the tasks share weights: counts, densities, pairwise overlap."""
    taus = study.taus["standard"]
    merged = merging.task_arithmetic(taus)
    masks = _chosen_masks(taus, merged, study.chosen["TALL-masks"])
    found = merging.mask_statistics(masks)
    total = float(found.histogram.sum())
    shares = [float(count) / total for count in found.histogram]
    study.report.add_figure(
        "How many tasks use a weight",
        report.Bars(
            labels=[str(c) for c in range(len(shares))],
            series={"share of trained weights": shares},
            y_label="share of trained weights",
        ),
        caption="0: wanted by no task (catastrophic); 1: by one alone (selfish).",
    )
    study.report.add_figure(
        "Overlap of the masks (intersection over union)",
        report.Heatmap(
            rows=study.names,
            columns=study.names,
            values=found.iou.tolist(),
            value_range=(0.0, 1.0),
        ),
    )
    _bank(study, merged, masks, found.density)


def _bank(study, merged, masks, density) -> None:
    """Packs everything, restores every task from the bits, and weighs the result."""
    bank = masking.MaskBank.create(study.zoo.base, merged, masks)
    rows = []
    for task, name in enumerate(study.names):
        restored = bank.restore(task)
        packed = study.evaluator.accuracy(restored, task, "test")
        rows.append(
            (name, float(density[task]), study.chosen["TALL-masks"][task], packed)
        )
    dense = sum(tree.nbytes(e) for e in study.zoo.experts["standard"])
    study.report.add_table(
        report.Table(
            title="One bank for all tasks",
            columns=("task", "mask density", "lambda", "accuracy from packed bits"),
            rows=tuple(rows),
            formats={"mask density": ".1%", "accuracy from packed bits": ".1%"},
            caption=f"Trained weights: {report.format_bytes(bank.nbytes)} for base, "
            "merged vector and packed masks; the experts take "
            f"{report.format_bytes(dense)}.",
        )
    )


def _claims(study) -> None:
    """What the paper says of reconstruction and of consensus."""
    score = {name: float(r.normalised.mean()) for name, r in study.results.items()}
    tall, magnitude = score["TALL-masks"], score["magnitude masks"]
    study.claim(
        "TALL-masks retrieve the single tasks (at least 95% of expert accuracy)",
        f"{tall:.1%} normalised accuracy",
        tall >= 0.95,
    )
    study.claim(
        "TALL-masks beat magnitude masks of equal density by 8 points",
        f"{tall - magnitude:+.1%} normalised accuracy",
        tall - magnitude >= 0.08,
    )
    for merged, consensus in (
        ("task arithmetic", "consensus 2"),
        ("TIES", "consensus 2 (TIES)"),
    ):
        if consensus not in score:  # The config asks for other counts.
            continue
        gain = score[consensus] - score[merged]
        study.claim(
            f"Consensus improves on {merged}",
            f"{gain:+.1%} normalised accuracy",
            gain > 0,
        )
