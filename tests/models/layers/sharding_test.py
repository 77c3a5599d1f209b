import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax import models, tree
from mtl_jax.models.backbones import bert, mlp, vit
from mtl_jax.models.layers.sharding import without_axis

IDS = jnp.zeros((1, 4), jnp.int32)
IMAGE = jnp.zeros((1, 224, 224, 3))
CASES = {
    "minilm": ("minilm-l6", {}, IDS, bert.SHARDING_RULES),
    "minilm-scan": ("minilm-l6", {"scan": True}, IDS, bert.SHARDING_RULES),
    "vit-l/14": ("vit-l/14", {}, IMAGE, vit.SHARDING_RULES),
    "clip-scan": ("clip-vit-l/14", {"scan": True}, IMAGE, vit.SHARDING_RULES),
    "vit-mean": ("vit-b/32", {"pool": "mean"}, IMAGE, vit.SHARDING_RULES),
    "mlp": ("mlp", {"features": (16, 8)}, jnp.zeros((1, 8)), mlp.SHARDING_RULES),
}


def spec_of(path, rules):
    """The first match wins, as in the trainer."""
    return next((spec for regex, spec in rules if re.search(regex, path)), None)


def shards(spec, sizes):
    axes = [a for entry in spec for a in ((entry,) if isinstance(entry, str) else ())]
    return math.prod(sizes[a] for a in axes)


@pytest.mark.parametrize("case", CASES)
def test_rules_cover_every_leaf_and_divide_it(case):
    name, options, example, rules = CASES[case]
    module = models.build(name, **options)
    params = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    sizes = {"data": 4, "model": 2}
    whole = own = 0
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        spec = spec_of(path, rules)
        assert spec is not None, path
        assert len(spec) <= len(leaf.shape), path
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or size % sizes[axis] == 0, path
        whole += leaf.size
        own += leaf.size // shards(spec, sizes)
    if name != "mlp":  # The bulk is split over both axes; word embeddings over data.
        assert own / whole < (0.22 if "minilm" in case else 0.13)


def test_every_rule_is_used_by_some_case():
    used = set()
    for name, options, example, rules in CASES.values():
        module = models.build(name, **options)
        params = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
        for path in tree.paths(params):
            used.add(next(r for r, _ in rules if re.search(r, path)))
    everything = {r for *_, rules in CASES.values() for r, _ in rules}
    assert used == everything


@pytest.mark.parametrize("scan", [False, True])
def test_sharded_equals_unsharded(fill, scan):
    module = models.Bert(
        vocab_size=11, width=16, depth=1, num_heads=2, mlp_dim=32, scan=scan
    )
    ids = jax.random.randint(jax.random.key(1), (8, 6), 0, 11)
    params = fill(module, ids)

    def loss(p, ids):
        return jnp.mean(jnp.square(module.apply({"params": p}, ids)))

    want, want_grad = jax.jit(jax.value_and_grad(loss))(params, ids)
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = tree.map_with_path(
        lambda path, _: NamedSharding(mesh, spec_of(path, bert.SHARDING_RULES)), params
    )
    sharded = jax.device_put(params, shardings)
    batch = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    got, grad = step(sharded, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad, want_grad
    )


def test_rules_without_an_axis_are_whole_along_it():
    spec = PartitionSpec
    rules = (("a", spec("data", "model")), ("b", spec(("data", "model"), None)))
    assert without_axis(rules, "data") == (
        ("a", spec(None, "model")),
        ("b", spec(("model",), None)),
    )
    assert without_axis(without_axis(rules, "data"), "model")[0] == (
        "a",
        spec(None, None),
    )
    assert without_axis(rules, "expert") == rules
