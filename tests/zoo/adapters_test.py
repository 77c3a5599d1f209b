"""Adapters of experts: cut, trained, kept and counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import adapters, merging, tree, zoo


@pytest.fixture(scope="module")
def taus(tiny_zoo):
    return merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])


def test_cut_adapters_add_the_best_product_to_kernels_alone(taus):
    make = zoo.Adapters(2)
    loras = make(taus)
    assert make(taus) is loras  # Made once.
    products = make.products(taus)
    for name, tau, found in zip(
        tree.paths(taus),
        jax.tree.leaves(taus),
        jax.tree.leaves(products),
        strict=True,
    ):
        assert found.shape == tau.shape
        if not name.endswith("kernel"):
            assert not found.any()
            continue
        for x, y in zip(np.asarray(tau, np.float64), found, strict=True):
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            np.testing.assert_allclose(y, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


def test_rows_count_what_they_keep(taus):
    make, count = zoo.Adapters(4), tree.num_tasks("test", taus)

    def bits(store):
        row = make.row("any", store, lambda kept, task: kept[task])
        row.prepare(taus, {})
        return row.bits(count, 100, 10)

    whole = 32 * sum(x.size for x in jax.tree.leaves(make(taus)))
    assert bits(list) == 32 * 110 + whole
    halves = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in make(taus)]
    assert bits(lambda loras: halves) == 32 * 110 + whole // 2
    banks = [merging.rmm_basis(make(taus), p) for p in (0, 1)]
    for p, bank in enumerate(banks):
        cost = merging.rmm_cost(4, count, p)
        assert bits(lambda loras, b=bank: b) == 32 * 110 + round(cost * whole)


def test_a_row_brings_adapters_back(taus):
    make = zoo.Adapters(3)
    row = make.row("RMM", lambda x: merging.rmm_basis(x, 2), merging.rmm_restore)
    state = row.prepare(taus, {})
    wanted = make.products(taus)
    for task in range(3):  # Two vectors span three tasks.
        found = row.delta(state, task, 1.0)
        want = zoo.task_delta(wanted, task)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want
        )


def test_trained_adapters_start_at_the_base_and_train_alone(
    tiny_suite, quiet, tmp_path
):
    encoder, tasks = tiny_suite
    small = zoo.adapted(encoder, rank=2, alpha=4.0)
    rows = {"inputs": jnp.asarray(tasks[0].splits["test"]["inputs"][:4])}
    np.testing.assert_allclose(
        small.features(small.params, rows),
        encoder.features(encoder.params, rows),
        atol=1e-6,
    )
    settings = zoo.Settings(
        steps=5,
        batch_size=16,
        optimizer={"name": "adam", "peak": 1e-2, "decay": False},
        logit_scale=16.0,
        seed=0,
    )
    opened = zoo.open_zoo(small, tasks[:2], settings, folder=tmp_path, progress=quiet)
    taus = merging.task_vectors(opened.base, opened.experts["standard"])
    assert not jax.tree.leaves(taus["base"])
    make = zoo.Adapters()
    assert all(x.any() for x in jax.tree.leaves(make(taus)))
    # Base and difference of factors: the expert, and so its product.
    first = tree.add_scaled(
        opened.base, make.added(zoo.task_delta(taus, 0), make(taus)[0])
    )
    expert = opened.experts["standard"][0]
    product = adapters.lora.merge(encoder.params, expert["lora"], alpha=4.0)
    np.testing.assert_allclose(
        small.features({"base": encoder.params, **{"lora": first["lora"]}}, rows),
        encoder.features(product, rows),
        atol=1e-5,
    )
    row = make.row("all", list, lambda kept, task: kept[task])
    row.prepare(taus, {})
    kept = 32 * sum(x.size for x in jax.tree.leaves(make(taus)))
    assert row.bits(2, 7, 10) == 32 * 10 + kept  # Without the start of the adapters.
