"""What is written reads back; quantisers lose no more than a step of their grid."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.io import gguf
from mtl_jax.io.gguf import _blocks, _quantize

pytestmark = pytest.mark.fast


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_plain_dtypes_round_trip(tmp_path):
    path = tmp_path / "x.gguf"
    dtypes = ("i1", "i2", "i4", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16)
    want = {
        f"{np.dtype(dtype).name}.{len(shape)}": (10 * normal(*shape)).astype(dtype)
        for dtype in dtypes
        for shape in [(3,), (2, 3), (2, 1, 3), (1, 2, 1, 3), (0, 4)]
    }
    gguf.save(path, want)
    file = gguf.GgufFile(path)
    assert list(file) == list(want)
    for name, array in want.items():
        got = file[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()


def test_jax_arrays_views_and_types(tmp_path):
    path = tmp_path / "x.gguf"
    view = normal(3, 4).T[::2]
    tensors = {"view": view, "jax": jnp.ones((2, 32), jnp.bfloat16), "q": normal(2, 32)}
    gguf.save(path, tensors, types={"view": "F16", "jax": "F32", "q": "Q4_0"})
    file = gguf.GgufFile(path)
    assert [file.kind(n) for n in file] == ["F16", "F32", "Q4_0"]
    np.testing.assert_array_equal(file["view"], view.astype(np.float16))
    np.testing.assert_array_equal(file["jax"], np.ones((2, 32)))


def test_metadata_round_trips(tmp_path):
    path = tmp_path / "x.gguf"
    metadata = {
        "s": "é",
        "yes": True,
        "small": 7,
        "negative": -7,
        "large": 1 << 40,
        "float": 0.5,
        "strings": ["", "é"],
        "ints": [1, -2],
        "floats": [0.5, 1.0],
        "flags": [True, False],
        "typed": np.arange(3, dtype=np.int16),
        "scalar": np.float64(0.1),
        "general.alignment": 64,
    }
    gguf.save(path, {"a": normal(3), "b": normal(5)}, metadata)
    file = gguf.GgufFile(path)
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        np.testing.assert_array_equal(file.metadata[key], value)
    assert file.metadata["typed"].dtype == np.int16
    assert file.metadata["yes"] is True
    assert file._entries["b"].begin % 64 == 0


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 3.0]),
    name=st.sampled_from(sorted(_quantize.ENCODERS)),
)
def test_quantised_values_are_within_half_a_step(seed, scale, shift, name):
    kind = _blocks.TYPES[name]
    x = (scale * (normal(6, 64, seed=seed) + np.float32(shift))).astype(np.float32)
    raw = _quantize.encode(kind, x).reshape(-1, kind.size)
    got, blocks = kind.decode(raw), x.reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    top = np.maximum(-low, high)
    # Q4_0 spends its sixteenth level on one sign: the far end is a whole step off.
    share = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "Q4_1": 0.5 / 15}[name]
    span = high - low if name == "Q4_1" else top
    # The scale, and for Q4_1 the minimum, are rounded to float16, as numbers that
    # can be subnormal there.
    slack = (span + top) * 2.0**-10 + 16 * 2.0**-24 * (127 if name == "Q8_0" else 15)
    assert (np.abs(got - blocks) <= share * span + slack).all()


@pytest.mark.parametrize("name", _quantize.ENCODERS)
def test_values_on_the_grid_are_kept(name):
    """Quantising what was decoded changes nothing."""
    kind = _blocks.TYPES[name]
    first = kind.decode(_quantize.encode(kind, normal(8, 32)).reshape(-1, kind.size))
    again = kind.decode(_quantize.encode(kind, first).reshape(-1, kind.size))
    np.testing.assert_allclose(again, first, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", _quantize.ENCODERS)
def test_zeros_and_subnormal_scales_stay_finite(name):
    kind = _blocks.TYPES[name]
    x = np.stack([np.zeros(32), normal(32) * 1e-40, np.full(32, 2.0)])
    raw = _quantize.encode(kind, x.astype(np.float32)).reshape(-1, kind.size)
    got = kind.decode(raw)
    np.testing.assert_array_equal(got[:2], np.zeros((2, 32)))
    np.testing.assert_allclose(got[2], 2.0, rtol=1e-2)


@pytest.mark.reference
@pytest.mark.parametrize("name", _quantize.ENCODERS)
def test_quantisers_agree_with_the_gguf_package(name):
    library = pytest.importorskip("gguf")
    x = normal(50, 64)
    x[3], x[4] = 0, 1
    want = library.quants.quantize(x, library.GGMLQuantizationType[name])
    got = _quantize.encode(_blocks.TYPES[name], x)
    np.testing.assert_array_equal(got, want.reshape(-1))


@pytest.mark.reference
def test_the_gguf_package_reads_what_is_written(tmp_path):
    library = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    tensors = {"a": normal(4, 64), "b": normal(2, 3, 32)}
    metadata = {"k": 7, "s": ["x", "y"], "general.architecture": "llama"}
    gguf.save(path, tensors, metadata, types={"a": "Q4_1"})
    reader, ours = library.GGUFReader(path), gguf.GgufFile(path)
    assert reader.fields["s"].contents() == ["x", "y"]
    assert reader.fields["k"].contents() == 7
    for tensor in reader.tensors:
        assert tensor.shape.tolist() == list(ours.shape(tensor.name))[::-1]
        got = library.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            got.reshape(ours.shape(tensor.name)), ours[tensor.name]
        )


FAULTS = {
    "dtype": (({"a": np.zeros(2, "c8")},), {}, "'a' is complex64, which the format"),
    "bool": (({"a": np.zeros(2, "?")},), {}, "'a' is bool, which the format lacks"),
    "no axes": (({"a": np.zeros(())},), {}, r"'a' is \(\), wanted 1 to 4 axes"),
    "rows": (({"a": np.zeros(33)},), {"types": {"a": "Q8_0"}}, "multiples of 32"),
    "type": (({"a": np.zeros(256)},), {"types": {"a": "Q4_K"}}, "'Q4_K' is not writte"),
    "stranger": (({},), {"types": {"a": "F32"}}, "types names 'a', no such tensor"),
    "not finite": (
        ({"a": np.full(32, np.nan)},),
        {"types": {"a": "Q8_0"}},
        "'a': a value is not finite",
    ),
    "too large": (
        ({"a": np.full(32, 1e9)},),
        {"types": {"a": "Q4_0"}},
        "'a': values are too large",
    ),
    "metadata": (({}, {"k": None}), {}, "metadata 'k' is NoneType of object"),
    "mixed": (({}, {"k": ["a", 1]}), {}, "metadata 'k' is list of"),
    "matrix": (({}, {"k": np.zeros((2, 2))}), {}, "metadata 'k' has 2 axes"),
    "wide": (({}, {"k": 1 << 70}), {}, "metadata 'k' is int"),
    "alignment": (({}, {"general.alignment": 33}), {}, "general.alignment is 33"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_left_behind(tmp_path, fault):
    args, kwargs, message = FAULTS[fault]
    with pytest.raises(ValueError, match=f"gguf.save: .*{message}"):
        gguf.save(tmp_path / "x.gguf", *args, **kwargs)
    assert list(tmp_path.iterdir()) == []
