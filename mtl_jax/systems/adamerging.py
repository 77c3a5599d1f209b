"""AdaMerging: merging coefficients learned from the entropy of predictions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mtl_jax import losses, zoo
from mtl_jax.catalog import SystemSpec
from mtl_jax.transforms import merging

SPEC = SystemSpec(
    name="adamerging",
    title="AdaMerging: Adaptive Model Merging for Multi-Task Learning",
    year=2023,
    family="merging",
    kind="posthoc",
    summary=(
        "Learns one merging coefficient per task, or per task and layer, by minimising "
        "prediction entropy on unlabelled inputs."
    ),
    reference="""@inproceedings{adamerging,
  title = {{AdaMerging: Adaptive Model Merging for Multi-Task Learning}},
  author = {Yang, Enneng and Wang, Zhenyi and Shen, Li and Liu, Shiwei and
            Guo, Guibing and Wang, Xingwei and Tao, Dacheng},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2310.02575},
  archiveprefix = {arXiv}
}""",
    uses=(
        "losses.softmax_entropy",
        "merging.combine",
        "merging.init_coefficients",
        "merging.task_arithmetic",
        "merging.ties_select",
    ),
    deviations=(
        "One batch of 32 inputs per task and step, where the authors add the means of "
        "two batches of 16.",
        "A learning rate of 1e-2 is tried beside the authors' 1e-3.",
        "The ++ variants keep exactly a fifth of each task vector; the authors' "
        "threshold keeps what ties with it.",
        "Noise on inputs stands in for the paper's corruptions.",
    ),
)


RULES = {  # name: layout, learning rate, ++, split of the inputs
    "task-wise": ("task", "rate", False, "test"),
    "layer-wise": ("leaf", "rate", False, "test"),
    "layer-wise, faster": ("leaf", "fast_rate", False, "test"),
    "layer-wise, held out": ("leaf", "fast_rate", False, "validation"),
    "task-wise++": ("task", "rate", True, "test"),
    "layer-wise++": ("leaf", "rate", True, "test"),
}


def _clipped(coeffs):
    return jax.tree.map(lambda c: jnp.clip(c, 0, 1), coeffs)


def _delta(taus, coeffs):
    """What is added to the base; coefficients as they are deployed."""
    return merging.combine(taus, _clipped(coeffs))


def learn(taus, material, study, *, kind, rate, rows, tasks=None) -> zoo.Trace:
    """Descends on the sum over tasks of the mean entropy of batches of inputs.

    Args:
      taus: of the tasks that are merged, leaves [T, ...].
      material: the model.
      study: settings.
      kind: "task" or "leaf".
      rate: learning rate.
      rows: inputs of each task.
      tasks: whose heads; all by default.
    """

    def entropy(logits, inputs, task):
        return jnp.mean(losses.softmax_entropy(logits(inputs), task["head"]["active"]))

    recipe = zoo.Recipe(
        steps=study.steps,
        batch_size=study.batch_size,
        optimizer={"name": "adam", "peak": rate, "decay": False},
        seed=study.seed,
        chunk=study.chunk,
    )
    run = zoo.coefficients(material, entropy, recipe, spread=_clipped)
    start = merging.init_coefficients(taus, study.start, kind=kind)
    return run(taus, start, recipe.batches(rows), {"head": material.heads(tasks)})


def _row(name, study) -> zoo.LearnedModel:
    kind, rate, plus, split = RULES[name]

    def fit(taus, chosen, material):
        del chosen
        if plus:
            taus = merging.ties_select(taus, density=study.density)
        rows = [material.inputs(split, task) for task in range(material.count)]
        trace = learn(taus, material, study, kind=kind, rate=study[rate], rows=rows)
        return zoo.Fit(delta=_delta(taus, trace.variables), details={"trace": trace})

    return zoo.LearnedModel(name=name, fit=fit)


def build(config: ConfigDict) -> zoo.PostHoc:
    """The paper's comparison, then what it says of entropy, unseen tasks and noise."""
    study = config.study
    fixed = zoo.SharedModel(
        name=f"task arithmetic at {study.start:g}",
        delta=lambda taus, _: merging.task_arithmetic(taus),
        scales=(study.start,),
    )
    plain = zoo.baselines(tuple(study.scales), tuple(study.sparse_scales))
    rows = (*plain, fixed, *(_row(name, study) for name in study.rules))
    return zoo.PostHoc(
        rows=rows,
        analyses=(_claims, _insight, _changed),
    )


def _claims(study) -> None:
    """What the paper says of accuracy."""
    score = {name: float(r.accuracy.mean()) for name, r in study.results.items()}
    start = f"task arithmetic at {study.config.study.start:g}"
    for better, worse, margin in (
        ("layer-wise", start, 0.015),
        ("layer-wise", "task-wise", 0.0),
        ("layer-wise, faster", "task arithmetic", 0.0),
        ("layer-wise++", "TIES", 0.0),
    ):
        if better in score and worse in score:
            gain = score[better] - score[worse]
            by = f" by {100 * margin:g} points" if margin else ""
            text = f"{better} beats {worse}{by}"
            study.claim(text, f"{gain:+.1%} accuracy", gain > 0 and gain >= margin)


def _insight(study) -> None:
    """The course of learning, and whether entropy is to be trusted."""
    config, taus = study.config.study, study.taus["standard"]
    traces = {name: study.results[name].details["trace"] for name in config.rules}
    models = {
        name: lambda coeffs: study.move(_delta(taus, coeffs))
        for name in config.rules
        if not RULES[name][2]  # The cleaned vectors are not kept.
    }
    falls = zoo.diagnostics.add_course(study, traces, models)["layer-wise"]
    study.claim(
        f"Entropy falls from every {config.chunk} steps to the next (layer-wise)",
        f"{falls[0]:.3f} to {falls[-1]:.3f} nats",
        all(b < a for a, b in itertools.pairwise(falls)),
    )
    start = study.move(merging.task_arithmetic(taus), config.start)
    rank = zoo.diagnostics.add_entropy(study, start)
    study.claim(
        "Entropy orders rows as cross-entropy does (rank correlation above 0.5)",
        f"{rank:.2f}",
        rank > 0.5,
    )
    learned = traces["layer-wise"].variables
    ends = {"where it starts": start, "layer-wise": models["layer-wise"](learned)}
    zoo.diagnostics.add_shares(study, ends)
    title = "Coefficients (layer-wise)"
    zoo.diagnostics.add_coefficients(study, title, _clipped(learned))


def _changed(study) -> None:
    """Tasks that were not merged, and noise on the inputs that are adapted to."""
    config, taus = study.config.study, study.taus["standard"]
    material, count = zoo.Material(study.evaluator), len(study.names)
    clean = [material.inputs("test", task) for task in range(count)]
    keys = jax.random.split(jax.random.key(config.seed), count)
    noisy = [
        jax.tree.map(np.asarray, zoo.perturb(rows, key, config.noise))
        for rows, key in zip(clean, keys, strict=True)
    ]
    seen = list(range(count - config.unseen))
    whole, rows = list(range(count)), []
    for name, merged_tasks, inputs, judged in (
        (f"{config.unseen} unseen tasks", seen, clean, whole[len(seen) :]),
        (f"noise of {config.noise:g}", whole, noisy, whole),
    ):
        part = jax.tree.map(lambda x, index=merged_tasks: x[jnp.array(index)], taus)
        trace = learn(
            part,
            material,
            config,
            kind="leaf",
            rate=config.fast_rate,
            rows=[inputs[task] for task in merged_tasks],
            tasks=merged_tasks,
        )
        fixed = merging.init_coefficients(part, config.start, kind="task")
        found = []
        for coeffs in (fixed, trace.variables):
            model = study.move(_delta(part, coeffs))
            right = [
                material.predict(model, t, inputs[t])
                == study.zoo.tasks[t].splits["test"]["label"]
                for t in judged
            ]
            found.append(float(np.mean([np.mean(r) for r in right])))
        rows.append((name, *found))
        gain = found[1] - found[0]
        text = f"layer-wise, faster beats task arithmetic: {name}"
        study.claim(text, f"{gain:+.1%} accuracy", gain > 0)
    columns = (
        "tested on",
        f"task arithmetic at {config.start:g}",
        "layer-wise, faster",
    )
    zoo.diagnostics.add_table(study, "Other tasks, and noise", columns, rows)
