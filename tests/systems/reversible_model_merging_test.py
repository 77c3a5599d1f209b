"""Reversible model merging: which sizes are compared, at which storage."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import configs, merging
from mtl_jax.systems import reversible_model_merging as system

pytestmark = pytest.mark.fast
CONFIG = pathlib.Path(__file__).parents[2] / (
    "experiments/configs/reversible_model_merging.py"
)


@pytest.mark.parametrize(("rank", "tasks", "p"), [(16, 8, 3), (8, 8, 2), (16, 3, 0)])
def test_the_largest_basis_within_seven_tenths(rank, tasks, p):
    assert system._largest(rank, tasks) == p
    assert merging.rmm_cost(rank, tasks, p) <= 0.7
    assert merging.rmm_cost(rank, tasks, p + 1) > 0.7


@pytest.fixture(scope="module")
def taus():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 40, 24)) @ np.diag(0.7 ** np.arange(24))
    return {
        "dense": {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.ones((8, 24)),
        }
    }


def test_rivals_take_no_more_room(taus):
    rows = system.build(configs.load_config(f"{CONFIG}:world", {})).rows
    by_name = {row.name: row for row in rows}
    bits = {}
    for name in (
        "adapters",
        "RMM at 0.7",
        "RMM at 0.7, by layer",
        "RMM at 0.7, aligned",
        "adapters of less rank",
        "adapters in NF4",
    ):
        by_name[name].prepare(taus, {})
        bits[name] = by_name[name].bits(8, 0, 0)
    ours = bits["RMM at 0.7"]
    assert ours / bits["adapters"] == pytest.approx(merging.rmm_cost(16, 8, 3))
    assert bits["RMM at 0.7, aligned"] == ours
    assert bits["RMM at 0.7, by layer"] <= 0.7 * bits["adapters"]
    assert bits["adapters of less rank"] <= ours
    # 4 bits and a scale for every 64, on rows that fill their blocks in part.
    assert bits["adapters in NF4"] < 0.4 * bits["adapters"]


def test_what_is_quantised_comes_back_close(taus):
    rows = system.build(configs.load_config(f"{CONFIG}:world", {})).rows
    by_name = {row.name: row for row in rows}
    found = {}
    for name in ("adapters", "adapters in NF4", "adapters of less rank"):
        row = by_name[name]
        found[name] = row.delta(row.prepare(taus, {}), 1, 1.0)["dense"]["kernel"]
    size = jnp.linalg.norm(found["adapters"])
    for name, least, most in (
        ("adapters in NF4", 1e-3, 0.15),
        ("adapters of less rank", 1e-4, 0.05),
    ):
        off = jnp.linalg.norm(found[name] - found["adapters"]) / size
        assert least < off < most


def test_factors_apart_are_products_of_means(taus):
    rows = system.build(configs.load_config(f"{CONFIG}:world", {})).rows
    row = next(row for row in rows if row.name == "factors apart: TA")
    got = row.delta(taus, {})["dense"]["kernel"]
    x = np.asarray(taus["dense"]["kernel"], np.float64)
    loras = merging.lora_from_taus(taus, rank=16)
    a, b = (
        np.mean([np.asarray(each["dense"]["kernel"][k]) for each in loras], 0)
        for k in "ab"
    )
    np.testing.assert_allclose(got, a @ b, atol=1e-4)
    # Not the mean of the products: what the two have in common collapses.
    assert np.linalg.norm(got) < 0.6 * np.linalg.norm(x.mean(0))


def test_trained_adapters_have_no_rows_of_whole_products():
    rows = system.build(configs.load_config(f"{CONFIG}:lora", {})).rows
    names = [row.name for row in rows]
    assert "RMM at 0.7" in names and "factors apart: TIES" in names
    assert not [name for name in names if "products" in name or "rank" in name]
    assert jax.tree.leaves(rows)  # Rows are plain objects, not trees of arrays.
