"""Leaves are filled in place, from tensors that need not be read whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models
from mtl_jax.io.names._table import Hook

OPTIONS = {"width": 8, "depth": 3, "num_heads": 2, "mlp_dim": 12}
TABLE = io.names.bert


class Streamed(dict):
    """Tensors that are only read into arrays that exist."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = []

    def shape(self, name):
        return super().__getitem__(name).shape

    def dtype(self, name):
        return super().__getitem__(name).dtype

    def __getitem__(self, name):
        raise AssertionError(f"{name} was read whole")

    def read_into(self, name, out):
        self.read.append(name)
        out[...] = super().__getitem__(name)


def like(**options):
    module = models.build("bert", vocab_size=11, max_positions=6, **OPTIONS, **options)
    example = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def parameters():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like())


def tensors():
    return {name: np.asarray(leaf) for name, leaf in TABLE.save(parameters()).items()}


def expected(scan=False, param_dtype="float32"):
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(param_dtype)), parameters())
    return models.stack_layers(params) if scan else params


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [
        x.dtype for x in jax.tree.leaves(b)
    ]
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"scan": True}, {"param_dtype": "bfloat16"}, None], ids=str
)
def test_same_result(streamed, options):
    given = Streamed(tensors()) if streamed else tensors()
    wanted = None if options is None else like(**options)
    got = TABLE.load(given, wanted)
    assert_same(got, expected(**(options or {})))
    if streamed:
        assert sorted(given.read) == sorted(tensors())


def test_shardings_are_obeyed():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), like()
    )
    got = TABLE.load(tensors(), wanted)
    assert {x.sharding for x in jax.tree.leaves(got)} == {split}


def test_results_do_not_share_memory_with_the_tensors():
    given = tensors()
    got = TABLE.load(given)
    name = "encoder.layer.0.output.dense.bias"
    before = given[name].copy()
    given[name][:] = 0
    np.testing.assert_array_equal(got["layers_0"]["mlp"]["out"]["bias"], before)


def test_all_faults_are_named():
    broken = tensors()
    del broken["encoder.layer.1.output.dense.bias"]
    broken["surprise"] = np.ones(1)
    broken["embeddings.LayerNorm.bias"] = np.zeros(8, np.int32)
    name = "encoder.layer.2.intermediate.dense.weight"
    broken[name] = broken[name][:, :5]
    flat = "encoder.layer.2.output.dense.weight"
    broken[flat] = broken[flat].reshape(-1)
    always = [
        "missing: 'encoder.layer.1.output.dense.bias'",
        "unexpected: 'surprise'",
        f"wrong shape: {flat!r} is (96,), wanted 2 axes",
    ]
    compared = [
        "wrong dtype: 'embeddings.LayerNorm.bias' is int32",
        f"wrong shape: {name!r} gives (5, 12)",
    ]
    for wanted in (like(), like(scan=True), None):
        with pytest.raises(ValueError, match="^here: ") as caught:
            TABLE.load(broken, wanted, where="here")
        found = str(caught.value).removeprefix("here: ").split("; ")
        faults = always if wanted is None else always + compared
        assert len(found) == len(faults), found
        for fault in faults:
            assert any(message.startswith(fault) for message in found), fault


def test_layers_beyond_like_are_refused():
    wanted = {k: v for k, v in like().items() if k != "layers_2"}
    with pytest.raises(ValueError, match=r"unexpected: 'encoder\.layer\.2\."):
        TABLE.load(tensors(), wanted)


def test_wide_dtypes_are_refused_as_they_are_elsewhere():
    wide = {name: x.astype(np.float64) for name, x in tensors().items()}
    with pytest.raises(ValueError, match="is float64, which JAX would narrow"):
        TABLE.load(wide)
    assert_same(TABLE.load(wide, like()), TABLE.load(tensors(), like()))


def test_hooks_whose_inverse_is_no_view_read_the_tensor_whole():
    doubling = Hook(lambda x: 2 * x, lambda x: x / 2)
    rules = tuple(
        dataclasses.replace(rule, hook=doubling) if rule.path.endswith("bias") else rule
        for rule in TABLE.rules
    )
    got = dataclasses.replace(TABLE, rules=rules).load(tensors(), like())
    want = TABLE.load(tensors(), like())
    bias = got["layers_1"]["mlp"]["out"]["bias"]
    np.testing.assert_array_equal(bias, 2 * want["layers_1"]["mlp"]["out"]["bias"])
