import math

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import diff as D
from mtl_jax.checkpoints._layers import numbered
from mtl_jax.checkpoints.source import ArrayView

pytestmark = pytest.mark.fast


class View(ArrayView):
    """A tensor in memory; remembers the longest slice that was asked for."""

    longest = 0

    def flat(self, start, stop):
        self.longest = max(self.longest, stop - start)
        return super().flat(start, stop)


def views(tensors):
    return {name: View(values) for name, values in tensors.items()}


def oracle(a, b, base=None):
    """Every number, of whole float64 arrays without NaN."""
    a, b = (np.asarray(x).astype(np.float64).reshape(-1) for x in (a, b))
    base = 0 * a if base is None else np.asarray(base).astype(np.float64).reshape(-1)
    x, y = a - base, b - base
    both = (x != 0) & (y != 0)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return {
        "size": a.size,
        "norm_a": np.linalg.norm(a),
        "norm_b": np.linalg.norm(b),
        "norm_diff": np.linalg.norm(b - a),
        "cosine": x @ y / norms if norms else None,
        "signs": np.mean(np.sign(x) == np.sign(y), where=both) if both.any() else None,
        "largest": np.abs(b - a).max(initial=0),
        "share_changed": np.mean(a != b) if a.size else None,
    }


def found(sums):
    return {
        "size": sums.size,
        "norm_a": math.sqrt(sums.aa),
        "norm_b": math.sqrt(sums.bb),
        "norm_diff": math.sqrt(sums.dd),
        "cosine": sums.cosine,
        "signs": sums.signs,
        "largest": sums.largest,
        "share_changed": sums.share_changed,
    }


def check(sums, wanted):
    for name, value in found(sums).items():
        if wanted[name] is None:
            assert value is None, name
        else:
            np.testing.assert_allclose(value, wanted[name], 1e-12, 1e-14, err_msg=name)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"),
    [
        (np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float16),
        (np.int8, np.int8),
        (np.float64, ml_dtypes.float8_e4m3fn),
        (np.bool_, np.bool_),
    ],
)
def test_numbers_equal_those_of_whole_arrays(dtype_a, dtype_b, with_base, monkeypatch):
    monkeypatch.setattr(D, "_READ", 128)  # Slices and blocks that end in the middle.
    monkeypatch.setattr(D, "_BLOCK", 48)
    rng = np.random.default_rng(0)
    a = np.round(rng.normal(size=(19, 23)) * 3).astype(dtype_a)
    b = np.round(rng.normal(size=(19, 23)) * 3).astype(dtype_b)
    base = rng.normal(size=(19, 23)).astype(np.float32) if with_base else None
    views = [None if x is None else View(x) for x in (a, b, base)]
    check(D.compare(*views), oracle(a, b, base))
    assert views[0].longest == 128


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_small_and_empty_tensors(shape, value):
    a, b = np.full(shape, value, np.float32), np.full(shape, -1.0, np.float32)
    check(D.compare(View(a), View(b)), oracle(a, b))
    check(D.compare(View(a), View(a)), oracle(a, a))


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 60))
    parts = [D.compare(View(a[i::2]), View(b[i::2])) for i in range(2)]
    check(parts[0] + parts[1], oracle(a, b))


@hypothesis.given(st.integers(0, 2**31), st.floats(0.5, 4), st.integers(1, 40))
def test_symmetries(seed, scale, size):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, size))
    one, other = D.compare(View(a), View(b)), D.compare(View(b), View(a))
    assert one.cosine == other.cosine and one.signs == other.signs
    assert one.dd == other.dd and one.changed == other.changed
    scaled = D.compare(View(a), View(scale * a))
    assert scaled.cosine == pytest.approx(1) and scaled.signs == 1
    assert scaled.relative == pytest.approx(abs(scale - 1), abs=1e-12)
    opposite = D.compare(View(a), View(-a))
    assert opposite.cosine == pytest.approx(-1) and opposite.signs == 0


def test_relative_change_of_zeros():
    zero, one = np.zeros(3), np.ones(3)
    assert D.compare(View(zero), View(zero)).relative == 0
    assert D.compare(View(zero), View(one)).relative == math.inf
    assert D.compare(View(one), View(zero)).relative == 1


def test_broken_entries_are_counted_and_left_out():
    a = np.array([1.0, np.nan, np.inf, 2.0, np.nan, 5.0])
    b = np.array([1.0, np.nan, 3.0, np.nan, -np.inf, 4.0])
    sums = D.compare(View(a), View(b))
    assert (sums.nan_a, sums.inf_a, sums.nan_b, sums.inf_b) == (2, 1, 2, 1)
    assert (sums.broken_a, sums.broken_b) == (3, 3)
    assert sums.changed == 4  # NaN is NaN; 1 is 1.
    kept = D.compare(View(a[[0, 5]]), View(b[[0, 5]]))
    assert (sums.aa, sums.dd, sums.xy) == (kept.aa, kept.dd, kept.xy)
    base = np.array([0.0, 0, 0, 0, 0, np.nan])
    assert D.compare(View(a), View(b), View(base)).aa == 1


def test_complex_tensors_count_as_two_real_ones():
    a, b = np.array([1 + 2j, 3j]), np.array([1 - 2j, 3j])
    parts = [np.array([1.0, 2, 0, 3]), np.array([1.0, -2, 0, 3])]
    check(D.compare(View(a), View(b)), oracle(*parts))


def test_a_diff_lists_what_cannot_be_compared():
    a = {"both": np.ones(2), "gone": np.ones(2), "shape": np.ones((2, 3))}
    b = {"new": np.ones(2), "shape": np.ones((3, 2)), "both": np.zeros(2)}
    result = D.diff(views(a), views(b))
    assert [each.name for each in result.tensors] == ["both"]
    assert result.only_a == ("gone",) and result.only_b == ("new",)
    assert result.reshaped == {"shape": ((2, 3), (3, 2))}
    assert result.tensors[0].dtypes == ("float64", "float64")
    assert not result.with_base and result.no_base == ()


def test_with_a_base_directions_are_of_changes():
    base = {"w": np.full(4, 10.0), "odd": np.ones(3)}
    a = {"w": base["w"] + [1, 0, 0, 1], "odd": np.ones(2), "new": np.ones(2)}
    b = {"w": base["w"] + [-1, 0, 0, 1], "odd": -np.ones(2), "new": np.ones(2)}
    result = D.diff(views(a), views(b), views(base))
    by_name = {each.name: each.sums for each in result.tensors}
    assert by_name["w"].cosine == 0 and by_name["w"].signs == 0.5
    assert by_name["w"].xx == 2
    assert result.no_base == ("odd", "new")
    # What has no base counts for no direction of the whole.
    assert result.total.cosine == 0 and result.total.xx == 2
    assert result.total.size == 8 and result.total.aa == by_name["w"].aa + 4


def test_groups():
    names = ["h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "head"]
    tensors = {name: np.full(2, 1.0 + i) for i, name in enumerate(names)}
    result = D.diff(views(tensors), views(tensors))
    layers = result.groups(lambda name: numbered(name).layer)
    assert list(layers) == [0, 1]
    assert layers[0].aa == 2 * (1 + 4) and layers[1].aa == 2 * 9
    kinds = result.groups(lambda name: numbered(name).kind)
    assert kinds["attn.w"].aa == 2 * (1 + 9) and kinds["head"].aa == 2 * 16


def test_pattern_chooses_names_of_both():
    tensors = views({"a.w": np.ones(1), "b.w": np.ones(1), "a.x": np.ones(1)})
    result = D.diff(tensors, views({"b.w": np.ones(1)}), pattern=r"\.w$")
    assert [each.name for each in result.tensors] == ["b.w"]
    assert result.only_a == ("a.w",)
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        D.diff(tensors, tensors, pattern="(")
    with pytest.raises(ValueError, match="'zz' matches no tensor; there are a.w"):
        D.diff(tensors, tensors, pattern="zz")


def test_progress_counts_tensors():
    seen = []
    tensors = views({str(i): np.ones(1) for i in range(3)})
    D.diff(tensors, tensors, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
