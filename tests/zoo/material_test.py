"""What merges that learn may see, and what they may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import zoo
from mtl_jax.zoo import material as material_lib


@pytest.fixture(scope="module")
def evaluator(tiny_zoo, quiet):
    return zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)


def test_labels_stay_away_from_rows_that_do_not_ask(evaluator):
    blind = zoo.Material(evaluator)
    assert set(blind.inputs("test", 0)) == {"inputs"}
    (batch,) = blind.batches("test", steps=1, batch_size=4, seed=0)
    assert set(batch) == {"inputs"}
    with pytest.raises(ValueError, match="labels=False"):
        blind.labelled("validation", 0)
    with pytest.raises(ValueError, match="labels=False"):
        next(blind.batches("train", steps=1, batch_size=4, seed=0, labels=True))
    with pytest.raises(ValueError, match="test rows keep their labels"):
        zoo.Material(evaluator, labels=True).labelled("test", 0)


def test_few_rows_have_the_same_number_of_every_class(evaluator):
    material = zoo.Material(evaluator, labels=True)
    every = material.labelled("train", 1)
    few = material.labelled("train", 1, per_class=2, seed=3)
    total = np.bincount(every["label"], minlength=10)
    np.testing.assert_array_equal(
        np.bincount(few["label"], minlength=10), np.minimum(total, 2)
    )
    again = material.labelled("train", 1, per_class=2, seed=3)
    np.testing.assert_array_equal(few["inputs"], again["inputs"])
    other = material.labelled("train", 1, per_class=2, seed=4)
    assert not np.array_equal(few["inputs"], other["inputs"])
    own = zip(every["inputs"], every["label"], strict=True)
    rows = {x.tobytes(): label for x, label in own}
    for x, y in zip(few["inputs"], few["label"], strict=True):
        assert rows[x.tobytes()] == y


def test_logits_are_those_of_the_evaluator(evaluator, tiny_zoo):
    for linear in (False, True):
        material = zoo.Material(evaluator, linear=linear)
        inputs = jax.tree.map(jnp.asarray, material.inputs("test", 2))
        head = jax.tree.map(lambda x: x[2], material.heads())
        expert = tiny_zoo.experts["linear" if linear else "standard"][0]
        found = material.logits(expert, inputs, head, material.args)
        want = evaluator.logits_of(2, linear)(expert, inputs)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
        classes = material.predict(expert, 2, inputs)
        np.testing.assert_array_equal(classes, np.argmax(found, -1))
    assert material.heads([2, 0])["active"].shape == (2, 10)


def test_an_epoch_shows_every_row_once_and_chunks_change_nothing():
    rows = [{"x": np.arange(6)[:, None] + 10 * t} for t in range(2)]
    options = {"steps": 6, "batch_size": 2, "seed": 1}
    (whole,) = material_lib.stacks(rows, **options)
    assert whole["x"].shape == (6, 2, 2, 1)
    for task in range(2):
        for epoch in (whole["x"][:3, task], whole["x"][3:, task]):
            assert sorted(epoch.ravel() - 10 * task) == list(range(6))
    parts = list(material_lib.stacks(rows, **options, chunk=4))
    assert [len(part["x"]) for part in parts] == [4, 2]
    np.testing.assert_array_equal(np.concatenate([p["x"] for p in parts]), whole["x"])


def test_texts_are_padded_and_nothing_else_is():
    rows = [{"ids": np.ones((3, n), np.int32)} for n in (2, 5)]
    (found,) = material_lib.stacks(rows, steps=1, batch_size=3, seed=0)
    assert found["ids"].shape == (1, 2, 3, 5)
    assert found["ids"][0, 0].sum() == 6 and found["ids"][0, 1].sum() == 15
    images = [{"image": np.ones((3, n, n))} for n in (2, 5)]
    with pytest.raises(ValueError, match="'image' has rows of"):
        next(material_lib.stacks(images, steps=1, batch_size=1, seed=0))
    with pytest.raises(ValueError, match="task 1 has no rows"):
        next(
            material_lib.stacks(
                [rows[0], {"ids": np.ones((0, 2))}], steps=1, batch_size=1, seed=0
            )
        )
    with pytest.raises(ValueError, match="at least 1"):
        next(material_lib.stacks(rows, steps=0, batch_size=1, seed=0))
