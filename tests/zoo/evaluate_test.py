import dataclasses

import jax
import numpy as np
import pytest

from mtl_jax import tree, zoo


def _manual(world, trained, task):
    """Accuracy by NumPy, from the features up."""
    encoder, data = world.encoder, world.tasks[task]
    features = np.asarray(encoder.features(trained, data.splits["test"]))
    scores = features @ np.asarray(data.head["prototypes"]).T
    return float(np.mean(scores.argmax(1) == data.splits["test"]["label"]))


def test_accuracy_counts_every_row_once(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    for task, expert in enumerate(tiny_zoo.experts["standard"]):
        found = evaluator.accuracy(expert, task, "test")
        assert found == pytest.approx(_manual(tiny_zoo, expert, task))


def test_answers_are_remembered_by_content(tiny_zoo, quiet):
    first = zoo.Evaluator(tiny_zoo, progress=quiet)
    want = first.accuracies(tiny_zoo.base, "validation")
    with open(tiny_zoo.folder / "evaluations.jsonl", "a") as file:
        file.write('{"cut sho')
    with open(tiny_zoo.folder / "evaluations.jsonl", "ab") as file:
        file.write(
            b'\n[1, 2]\n3\n"x"\nnull\n\xff\xfe\n{"k": "x", "j": NaN, "i": 7.0}\n'
        )
    second = zoo.Evaluator(tiny_zoo, progress=quiet)
    assert second.accuracies(tiny_zoo.base, "validation") == want
    assert second.computed == 0 and not {"k", "j", "i"} & set(second._known)
    moved = tree.add_scaled(tiny_zoo.base, tiny_zoo.base, 0.5)
    second.accuracies(moved, "validation")
    assert second.computed == 3


def test_tangent_sweep_equals_one_model_at_a_time(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    expert = tiny_zoo.experts["linear"][0]
    delta = jax.tree.map(lambda a, b: a - b, expert, tiny_zoo.base)
    scales = (0.0, 0.5, 1.0)
    swept = evaluator.tangent_accuracies(delta, scales, 0, "test")
    for scale, found in zip(scales, swept, strict=True):
        model = tree.add_scaled(tiny_zoo.base, delta, scale)
        want = evaluator.accuracy(model, 0, "test", linear=True)
        assert found == pytest.approx(want, abs=1 / 32)


def test_tangent_space_meets_weight_space_at_the_base(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    plain = evaluator.predict(tiny_zoo.base, 0, "test")
    linear = evaluator.predict(tiny_zoo.base, 0, "test", linear=True)
    np.testing.assert_array_equal(plain, linear)


def test_answers_belong_to_one_base(tiny_zoo, tmp_path, quiet):
    """The same leaves in the tangent space of another base are another model."""
    here = dataclasses.replace(tiny_zoo, folder=tmp_path)
    expert = here.experts["linear"][0]
    want = zoo.Evaluator(here, progress=quiet).accuracy(expert, 0, "test", linear=True)
    moved = tree.add_scaled(here.base, here.base, 0.5)
    encoder = dataclasses.replace(here.encoder, params=moved)
    other = zoo.open_zoo(
        encoder, here.tasks[:1], here.settings, folder=tmp_path, progress=quiet
    )
    assert other.identity != here.identity
    evaluator = zoo.Evaluator(other, progress=quiet)
    evaluator.accuracy(expert, 0, "test", linear=True)
    assert evaluator.computed == 1
    again = zoo.Evaluator(here, progress=quiet)
    assert again.accuracy(expert, 0, "test", linear=True) == want
    assert again.computed == 0


def test_rows_come_once_and_batches_are_padded(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    (padded,) = evaluator.batches(0, "test")
    (rows,) = evaluator.rows(0, "test")
    assert padded["label"].shape == (64,) and rows["label"].shape == (32,)
    np.testing.assert_array_equal(padded["label"][:32], rows["label"])
    assert evaluator.rows(0, "test", 5)[0]["label"].shape == (5,)


def test_models_that_are_not_finite_have_no_accuracy(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    broken = jax.tree.map(lambda x: x * np.nan, tiny_zoo.base)
    with pytest.raises(ValueError, match="not finite on the test rows of 'task0'"):
        evaluator.accuracy(broken, 0, "test")
