"""What AdaMerging learns from, and where its coefficients stay."""

import dataclasses

import jax
import numpy as np
import pytest

from mtl_jax import configs, merging, tree, zoo
from mtl_jax.systems import adamerging

CONFIG = "experiments/configs/adamerging.py:tiny"


@pytest.fixture(scope="module")
def study():
    return configs.load_config(CONFIG, {"study.fast_rate": 0.2}).study


def material_of(world, quiet):
    return zoo.Material(zoo.Evaluator(world, remember=False, progress=quiet))


def learn(world, quiet, study, kind="leaf"):
    material = material_of(world, quiet)
    taus = merging.task_vectors(world.base, world.experts["standard"])
    rows = [material.inputs("test", task) for task in range(3)]
    options = {"kind": kind, "rate": study.fast_rate, "rows": rows}
    return adamerging.learn(taus, material, study, **options)


@pytest.fixture(scope="module")
def trace(tiny_zoo, quiet, study):
    return learn(tiny_zoo, quiet, study)


def test_labels_never_reach_the_loss(tiny_zoo, quiet, study, trace):
    """Permuted labels leave losses and coefficients bit-identical."""
    turned = tuple(
        dataclasses.replace(
            task,
            splits={
                split: {
                    **rows,
                    "label": np.random.default_rng(0).permutation(rows["label"]),
                }
                for split, rows in task.splits.items()
            },
        )
        for task in tiny_zoo.tasks
    )
    other = dataclasses.replace(tiny_zoo, tasks=turned)
    found = learn(other, quiet, study)
    np.testing.assert_array_equal(found.losses, trace.losses)
    jax.tree.map(np.testing.assert_array_equal, found.variables, trace.variables)


def test_losses_are_entropies(tiny_zoo, quiet, study, trace):
    assert (trace.losses >= 0).all()
    for task, data in enumerate(tiny_zoo.tasks):
        assert (trace.losses[:, task] <= np.log(data.num_classes) + 1e-5).all()


def test_deployed_coefficients_stay_in_their_range(tiny_zoo, trace):
    taus = merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])
    wild = jax.tree.map(lambda c: 40 * (c - 0.3), trace.variables)
    raw = np.concatenate([np.asarray(x) for x in jax.tree.leaves(wild)])
    assert raw.min() < 0 and raw.max() > 1
    clipped = jax.tree.map(lambda c: np.clip(c, 0, 1), wild)
    jax.tree.map(
        np.testing.assert_array_equal,
        adamerging._delta(taus, wild),
        merging.combine(taus, clipped),
    )


def test_where_it_starts_is_task_arithmetic(tiny_zoo, study):
    taus = merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])
    start = merging.init_coefficients(taus, study.start)
    plain = merging.task_arithmetic(taus)
    want = tree.add_scaled(tiny_zoo.base, plain, study.start)
    found = tree.add_scaled(tiny_zoo.base, adamerging._delta(taus, start))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, want
    )


def test_cleaned_vectors_are_sparse_and_of_one_sign(tiny_zoo, study):
    taus = merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])
    found = merging.ties_select(taus, density=study.density)
    flat = np.concatenate(
        [np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(found)], axis=1
    )
    assert ((flat != 0).sum(1) <= study.density * flat.shape[1]).all()
    assert not ((flat > 0).any(0) & (flat < 0).any(0)).any()
    assert (flat != 0).any(1).all()


@pytest.mark.fast
def test_rows_see_no_labels():
    for row in adamerging.build(configs.load_config(CONFIG)).rows:
        assert not getattr(row, "labels", False)
