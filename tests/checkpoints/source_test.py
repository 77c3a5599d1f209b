import json
import os
import threading

import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints.source import ArrayView, Source, TensorSpec, open_source
from mtl_jax.io import safetensors

pytestmark = pytest.mark.fast

INDEX = "model.safetensors.index.json"


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(6, 5)).astype(ml_dtypes.bfloat16),
        "b": rng.normal(size=7).astype(np.float32),
        "n": rng.integers(-9, 9, size=(2, 3, 2)).astype(np.int64),
        "one": np.float16(2.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "tiny": rng.normal(size=8).astype(ml_dtypes.float8_e4m3fn),
    }


def write(folder, values, files=(("model.safetensors", None),), index=None):
    """A folder whose files hold the tensors named; an index unless it is one file."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for file, names in files:
        part = {n: values[n] for n in (values if names is None else names)}
        safetensors.save(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(weight_map) and files[0][1] is not None:
        (folder / INDEX).write_text(
            json.dumps({"weight_map": weight_map if index is None else index})
        )
    return folder


TWO = (
    ("model-00001-of-00002.safetensors", ["w", "b", "none"]),
    ("model-00002-of-00002.safetensors", ["n", "one", "tiny"]),
)


def assert_holds(source, values):
    assert set(source) == set(values) and len(source) == len(values)
    for name, value in values.items():
        assert source.specs[name] == TensorSpec(value.shape, value.dtype)
        assert source[name].whole().dtype == value.dtype
        np.testing.assert_array_equal(source[name].whole(), value)


@pytest.mark.parametrize("files", [(("model.safetensors", None),), TWO])
def test_tensors_are_found_with_their_values(tmp_path, files):
    folder = write(tmp_path, tensors(), files)
    source = open_source(folder)
    assert_holds(source, tensors())
    assert source.stored == source.specs
    for name, value in tensors().items():
        flat = value.reshape(-1)
        for start, stop in [(0, flat.size), (flat.size // 3, flat.size // 2), (0, 0)]:
            got = source[name].flat(start, stop)
            np.testing.assert_array_equal(got, flat[start:stop])
            assert got.shape == (stop - start,) and got.dtype == value.dtype


def test_order_is_that_of_the_bytes(tmp_path):
    files = [
        safetensors.SafetensorsFile(write(tmp_path, tensors()) / "model.safetensors")
    ]
    ends = [files[0].offset(name) for name in open_source(tmp_path)]
    assert ends == sorted(ends)
    sharded = list(open_source(write(tmp_path / "two", tensors(), TWO)))
    assert set(sharded[:3]) == {"w", "b", "none"}


def test_one_file_and_one_file_of_another_name(tmp_path):
    folder = write(tmp_path, tensors(), (("weights.safetensors", None),))
    assert_holds(open_source(folder / "weights.safetensors"), tensors())
    assert_holds(open_source(str(folder)), tensors())


def test_entries_that_are_not_there_are_refused(tmp_path):
    source = open_source(write(tmp_path, tensors()))
    for start, stop in [(0, 31), (-1, 2), (3, 2)]:
        with pytest.raises(ValueError, match="'w' has 30 entries"):
            source["w"].flat(start, stop)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"gone": TWO[0][0]}, ValueError, r"not in the shard it names: 'gone' \(mod"),
        ({"x": "model-3.safetensors"}, FileNotFoundError, r"model-3.*names for 'x'"),
        ({"w": None}, ValueError, "does not name 'w', found in model-00001"),
        ({"w": TWO[1][0]}, ValueError, "not in the shard it names: 'w'"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, index, error, message):
    files = {name: file for file, names in TWO for name in names}
    merged = {k: v for k, v in {**files, **index}.items() if v is not None}
    write(tmp_path, tensors(), TWO, merged)
    with pytest.raises(error, match=message):
        open_source(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    twice = (TWO[0], (TWO[1][0], ["n", "one", "tiny", "b"]))
    write(tmp_path, tensors(), twice)
    with pytest.raises(ValueError, match="'b' is in model-00001.* and in model-00002"):
        open_source(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path):
    write(tmp_path, tensors(), TWO)
    path = tmp_path / TWO[1][0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="model-00002.*truncated or corrupt"):
        open_source(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*gone"):
        open_source(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="found nothing"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="pickled weights"):
        open_source(tmp_path / "pytorch_model.bin")
    (tmp_path / ".model.safetensors.partial").write_bytes(b"")
    with pytest.raises(ValueError, match="unfinished"):
        open_source(tmp_path)


def test_what_could_be_read_in_two_ways_is_refused(tmp_path):
    write(tmp_path, tensors(), TWO)
    write(tmp_path, tensors())
    with pytest.raises(ValueError, match="has both"):
        open_source(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors.index.json"):
        open_source(tmp_path)


def test_a_path_may_have_a_plus(tmp_path):
    folder = write(tmp_path / "a+b", tensors())
    assert_holds(open_source(folder), tensors())


def test_fingerprint_changes_with_header_size_and_time(tmp_path):
    def fingerprint():
        return open_source(tmp_path).fingerprint

    write(tmp_path, tensors())
    first = fingerprint()
    assert first == fingerprint()
    stat = (tmp_path / "model.safetensors").stat()
    os.utime(tmp_path / "model.safetensors", ns=(stat.st_atime_ns, 12345))
    touched = fingerprint()
    assert touched != first
    renamed = {f"{name}2": value for name, value in tensors().items()}
    write(tmp_path, renamed)
    os.utime(tmp_path / "model.safetensors", ns=(stat.st_atime_ns, 12345))
    assert fingerprint() not in (first, touched)


def test_files_beside_the_weights_are_listed(tmp_path):
    write(tmp_path, tensors())
    kept = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
    ]
    for name in [*kept, "README.md", "optimizer.pt", "training_args.bin", "x.json"]:
        (tmp_path / name).write_text("{}")
    source = open_source(tmp_path)
    assert sorted(source.side_files) == sorted(kept) and source.config == {}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: must be a JSON object"):
        open_source(tmp_path)


def resident(path):
    """Bytes of a mapped file that lie in the memory of this process."""
    total, inside = 0, False
    with open("/proc/self/smaps") as f:
        for line in f:
            if "-" in line.split(maxsplit=1)[0] and not line[0].isupper():
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_pages_that_were_read_do_not_pile_up(tmp_path):
    size, window, step = 16 << 20, 1 << 20, 1 << 16
    values = {"w": np.arange(size // 4, dtype=np.uint32)}
    folders = [tmp_path / "a", tmp_path / "b"]
    paths = [write(folder, values) / "model.safetensors" for folder in folders]
    kept = safetensors.SafetensorsFile(paths[0])
    assert kept["w"].sum(dtype=np.uint64) == values["w"].sum(dtype=np.uint64)
    assert resident(paths[0]) >= size
    del kept
    pages, peak, views = safetensors.Pages(window), 0, []
    for path in paths:
        file = safetensors.SafetensorsFile(path, pages=pages)
        views.append([file.flat("w", i, i + step) for i in range(0, size // 4, step)])
        total = 0
        for start in range(0, size // 4, step):
            total += int(file.flat("w", start, start + step).sum(dtype=np.uint64))
            if start % (16 * step) == 0:
                peak = max(peak, sum(map(resident, paths)))
        assert total == int(values["w"].sum(dtype=np.uint64))
    # Linux may map the whole 2 MiB around a page that is touched.
    assert peak <= window + (6 << 20)
    # What was handed out before can still be read.
    for parts in views:
        np.testing.assert_array_equal(np.concatenate(parts), values["w"])


def test_threads_read_what_is_there(tmp_path):
    values = {"w": np.arange(1 << 16, dtype=np.int32)}
    path = write(tmp_path, values) / "model.safetensors"
    file = safetensors.SafetensorsFile(path, pages=safetensors.Pages(1 << 14))
    wrong = []

    def read(seed):
        for start in np.random.default_rng(seed).integers(0, 60000, 200).tolist():
            got = file.flat("w", start, start + 999)
            if not np.array_equal(got, np.arange(start, start + 999)):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_views_of_arrays():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    view = ArrayView(array)
    assert view.spec == TensorSpec((2, 3), np.dtype(np.float16))
    assert (view.spec.size, view.spec.nbytes) == (6, 12)
    np.testing.assert_array_equal(view.flat(2, 5), [2, 3, 4])
    source = Source("memory", {"x": view})
    assert source["x"].whole() is array and source.config is None
