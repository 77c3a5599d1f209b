"""Task arithmetic in the tangent space: experts that add with less cross-talk."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mtl_jax import report, zoo
from mtl_jax.catalog import SystemSpec
from mtl_jax.models import heads
from mtl_jax.transforms import linearize, merging

SPEC = SystemSpec(
    name="task-arithmetic-tangent",
    title=(
        "Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models"
    ),
    year=2023,
    family="tangent",
    kind="posthoc",
    summary=(
        "Fine-tunes a model's first-order expansion around its pretrained weights, so "
        "that task vectors add and negate with less interference."
    ),
    reference="""@inproceedings{task-arithmetic-tangent,
  title = {{Task Arithmetic in the Tangent Space: Improved Editing of
            Pre-Trained Models}},
  author = {Ortiz-Jimenez, Guillermo and Favero, Alessandro and Frossard, Pascal},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2305.12827},
  archiveprefix = {arXiv}
}""",
    uses=(
        "linearize.disentanglement_error",
        "linearize.nonlinear_advantage",
        "linearize.ntk_localisation",
        "merging.negate",
        "merging.scale_search",
        "merging.task_arithmetic",
    ),
    deviations=(
        "Negation is controlled by one task of the suite, not by ImageNet.",
        "The definitions of the disentanglement error and of kernel localisation are "
        "our reading; localisation is summarised in one score of ours.",
        "The kernel is that of a few random projections of the features, an unbiased "
        "estimate of the trace over all of them.",
        "Weight decay acts on the whole weights, as in the original, not on their "
        "distance from the base.",
    ),
)


def build(config: ConfigDict) -> zoo.PostHoc:
    """Addition in weight space and in tangent space; then the diagnostics."""
    scales = tuple(config.study.scales)

    def add(name, **options) -> zoo.SharedModel:
        return zoo.SharedModel(
            name=name,
            delta=lambda taus, _: merging.task_arithmetic(taus),
            scales=scales,
            **options,
        )

    rows = (
        zoo.zero_shot(),
        zoo.individual(),
        zoo.individual("fine-tuned (linear)", experts="linear", linear=True),
        zoo.individual("fine-tuned (post-hoc)", linear=True),
        add("addition"),
        add("addition (linear)", experts="linear", linear=True),
        add("addition (post-hoc)", linear=True),
    )
    return zoo.PostHoc(
        rows=rows, analyses=(_advantage, _negation, _disentanglement, _localisation)
    )


def _advantage(study) -> None:
    """What leaving the tangent space gains per task, and the claim about addition."""
    results = study.results
    classes = np.array([task.num_classes for task in study.zoo.tasks])
    gain = linearize.nonlinear_advantage(
        results["fine-tuned"].accuracy, results["fine-tuned (linear)"].accuracy, classes
    )
    study.report.add_table(
        report.Table(
            title="Non-linear advantage",
            columns=("task", "classes", "advantage"),
            rows=tuple(zip(study.names, classes, gain, strict=True)),
            formats={"advantage": "+.1%"},
            caption="(accuracy - accuracy of the linear expert) / (1 - 1 / classes)",
        )
    )
    plain, linear = (
        float(results[name].normalised.mean())
        for name in ("addition", "addition (linear)")
    )
    study.claim(
        "Linear task vectors add better than ordinary ones",
        f"{linear:.1%} against {plain:.1%} normalised accuracy",
        linear > plain,
    )
    # Without normalisation: post-hoc experts are worse than the ordinary ones.
    plain, posthoc = (
        float(results[name].accuracy.mean())
        for name in ("addition", "addition (post-hoc)")
    )
    study.claim(
        "Linearising ordinary experts afterwards does not beat ordinary addition",
        f"{posthoc:.1%} against {plain:.1%} accuracy",
        posthoc <= plain + 0.01,
    )


def _negation(study) -> None:
    """Forget one task at a time while a control task keeps 95% of its accuracy."""
    config, evaluator = study.config.study, study.evaluator
    control = study.names.index(config.control)
    targets = [t for t in range(len(study.names)) if t != control]
    rows, means = [], {}
    with study.progress.task("negation", total=2 * len(targets)) as bar:
        for kind, linear in (("standard", False), ("linear", True)):
            left = []
            for t in targets:
                one = jax.tree.map(lambda x, t=t: x[t : t + 1], study.taus[kind])
                delta = merging.negate(one)

                def accurate(scale, task, split, delta=delta, linear=linear):
                    model = study.move(delta, scale)
                    return evaluator.accuracy(model, task, split, linear=linear)

                def both(scale, f=accurate, t=t):
                    return f(scale, t, "validation"), f(scale, control, "validation")

                found = merging.scale_search(
                    both, config.negation_scales, objective="min", constraint=0.95
                )
                before = accurate(0.0, t, "test")
                after = accurate(found.scale, t, "test")
                kept = accurate(found.scale, control, "test")
                left.append(after)
                rows.append((study.names[t], kind, found.scale, before, after, kept))
                bar.advance(task=study.names[t])
            means[kind] = float(np.mean(left))
    study.report.add_table(
        report.Table(
            title=f"Negation (control: {config.control})",
            columns=("target", "experts", "scale", "before", "after", "control after"),
            rows=tuple(rows),
            formats=dict.fromkeys(("before", "after", "control after"), ".1%"),
        )
    )
    study.claim(
        "Linear task vectors forget more of the target at equal control",
        f"target accuracy {means['linear']:.1%} against {means['standard']:.1%}",
        means["linear"] < means["standard"],
    )


def _disentanglement(study) -> None:
    """Error maps of one pair of tasks, in weight space and in tangent space."""
    config, evaluator = study.config.study, study.evaluator
    a, b = (study.names.index(name) for name in config.pair)
    alphas = list(config.alphas)
    centre = {}
    for kind, linear in (("standard", False), ("linear", True)):
        with study.progress.task(f"disentanglement ({kind})"):
            error = linearize.disentanglement_error(
                (evaluator.logits_of(a, linear), evaluator.logits_of(b, linear)),
                study.zoo.base,
                zoo.task_delta(study.taus[kind], a),
                zoo.task_delta(study.taus[kind], b),
                evaluator.rows(a, "validation"),
                evaluator.rows(b, "validation"),
                alphas,
            )
        centre[kind] = float(error[-1, -1])
        study.report.add_figure(
            f"Disentanglement error ({kind} experts)",
            report.Heatmap(
                rows=[f"{a:g}" for a in alphas],
                columns=[f"{a:g}" for a in alphas],
                values=error.tolist(),
                value_range=(0.0, 2.0),
            ),
            caption=f"Coefficients of {config.pair[0]} (down) and {config.pair[1]}.",
        )
    study.claim(
        f"Linear experts are better disentangled, error at scales {alphas[-1]:g}",
        f"{centre['linear']:.3f} against {centre['standard']:.3f}",
        centre["linear"] < centre["standard"],
    )


def _localisation(study) -> None:
    """Do the base's kernel eigenfunctions live on the inputs of one task?"""
    config, encoder = study.config.study, study.zoo.encoder
    pair = [study.names.index(name) for name in config.pair]
    inputs = [study.evaluator.rows(t, "test", config.kernel_inputs)[0] for t in pair]
    width = study.zoo.tasks[0].head["prototypes"].shape[-1]
    key = jax.random.key(config.seed)
    signs = jax.random.rademacher(key, (width, config.kernel_probes), np.float32)

    def project(trained, batch):
        features = encoder.features(study.evaluator.whole(trained), batch)
        unit = heads.l2_normalize(features)
        return jnp.matmul(unit, signs / config.kernel_probes**0.5, precision="highest")

    with study.progress.task("kernel localisation"):
        found = linearize.ntk_localisation(project, study.zoo.base, inputs)
    top = np.asarray(found.energy[:10])
    study.report.add_table(
        report.Table(
            title="Tangent kernel of the base: where its first eigenfunctions live",
            columns=("eigenvalue", *config.pair),
            rows=tuple(
                (float(value), *map(float, row))
                for value, row in zip(found.eigenvalues[:10], top, strict=False)
            ),
            formats=dict.fromkeys(config.pair, ".1%"),
            caption=f"Localisation score {float(found.score):.3f} "
            "(0: spread evenly, 1: each on one task).",
        )
    )
