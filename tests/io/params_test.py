import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from mtl_jax import io

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.bool_)


def leaves():
    def build(args):
        shape, dtype, seed = args
        rng = np.random.default_rng(seed)
        return rng.normal(size=shape).astype(dtype)

    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    return st.tuples(shapes, st.sampled_from(DTYPES), st.integers(0, 2**31 - 1)).map(
        build
    )


names = st.text("abc_0é.", min_size=1, max_size=4)
trees = st.recursive(
    leaves(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3)
)


def bits(tree):
    return jax.tree.map(
        lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree
    )


@hypothesis.given(trees)
def test_round_trip_is_bit_equal(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "x.safetensors"
    metadata = {"task": "dtd", "scores": [0.5, None], "nested": {"a": True}}
    io.save_tree(path, tree, metadata)
    got, back = io.load_tree(path)
    assert bits(got) == bits(tree)
    assert back == metadata
    assert io.digest(got) == io.digest(tree)


def test_like_restores_node_types_and_shardings(tmp_path):
    path = tmp_path / "x.safetensors"
    params = {"w": jnp.arange(16.0).reshape(8, 2), "b": [jnp.ones(3)]}
    state = optax.adam(1e-3).init(params)
    io.save_tree(path, state)
    got, metadata = io.load_tree(path, like=state)
    assert metadata == {}
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert bits(got) == bits(state)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    io.save_tree(path, {"w": params["w"]})
    like = {"w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split)}
    got, _ = io.load_tree(path, like=like)
    assert got["w"].sharding == split
    np.testing.assert_array_equal(got["w"], params["w"])


def test_like_lists_everything_that_does_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save_tree(path, {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)})
    like = {"a": jnp.ones(2, jnp.int32), "b": jnp.ones(4), "d": jnp.ones(1)}
    with pytest.raises(ValueError, match="load_tree") as caught:
        io.load_tree(path, like=like)
    for part in (
        "missing: 'd'",
        "unexpected: 'c'",
        "'a' is float32[2], wanted int32[2]",
        "'b' is float32[3], wanted float32[4]",
    ):
        assert part in str(caught.value)


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save_tree(path, {"a": jnp.arange(1000.0)})
    got, _ = io.load_tree(path)
    with open(path, "r+b") as f:
        f.seek(0)
        f.write(bytes(os.path.getsize(path)))
    np.testing.assert_array_equal(got["a"], np.arange(1000.0))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("tree", "metadata", "message"),
    [
        ({"a": 1.0}, None, "'a' is a float, not an array"),
        ({"a": jax.random.key(0)}, None, "'a' is a PRNG key"),
        ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, None, "two leaves .*'a/b'"),
        ({}, {"a": float("nan")}, "not JSON"),
        ({}, {"a": np.ones(1)}, "not JSON"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, tree, metadata, message):
    with pytest.raises(ValueError, match=f"save_tree: .*{message}"):
        io.save_tree(tmp_path / "x.safetensors", tree, metadata)
    assert not os.listdir(tmp_path)


@pytest.mark.fast
def test_64_bits_are_not_narrowed_in_silence(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save_tree(path, {"n": np.array([2**40])})
    with pytest.raises(ValueError, match="'n' is int64.*jax_enable_x64"):
        io.load_tree(path)


@pytest.mark.fast
def test_foreign_metadata_is_no_obstacle_but_broken_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.ones(1, np.float32)}
    io.safetensors.save(path, arrays, {"format": "pt"})
    assert io.load_tree(path)[1] == {}
    io.safetensors.save(path, arrays, {"mtl_jax": "{"})
    with pytest.raises(ValueError, match="'mtl_jax' is not valid JSON"):
        io.load_tree(path)


@pytest.mark.fast
def test_digest_sees_path_dtype_shape_and_bits():
    base = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.int32)}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].astype(np.float16), "b": base["b"]},
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"a": -base["a"], "b": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {"a": base["a"]},
        {},
    ]
    assert len({io.digest(v) for v in variants}) == len(variants)
    assert io.digest(base) == io.digest(jax.tree.map(jnp.asarray, base))
    transposed = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert io.digest(transposed) == io.digest(np.ascontiguousarray(transposed))


@pytest.mark.fast
def test_digest_is_stable_across_releases():
    """Keys of stored experts; a change here orphans every one of them."""
    tree = {"a": np.arange(3, dtype=np.float32), "b": {"c": np.array(True)}}
    assert io.digest(tree) == (
        "7c53404370cc9ac3ecf5ebe3b82a36ffe106cb690f07156babbf8dac38776741"
    )
