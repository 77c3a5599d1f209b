"""Headers that lie, and reading within bounds."""

import struct
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.io import gguf
from mtl_jax.io.gguf import _blocks

pytestmark = pytest.mark.fast


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key, kind, raw):
    return string(key) + struct.pack("<I", kind) + raw


def tensor(name="t", shape=(4,), code=0, offset=0):
    return (
        string(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", code, offset)
    )


def file_of(
    fields=(), tensors=(), data=bytes(64), *, magic=b"GGUF", version=3, counts=None
):
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_fields)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def opened(tmp_path, raw):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return gguf.GgufFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_metadata(tmp_path, version):
    scalars = {
        0: ("<B", 200),
        1: ("<b", -3),
        2: ("<H", 60_000),
        3: ("<h", -300),
        4: ("<I", 1 << 31),
        5: ("<i", -(1 << 31)),
        6: ("<f", 0.5),
        7: ("<?", True),
        10: ("<Q", 1 << 63),
        11: ("<q", -(1 << 63)),
        12: ("<d", 0.1),
    }
    fields = [
        field(f"k{kind}", kind, struct.pack(fmt, value))
        for kind, (fmt, value) in scalars.items()
    ]
    fields += [
        field(f"a{kind}", 9, struct.pack("<IQ", kind, 2) + 2 * struct.pack(fmt, value))
        for kind, (fmt, value) in scalars.items()
    ]
    fields += [
        field("s", 8, string("é")),
        field("as", 9, struct.pack("<IQ", 8, 2) + string("") + string("x")),
        field(
            "aa",
            9,
            struct.pack("<IQ", 9, 2)
            + struct.pack("<IQI", 4, 1, 7)
            + struct.pack("<IQ", 8, 1)
            + string("y"),
        ),
    ]
    file = opened(tmp_path, file_of(fields, version=version))
    assert file.version == version
    for kind, (_, value) in scalars.items():
        assert file.metadata[f"k{kind}"] == value
        assert type(file.metadata[f"k{kind}"]) is type(value)
        assert file.metadata[f"a{kind}"].tolist() == [value, value]
    assert file.metadata["s"] == "é"
    assert file.metadata["as"] == ["", "x"]
    assert file.metadata["aa"][0].tolist() == [7]
    assert file.metadata["aa"][1] == ["y"]


def test_plain_tensors_are_views_and_axes_are_reversed(tmp_path):
    data = np.arange(6, dtype="<f4").tobytes() + bytes(8)
    data += np.arange(3).astype(ml_dtypes.bfloat16).tobytes()
    tensors = [tensor("a", (3, 2)), tensor("b", (3,), 30, 32), tensor("z", (0,))]
    file = opened(tmp_path, file_of(tensors=tensors, data=data))
    assert list(file) == ["a", "b", "z"]
    assert len(file) == 3
    np.testing.assert_array_equal(file["a"], np.arange(6).reshape(2, 3))
    assert not file["a"].flags.owndata
    assert not file["a"].flags.writeable
    assert (file.shape("b"), file.kind("b")) == ((3,), "BF16")
    assert file["b"].dtype == file.dtype("b") == ml_dtypes.bfloat16
    assert file["z"].shape == (0,)


def test_alignment_of_the_file_is_obeyed(tmp_path):
    fields = [field("general.alignment", 4, struct.pack("<I", 64))]
    head = file_of(fields, [tensor("a"), tensor("b", offset=64)], b"")
    data = np.arange(4, dtype="<f4").tobytes() + bytes(48)
    data += np.arange(4, 8, dtype="<f4").tobytes()
    file = opened(tmp_path, head + bytes(-len(head) % 64) + data)
    np.testing.assert_array_equal(file["b"], [4, 5, 6, 7])


def u32_array(number, kind=4):
    return field("k", 9, struct.pack("<IQ", kind, number))


def nested(depth):
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


HUGE = 1 << 62
FAULTS = {
    "empty": (b"", "the magic number needs 4 bytes at byte 0"),
    "magic": (file_of(magic=b"PK\3\4"), "not a GGUF file"),
    "version 1": (file_of(version=1), "has GGUF version 1; versions 2 and 3"),
    "big-endian": (file_of(version=3 << 24), "is a big-endian GGUF file"),
    "cut version": (b"GGUF\3", "the version needs 4 bytes"),
    "tensor count": (file_of(counts=(HUGE, 0)), f"claims {HUGE} tensors of"),
    "field count": (file_of(counts=(0, HUGE)), f"claims {HUGE} metadata entries"),
    "counts past the end": (file_of(counts=(0, 5), data=b""), "claims 5 metadata"),
    "key length": (
        file_of([struct.pack("<Q", HUGE)]),
        "the key of metadata entry 0 needs",
    ),
    "key not utf-8": (
        file_of([string(b"\xff") + struct.pack("<IB", 0, 1)]),
        "the key of metadata entry 0 is not UTF-8",
    ),
    "value length": (file_of([field("k", 8, struct.pack("<Q", HUGE))]), "metadata 'k'"),
    "value not utf-8": (
        file_of([field("k", 8, string(b"ab\xc3"))]),
        "metadata 'k' is not UTF-8",
    ),
    "element not utf-8": (
        file_of([field("k", 9, struct.pack("<IQ", 8, 1) + string(b"\xff"))]),
        "element 0 of metadata 'k' is not UTF-8",
    ),
    "value type": (
        file_of([field("k", 13, bytes(8))]),
        "metadata 'k' has unknown type 13",
    ),
    "element type": (file_of([u32_array(1, 99)]), "has unknown element type 99"),
    "array length": (file_of([u32_array(HUGE)]), f"claims {HUGE} elements of metadata"),
    "strings length": (file_of([u32_array(HUGE, 8)]), "elements of metadata 'k' of 8"),
    "boolean": (file_of([field("k", 7, b"\2")]), "metadata 'k' has a boolean of 2"),
    "nesting": (file_of([field("k", 9, nested(200))]), "nests arrays more than 4"),
    "same key": (file_of(2 * [field("k", 0, b"1")]), "metadata has 'k' twice"),
    **{
        f"alignment {bad}": (
            file_of([field("general.alignment", 4, struct.pack("<I", bad))]),
            f"general.alignment is {bad}, wanted a power of two",
        )
        for bad in (0, 4, 24, 1 << 20)
    },
    "alignment type": (
        file_of([field("general.alignment", 8, string("32"))]),
        "general.alignment is '32'",
    ),
    "same tensor": (file_of(tensors=2 * [tensor()]), "tensor 't' is there twice"),
    "name not utf-8": (file_of(tensors=[tensor(b"\xfe")]), "the name of tensor 0 is"),
    "no axes": (file_of(tensors=[tensor(shape=())]), "'t' has 0 axes"),
    "axes": (file_of(tensors=[tensor(shape=5 * (1,))]), "'t' has 5 axes, wanted 1 to"),
    "axes count": (
        file_of(tensors=[string("t") + struct.pack("<I", 1 << 31)]),
        "'t' has 2147483648 axes",
    ),
    "type": (file_of(tensors=[tensor(code=77)]), "'t' has tensor type 77, which"),
    "type left out": (file_of(tensors=[tensor(code=16)]), r"type 16 \(IQ2_XXS\)"),
    "rows": (file_of(tensors=[tensor(code=3)]), "'t' is Q4_1, whose rows are multiple"),
    "offset": (file_of(tensors=[tensor(offset=8)]), "offset 8, which is no multiple"),
    "end": (file_of(tensors=[tensor(shape=(17,))]), r"but the file has \d+: truncated"),
    "far offset": (file_of(tensors=[tensor(offset=HUGE)]), "would end at byte"),
    "huge shape": (file_of(tensors=[tensor(shape=4 * (HUGE,))]), "would end at byte"),
    "overlap": (
        file_of(tensors=[tensor(shape=(9,)), tensor("u", offset=32)]),
        "'u' begins at byte .* and overlaps 't'",
    ),
    "twice the same bytes": (
        file_of(tensors=[tensor("u"), tensor("t")]),
        "'u' begins .* overlaps 't'|'t' begins .* overlaps 'u'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path, fault):
    raw, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
        opened(tmp_path, raw)


def whole_file():
    fields = [
        field("general.architecture", 8, string("llama")),
        field("tokens", 9, struct.pack("<IQ", 8, 2) + string("ab") + string("c")),
        field("scores", 9, struct.pack("<IQff", 6, 2, 1.0, 2.0)),
    ]
    tensors = [tensor("a", (32, 1), 3), tensor("b", (4,), 0, 32)]
    return file_of(fields, tensors, bytes(48))


def test_every_truncation_is_named(tmp_path):
    raw = whole_file()
    opened(tmp_path, raw)
    for length in range(len(raw)):
        with pytest.raises(ValueError, match=r"x\.gguf: "):
            opened(tmp_path, raw[:length])


@hypothesis.settings(
    max_examples=300,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(at=st.integers(0, len(whole_file()) - 1), byte=st.integers(0, 255))
def test_corrupt_bytes_are_read_or_named(tmp_path, at, byte):
    raw = bytearray(whole_file())
    raw[at] = byte
    try:
        file = opened(tmp_path, bytes(raw))
    except ValueError as error:
        assert "x.gguf: " in str(error)
        return
    with np.errstate(all="ignore"):
        for name in file:
            assert file[name].shape == file.shape(name)


def test_claims_of_a_header_cost_no_memory(tmp_path):
    """A few bytes cannot make the reader ask for gigabytes."""
    claims = [FAULTS[name][0] for name in FAULTS if "length" in name or "count" in name]
    tracemalloc.start()
    try:
        for raw in claims:
            with pytest.raises(ValueError, match="x.gguf"):
                opened(tmp_path, raw)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_missing_file_and_missing_tensor(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        gguf.GgufFile(tmp_path / "x.gguf")
    with pytest.raises(KeyError):
        opened(tmp_path, file_of())["t"]


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F32", "BF16", "I16"])
@pytest.mark.parametrize("shape", [(256,), (7, 256), (2, 3, 512), (2, 2, 2, 256)])
def test_reading_into_an_array_equals_reading(tmp_path, monkeypatch, name, shape):
    monkeypatch.setattr(gguf._reader, "_CHUNK", 700)
    kind = _blocks.TYPES[name]
    size = int(np.prod(shape)) // kind.values * kind.size
    data = np.random.default_rng(0).integers(0, 60, size).astype(np.uint8)
    raw = file_of(tensors=[tensor("t", shape[::-1], kind.code)], data=data.tobytes())
    file = opened(tmp_path, raw)
    want = np.array(file["t"])
    for dtype in (np.float32, ml_dtypes.bfloat16):
        out = np.full(shape[::-1], -1, dtype)
        file.read_into("t", out.T)
        np.testing.assert_array_equal(out.T, want.astype(dtype))
    with pytest.raises(ValueError, match=r"read_into: 't' is .*, the array is \(3,\)"):
        file.read_into("t", np.zeros(3))


def test_files_that_cannot_be_mapped_read_their_ranges(tmp_path):
    data = np.random.default_rng(0).integers(0, 60, 96).astype(np.uint8).tobytes()
    tensors = [tensor("a", (32, 2), 3), tensor("b", (2, 4), 0, 64)]
    raw = file_of(tensors=tensors, data=data)
    mapped, file = opened(tmp_path, raw), opened(tmp_path, raw)
    file._map = None
    for name in mapped:
        np.testing.assert_array_equal(file[name], mapped[name])
        out = np.empty(file.shape(name), np.float32)
        file.read_into(name, out)
        np.testing.assert_array_equal(out, mapped[name])


def test_reading_into_an_array_needs_little_beside_it(tmp_path):
    shape, kind = (2048, 4096), _blocks.TYPES["Q4_1"]
    data = bytes(2048 * 4096 // kind.values * kind.size)
    file = opened(tmp_path, file_of(tensors=[tensor("t", shape[::-1], 3)], data=data))
    out = np.empty(shape[::-1], np.float32)
    tracemalloc.start()
    try:
        file.read_into("t", out.T)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.25 * out.nbytes
    assert not out.any()


@pytest.mark.reference
def test_the_gguf_package_reads_the_same(tmp_path):
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64)).astype(np.float32)
    writer.add_uint32("a", 7)
    writer.add_array("b", ["x", "y"])
    writer.add_array("c", [1, 2])
    writer.add_tensor("plain", x)
    kind = library.GGMLQuantizationType.Q8_0
    writer.add_tensor("q", library.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf.GgufFile(tmp_path / "x.gguf")
    assert (file.metadata["a"], file.metadata["b"]) == (7, ["x", "y"])
    assert file.metadata["c"].tolist() == [1, 2]
    np.testing.assert_array_equal(file["plain"], x)
    want = library.quants.dequantize(library.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(file["q"], want)
