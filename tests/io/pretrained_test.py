import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models

OPTIONS = {
    "vocab_size": 11,
    "width": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 12,
    "max_positions": 6,
}
CONFIG = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def params():
    like = jax.eval_shape(
        models.Bert(**OPTIONS).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32)
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_folder_round_trip_with_config(tmp_path, params):
    folder = tmp_path / "new" / "model"
    io.save_pretrained(folder, params, io.names.bert, config=CONFIG)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same(io.load_pretrained(folder, io.names.bert), params)
    options = io.names.bert.options(io.read_config(folder))
    assert models.build("bert", **options) == models.Bert(**OPTIONS)
    file = io.safetensors.SafetensorsFile(folder / "model.safetensors")
    assert file.metadata == {"format": "pt"}


def test_single_file_round_trip(tmp_path, params):
    path = tmp_path / "x.safetensors"
    io.save_pretrained(path, params, io.names.bert)
    assert_same(io.load_pretrained(path, io.names.bert, params), params)
    with pytest.raises(ValueError, match="config needs a folder"):
        io.save_pretrained(path, params, io.names.bert, config=CONFIG)
    with pytest.raises(ValueError, match="shards need a folder"):
        io.save_pretrained(path, params, io.names.bert, shard_bytes=9)


def test_sharded_like_is_filled_in_place(tmp_path, params):
    path = tmp_path / "x.safetensors"
    io.save_pretrained(path, params, io.names.bert)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), params
    )
    got = io.load_pretrained(path, io.names.bert, like)
    assert {x.sharding for x in jax.tree.leaves(got)} == {split}
    assert_same(got, params)


def shard(folder, params):
    """Splits a checkpoint over two files and an index."""
    tensors = {k: np.asarray(v) for k, v in io.names.bert.save(params).items()}
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        io.safetensors.save(folder / file, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )


def test_shards_are_read_as_one(tmp_path, params):
    write_index(tmp_path, shard(tmp_path, params))
    assert_same(io.load_pretrained(tmp_path, io.names.bert), params)


def test_shards_are_written_up_to_a_size(tmp_path, params):
    def files():
        return sorted(x.name for x in tmp_path.iterdir())

    io.save_pretrained(tmp_path, params, io.names.bert)
    io.save_pretrained(tmp_path, params, io.names.bert, shard_bytes=1000)
    assert files()[0] == "model-00001-of-00006.safetensors"
    assert "model.safetensors" not in files() and len(files()) == 7
    sizes = []
    for name in files()[:-1]:
        file = io.safetensors.SafetensorsFile(tmp_path / name)
        sizes.append(sum(x.nbytes for x in file.values()))
    assert sum(sizes) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert max(sizes) <= 1000
    assert_same(io.load_pretrained(tmp_path, io.names.bert), params)
    # A tensor that is larger has a file of its own.
    io.save_pretrained(tmp_path / "one", params, io.names.bert, shard_bytes=1)
    count = len(io.names.bert.save(params))
    assert len(list((tmp_path / "one").iterdir())) == count + 1
    # One file takes the place of the shards.
    twice = jax.tree.map(lambda x: 2 * x, params)
    io.save_pretrained(tmp_path, twice, io.names.bert)
    assert_same(io.load_pretrained(tmp_path, io.names.bert), twice)


def test_faults_of_an_index_are_named(tmp_path, params):
    weight_map = shard(tmp_path, params)
    write_index(tmp_path, {**weight_map, "ghost": "model-0.safetensors"})
    with pytest.raises(ValueError, match="not in the shard it names: 'ghost'"):
        io.load_pretrained(tmp_path, io.names.bert)
    write_index(tmp_path, {**weight_map, "ghost": "model-7.safetensors"})
    with pytest.raises(FileNotFoundError, match="model-7"):
        io.load_pretrained(tmp_path, io.names.bert)
    write_index(tmp_path, {**weight_map, "ghost": "../secret.safetensors"})
    with pytest.raises(ValueError, match="must lie beside it"):
        io.load_pretrained(tmp_path, io.names.bert)
    write_index(tmp_path, {})
    with pytest.raises(ValueError, match="has no weight_map"):
        io.load_pretrained(tmp_path, io.names.bert)


@pytest.mark.fast
def test_nothing_to_read_is_said_plainly(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"found: pytorch_model\.bin .only"):
        io.load_pretrained(tmp_path, io.names.bert)
    with pytest.raises(FileNotFoundError, match="no such file"):
        io.load_pretrained(tmp_path / "x.safetensors", io.names.bert)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        io.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        io.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        io.read_config(tmp_path)


def test_faults_name_the_file(tmp_path, params):
    path = tmp_path / "x.safetensors"
    io.save_pretrained(path, params, io.names.bert)
    with pytest.raises(ValueError, match=r"load_pretrained: .*x\.safetensors: missing"):
        io.load_pretrained(path, io.names.vit)


@pytest.mark.fast
def test_unwritable_folder_is_named(tmp_path, params):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OSError, match="cannot make .*taken"):
        io.save_pretrained(tmp_path / "taken" / "x", params, io.names.bert)


def test_the_layout_that_the_configuration_names(tmp_path, params):
    io.save_pretrained(
        tmp_path, params, io.names.bert, config={**CONFIG, "model_type": "bert"}
    )
    assert_same(io.load_pretrained(tmp_path), params)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported, only b"):
        io.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a single file needs a table"):
        io.load_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        io.load_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_the_dtype_that_is_asked_for(tmp_path, params, dtype):
    path = tmp_path / "x.safetensors"
    io.save_pretrained(path, params, io.names.bert)
    want = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), params)
    for like in (None, params):
        got = io.load_pretrained(path, io.names.bert, like, dtype=dtype)
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
        assert_same(got, want)


GGUF = {
    "general.architecture": "llama",
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 12,
}


def test_gguf_files_and_folders_with_one(tmp_path):
    table = io.names.gguf_llama(GGUF, tied=True)
    module = models.build(table.model, **table.options(GGUF))
    ids = jnp.zeros((1, 3), jnp.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
    path = tmp_path / "a.gguf"
    io.gguf.save(path, table.save(params), GGUF)
    for place in (path, tmp_path):
        assert_same(io.load_pretrained(place), params)
        assert_same(io.load_pretrained(place, table, like), params)
    half = io.load_pretrained(tmp_path, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}

    io.gguf.save(tmp_path / "b.gguf", table.save(params), GGUF)
    with pytest.raises(ValueError, match=r"which of a\.gguf, b\.gguf"):
        io.load_pretrained(tmp_path)
    # Safetensors come first.
    other = jax.tree.map(lambda x: 2 * x, params)
    io.save_pretrained(tmp_path, other, io.names.llama)
    assert_same(io.load_pretrained(tmp_path, io.names.llama, like), other)
