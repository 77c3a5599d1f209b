"""Merges of sharded task vectors: the same numbers, and no leaf is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtl_jax import merging, tree

METHODS = {
    "ties": lambda taus: merging.ties(taus, density=0.3),
    "breadcrumbs": lambda taus: merging.breadcrumbs(taus, density=0.3, drop_top=0.1),
    "consensus": lambda taus: merging.consensus(taus, scale=0.4),
    "gram": lambda taus: {"gram": tree.gram(taus)},
    "model_stock": merging.model_stock,
    "multislerp": merging.multislerp,
    "karcher": merging.karcher,
    "magmax": merging.magmax,
    "emr": lambda taus: merging.emr(taus)._asdict(),
    "ram_plus": merging.ram_plus,
    "sce": lambda taus: merging.sce(taus, density=0.3),
    "fisher": lambda taus: merging.fisher(taus, jax.tree.map(jnp.abs, taus)),
    "pcb": lambda taus: merging.pcb(taus, density=0.3),
    "trust_region": lambda taus: merging.trust_region(taus, density=0.7),
}


@pytest.fixture
def taus():
    keys = jax.random.split(jax.random.key(0), 3)
    # Halves, so that magnitudes tie and the cutoff has to break ties across shards.
    return {
        "kernel": jnp.round(4 * jax.random.normal(keys[0], (3, 32, 24))) / 2,
        "bias": jax.random.normal(keys[1], (3, 16)),
        # The shape of the kernel, split the other way round: what is equal for both,
        # such as a scalar spread over them, must not be shared.
        "out": jax.random.normal(keys[2], (3, 32, 24)),
    }


@pytest.mark.parametrize("name", METHODS)
def test_sharded_equals_unsharded_without_gathering_a_leaf(name, taus):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    if name == "sce":
        # Variances of permuted halves tie but for their rounding: no order is right.
        taus["kernel"] = jax.random.normal(jax.random.key(1), (3, 32, 24))
    # Rows of breadcrumbs are whole: the last axis is not sharded there.
    last = None if name == "breadcrumbs" else "model"
    spec = {
        "kernel": PartitionSpec(None, "data", last),
        "bias": PartitionSpec(None, last),
        "out": PartitionSpec(None, "model", last and "data"),
    }
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), taus, spec
    )
    step = jax.jit(METHODS[name])
    compiled = step.lower(placed).compile()
    for a, b in zip(
        jax.tree.leaves(compiled(placed)),
        jax.tree.leaves(METHODS[name](taus)),
        strict=True,
    ):
        # Norms and weights are sums over shards here, over the whole there.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]*? all-gather\(", compiled.as_text())
    sizes = [int(np.prod([int(d) for d in g.split(",") if d])) for g in gathered]
    assert max(sizes, default=0) < taus["bias"][0].size, sizes
