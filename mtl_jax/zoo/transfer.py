"""Learning a target task from the task vectors of others, with few labels or none."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import losses
from mtl_jax.transforms import merging
from mtl_jax.zoo.learning import Recipe, Trace, coefficients
from mtl_jax.zoo.material import Material
from mtl_jax.zoo.views import perturb

How = Literal["blocks", "vectors", "random"]
Choose = Callable[[Any, int], Any]


def others(taus: Any, task: int) -> Any:
    """Task vectors without that of the target, which would be leakage."""
    return jax.tree.map(lambda x: jnp.delete(x, task, axis=0), taus)


def cross_entropy(logits: Any, batch: Any, task: Any) -> Any:
    """Mean over a batch, for `coefficients`; times the task's sign where it has one."""
    active = task["head"]["active"]
    found = losses.softmax_cross_entropy(logits(batch), batch["label"], active)
    return jnp.mean(found) * task.get("sign", 1.0)


def last_admissible(trials: Any, share: float = 0.95) -> int:
    """Index of the lowest target before the first trial that hurts the control.

    Args:
      trials: (target, control) accuracies along a run; the first is of the base.
      share: of the base's control accuracy that has to be kept.

    >>> last_admissible([(0.9, 0.8), (0.5, 0.79), (0.6, 0.78), (0.2, 0.5), (0.1, 0.8)])
    1
    """
    kept = []
    for target, control in trials:
        if control < share * trials[0][1]:
            break
        kept.append(target)
    return int(np.argmin(kept))


def best_point(
    material: Material, taus: Any, trace: Trace, task: int, split: str = "validation"
) -> Any:
    """Coefficients of a trace with the best accuracy on labelled rows of a task.

    The base, all zeros, is the first candidate: few labels can do harm.
    """
    rows = material.labelled(split, task)
    zero = jax.tree.map(jnp.zeros_like, trace.variables)
    points = [zero, *(coeffs for _, coeffs in trace.path)]
    right = []
    for coeffs in points:
        model = merging.compose(material.zoo.base, taus, coeffs)
        right.append(np.mean(material.predict(model, task, rows) == rows["label"]))
    return points[int(np.argmax(right))]


def few_shot(
    taus: Any,
    material: Material,
    recipe: Recipe,
    shots: int,
    choose: Choose | None = None,
) -> list[tuple[Any, Any]]:
    """Every task as a target, learned from `shots` training rows of each class.

    Args:
      taus: of all tasks.
      material: with labels.
      recipe: how; one compiled loop serves all targets.
      shots: k.
      choose: `choose(others, task) -> task tree`, a smaller choice of the others'.

    Returns:
      Per target the task vectors that were used and their coefficients.
    """
    run, found = coefficients(material, cross_entropy, recipe), []
    for task in range(material.count):
        rest = others(taus, task)
        rest = choose(rest, task) if choose else rest
        rows = material.labelled("train", task, per_class=shots, seed=recipe.seed)
        start = merging.init_coefficients(rest)
        head = {"head": material.heads([task])}
        trace = run(rest, start, recipe.batches([rows]), head)
        # Rows that are used again need not be kept: they are chosen from `taus`.
        found.append((rest, best_point(material, rest, trace, task)))
    return found


def chooser(material: Material, budget: int, how: How, shots: int, seed: int) -> Choose:
    """Keeps as many of the others' vectors as a budget allows.

    Args:
      material: with labels.
      budget: b.
      how: "blocks", for every leaf the b vectors of the largest slope of the loss at
        the base; "vectors", the b largest over all leaves; "random", any b.
      shots: training rows of each class for the slopes.
      seed: of rows and of random choices.
    """

    @jax.jit
    def slopes(rest, base, batch, head, args):
        def loss(params):
            logits = material.logits(params, batch, head, args)
            return jnp.mean(losses.softmax_cross_entropy(logits, batch["label"]))

        return merging.coefficient_grads(rest, jax.grad(loss)(base))

    def choose(rest, task):
        if how == "random":
            count = material.count - 1
            order = np.random.default_rng((seed, task)).permutation(count)
            found = jax.tree.map(lambda _: jnp.asarray(order, jnp.float32), rest)
        else:
            rows = material.labelled("train", task, per_class=shots, seed=seed)
            head = dict(material.zoo.tasks[task].head)
            found = slopes(rest, material.zoo.base, rows, head, material.args)
        scope = "leaf" if how == "blocks" else "global"
        blocks = merging.select_blocks(found, budget, scope=scope)
        return merging.take_blocks(rest, blocks)

    return choose


def adapted(
    taus: Any, material: Material, recipe: Recipe, strengths: tuple[float, float]
) -> list[Any]:
    """Every task as a target, learned from its test inputs by unsupervised FixMatch.

    Args:
      taus: of all tasks.
      material: needs no labels.
      recipe: how; a quarter of each batch are trusted rows with zero-shot labels.
      strengths: of the weak and of the strong view; see `perturb`.

    Returns:
      Per target the coefficients of the others' vectors.
    """

    def loss(logits, batch, task):
        fields = ("draw", "known", "label")
        inputs = {name: x for name, x in batch.items() if name not in fields}
        key = jax.random.fold_in(jax.random.key(recipe.seed), batch["draw"])
        weak, strong = (
            logits(perturb(inputs, jax.random.fold_in(key, i), strength))
            for i, strength in enumerate(strengths)
        )
        active = task["head"]["active"]
        found, counts = losses.fixmatch(
            weak, strong, batch["label"], batch["known"], active
        )
        return losses.weighted_mean(found, counts)

    run, found = coefficients(material, loss, recipe), []
    for task in range(material.count):
        rest = others(taus, task)
        batches = _trusting(material, recipe, task)
        head = {"head": material.heads([task])}
        trace = run(rest, merging.init_coefficients(rest), batches, head)
        found.append(trace.variables)
    return found


def _trusting(material: Material, recipe: Recipe, task: int) -> Any:
    """Stacks of test inputs, a quarter of them trusted with their zero-shot label."""
    inputs = material.inputs("test", task)
    zero_shot = material.probabilities(material.zoo.base, task, inputs)
    rows, labels = losses.trusted(zero_shot)
    count, quarter = len(zero_shot), max(1, recipe.batch_size // 4)
    unknown = {"label": np.zeros(count, np.int32), "known": np.zeros(count, bool)}
    known = {"label": labels.astype(np.int32), "known": np.ones(len(rows), bool)}
    sure = {name: x[rows] for name, x in inputs.items()}
    draw = 0
    for one, other in zip(
        recipe.batches([inputs | unknown], recipe.batch_size - quarter),
        recipe.batches([sure | known], quarter),
        strict=True,
    ):
        stack = {name: np.concatenate([one[name], other[name]], 2) for name in one}
        steps = np.arange(draw, draw + len(stack["known"]), dtype=np.int32)
        draw += len(steps)
        yield stack | {"draw": steps[:, None]}
