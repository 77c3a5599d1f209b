import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.io import safetensors

pytestmark = pytest.mark.fast

DTYPES = (
    *("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"),
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)


def tensors():
    rng = np.random.default_rng(0)
    return {
        f"{np.dtype(d).name}.{i}": np.asarray(rng.integers(0, 2, shape)).astype(d)
        for d in DTYPES
        for i, shape in enumerate([(3,), (2, 3), (), (0, 4)])
    }


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(raw)) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_round_trip_of_every_dtype_and_shape(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save(path, tensors(), {"note": "é"})
    file = safetensors.SafetensorsFile(path)
    assert file.metadata == {"note": "é"}
    assert set(file) == set(tensors())
    for name, want in tensors().items():
        got = file[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes()
        assert (file.dtype(name), file.shape(name)) == (want.dtype, want.shape)
        assert got.ctypes.data % max(1, want.dtype.itemsize) == 0


def test_both_ways_with_the_reference_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plain = {
        k: v
        for k, v in tensors().items()
        if v.dtype.isbuiltin == 1 and v.dtype.kind != "c"
    }
    path = tmp_path / "ours.safetensors"
    safetensors.save(path, plain)
    for name, got in library.load_file(path).items():
        np.testing.assert_array_equal(got, plain[name])
    library.save_file(plain, tmp_path / "theirs.safetensors")
    file = safetensors.SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, want in plain.items():
        np.testing.assert_array_equal(file[name], want)


def test_jax_arrays_and_views_are_written_as_they_read(tmp_path):
    path = tmp_path / "x.safetensors"
    view = np.arange(12.0).reshape(3, 4).T[::2]
    safetensors.save(path, {"view": view, "jax": jnp.ones(2, jnp.bfloat16)})
    file = safetensors.SafetensorsFile(path)
    np.testing.assert_array_equal(file["view"], view)
    assert file["jax"].dtype == ml_dtypes.bfloat16


def test_tensors_are_read_only_maps(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save(path, {"a": np.ones(3)})
    with pytest.raises(ValueError, match="read-only"):
        safetensors.SafetensorsFile(path)["a"][0] = 2


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
CORRUPT = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "no header": (lambda p: p.write_bytes(b"\x05\0\0"), "truncated"),
    "header past end": (lambda p: write(p, {}, length=99), "past the end"),
    "huge header": (lambda p: write(p, {}, length=2**62), "above the limit"),
    "not json": (lambda p: write(p, b"{nope"), "not valid JSON"),
    "not utf-8": (lambda p: write(p, b"\xff\xfe\xfd"), "not valid JSON"),
    "deep json": (lambda p: write(p, b"[" * 100_000), "not valid JSON"),
    "not an object": (lambda p: write(p, [1]), "must be a JSON object"),
    "duplicate": (
        lambda p: write(
            p, b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)
        ),
        "'a' twice",
    ),
    "truncated data": (lambda p: write(p, TWO, bytes(15)), "'b' ends at byte 16"),
    "trailing": (lambda p: write(p, TWO, bytes(17)), "1 unused bytes after 'b'"),
    "trailing alone": (lambda p: write(p, {}, bytes(3)), "3 unused bytes"),
    "overlap": (
        lambda p: write(p, {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b' begins at byte 4 and overlaps 'a'",
    ),
    "hole": (
        lambda p: write(p, {"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)),
        "1 unused bytes between 'a' and 'b'",
    ),
    "dtype": (lambda p: write(p, {"a": entry("F33")}, bytes(8)), "dtype 'F33'"),
    "dtype kind": (lambda p: write(p, {"a": entry([])}, bytes(8)), r"dtype \[\]"),
    "size": (
        lambda p: write(p, {"a": entry(shape=(3,))}, bytes(8)),
        r"F32\[3\], 12 bytes, but its range has 8",
    ),
    "negative shape": (
        lambda p: write(p, {"a": entry(shape=(-2,))}, bytes(8)),
        "invalid shape",
    ),
    "float shape": (
        lambda p: write(p, {"a": entry(shape=(2.0,))}, bytes(8)),
        "invalid shape",
    ),
    "reversed": (
        lambda p: write(p, {"a": entry(offsets=(8, 0))}, bytes(8)),
        "invalid data_offsets",
    ),
    "three offsets": (
        lambda p: write(p, {"a": entry(offsets=(0, 4, 8))}, bytes(8)),
        "invalid data_offsets",
    ),
    "fields": (lambda p: write(p, {"a": {"dtype": "F32"}}), "must have exactly"),
    "metadata": (
        lambda p: write(p, {"__metadata__": {"a": 1}}),
        "strings to strings",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused_by_their_fault(tmp_path, case):
    make, message = CORRUPT[case]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        safetensors.SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


def test_every_truncation_of_a_good_file_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save(path, {"a": np.arange(3.0), "b": np.ones(2, np.int8)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            safetensors.SafetensorsFile(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        safetensors.SafetensorsFile(tmp_path / "no.safetensors")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    class Failing:
        shape, dtype = (2,), np.dtype("f4")

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("lost")

    path = tmp_path / "x.safetensors"
    safetensors.save(path, {"a": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="lost"):
        safetensors.save(path, {"a": np.ones(1), "b": Failing()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_unwritable_places_are_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*no/x\.safetensors: No such"):
        safetensors.save(tmp_path / "no" / "x.safetensors", {"a": np.ones(1)})
    with pytest.raises(OSError, match="it is a directory"):
        safetensors.save(tmp_path, {"a": np.ones(1)})


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"a": np.array(["x"])}, None, "'a' has dtype <U1"),
        ({"a": np.ones(1, "c16")}, None, "'a' has dtype complex128"),
        ({"__metadata__": np.ones(1)}, None, "reserved"),
        ({}, {"a": 1}, "strings to strings"),
    ],
)
def test_what_the_format_lacks_is_refused(tmp_path, arrays, metadata, message):
    with pytest.raises(ValueError, match=message):
        safetensors.save(tmp_path / "x.safetensors", arrays, metadata)
    assert not os.listdir(tmp_path)
