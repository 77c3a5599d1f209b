import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import _bank_methods as M
from mtl_jax.checkpoints.source import ArrayView, TensorSpec
from mtl_jax.transforms import merging

TASKS = 3
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 1,024 and 2,048 entries: tensors end in the middle of one."""
    monkeypatch.setattr(M, "_SIZES", (1024, 2048))


def models(size, dtype=F32, seed=0, scale=0.1):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=size).astype(dtype)
    moves = scale * rng.normal(size=(TASKS, *np.shape(base)))
    still = rng.random(moves.shape) < 0.3
    still.reshape(TASKS, -1)[:, 0] = False
    moves[still] = 0
    return base, [(base + move).astype(dtype) for move in moves]


def fill(method, base, experts):
    """Parts as arrays, every entry of which was written once; and the errors."""
    specs = method.parts(
        TensorSpec(base.shape, base.dtype), [expert.dtype for expert in experts]
    )
    parts = {name: np.zeros(spec.size, spec.dtype) for name, spec in specs.items()}
    written = {name: np.zeros(spec.size, int) for name, spec in specs.items()}

    def put(name, start, values):
        assert values.dtype == specs[name].dtype and values.ndim == 1
        parts[name][start : start + values.size] = values
        written[name][start : start + values.size] += 1

    views = [ArrayView(each) for each in experts]
    errors = method.compress(ArrayView(base), views, specs, put)
    assert all((count == 1).all() for count in written.values())
    return {n: values.reshape(specs[n].shape) for n, values in parts.items()}, errors


def restore(method, base, parts, task, dtype):
    views = {name: ArrayView(values) for name, values in parts.items()}
    out = np.full(base.size, np.nan, dtype)
    for start, values in method.restore(ArrayView(base), views, task, dtype):
        assert values.dtype == dtype
        out[start : start + values.size] = values
    return out.reshape(base.shape)


def unpack(bits, size):
    return np.unpackbits(bits, axis=-1, bitorder="little", count=size).astype(bool)


def taus_of(base, experts):
    return np.stack([e.astype(np.float64) - base.astype(np.float64) for e in experts])


def relative(found, base, experts):
    """|restored - expert| / |expert - base| per task, in float64."""
    pairs = zip(found, experts, taus_of(base, experts), strict=True)
    return [
        np.linalg.norm(f.astype(np.float64) - e.astype(np.float64))
        / np.linalg.norm(tau)
        for f, e, tau in pairs
    ]


@pytest.mark.parametrize("shape", [(1,), (7,), (1024,), (53, 83)])
def test_tall_is_its_definition(shape):
    base, experts = models(shape)
    scales = (0.2, 0.4, 1.0)
    parts, errors = fill(M.Tall(scales=scales), base, experts)
    taus = taus_of(base, experts)
    merged = taus.sum(0)
    np.testing.assert_allclose(parts["merged"], merged, atol=1e-6)
    masks = unpack(parts["masks"], base.size).reshape(taus.shape)
    margin = np.abs(taus) - np.array(scales).reshape(-1, *[1] * len(shape)) * np.abs(
        merged - taus
    )
    sure = np.abs(margin) > 1e-6  # Of the others, rounding decides.
    assert (masks == (margin > 0))[sure].all() and sure.mean() > 0.6
    padding = unpack(parts["masks"], None)[:, base.size :]
    assert not padding.any()
    out = [restore(M.Tall(scales=scales), base, parts, t, F32) for t in range(TASKS)]
    for t in range(TASKS):
        wanted = base + np.where(masks[t], merged, 0)
        np.testing.assert_allclose(out[t], wanted, atol=1e-6)
    wanted = relative(out, base, experts)
    np.testing.assert_allclose(errors.relative, wanted, rtol=1e-4, atol=1e-5)


def test_tall_equals_the_pure_functions():
    base, experts = models((50, 90), seed=1)
    parts, _ = fill(M.Tall(scales=(0.4,) * TASKS), base, experts)
    taus = merging.task_vectors({"w": base}, [{"w": e} for e in experts])
    masks = merging.tall_masks(taus, scale=0.4)
    merged = merging.task_arithmetic(taus)
    np.testing.assert_array_equal(
        unpack(parts["masks"], base.size).reshape(TASKS, *base.shape), masks["w"]
    )
    for t in range(TASKS):
        delta = merging.restore_delta(merged, {"w": masks["w"][t]})["w"]
        found = restore(M.Tall(scales=(0.4,) * TASKS), base, parts, t, F32)
        np.testing.assert_array_equal(found, np.asarray(base + delta))


def test_tall_of_one_task_is_exact_in_float32():
    base, experts = models((50, 90), BF16, seed=2)
    method = M.Tall(scales=(1.0,), dtype=F32)
    parts, errors = fill(method, base, experts[:1])
    assert parts["merged"].dtype == F32 and errors.relative == [0.0]
    found = restore(method, base, parts, 0, BF16)
    np.testing.assert_array_equal(found, experts[0])


def test_tall_stores_in_the_dtype_of_the_experts():
    base, experts = models((50, 90), BF16, seed=3)
    method = M.Tall(scales=(0.4,) * TASKS)
    parts, errors = fill(method, base, experts)
    assert parts["merged"].dtype == BF16
    wide, exact = fill(M.Tall(scales=(0.4,) * TASKS, dtype=F32), base, experts)
    assert wide["merged"].dtype == F32
    # Rounding of the sum is far below what the masks lose.
    np.testing.assert_allclose(errors.relative, exact.relative, rtol=2e-2)
    spec = TensorSpec((4,), np.dtype(ml_dtypes.float8_e4m3fn))
    assert method.parts(spec, [spec.dtype] * 3)["merged"].dtype == BF16
    assert method.parts(spec, [spec.dtype, F32, BF16])["merged"].dtype == F32


@pytest.mark.parametrize("shape", [(1, 1), (53, 83)])
def test_bitdelta_is_its_definition(shape):
    base, experts = models(shape, seed=4)
    parts, errors = fill(M.BitDelta(), base, experts)
    taus = taus_of(base, experts)
    axes = tuple(range(1, taus.ndim))
    scales = np.abs(taus).mean(axes)
    np.testing.assert_allclose(parts["scales"], scales, rtol=1e-6)
    signs = unpack(parts["signs"], base.size).reshape(taus.shape)
    np.testing.assert_array_equal(signs, taus >= 0)
    assert not unpack(parts["signs"], None)[:, base.size :].any()
    out = [restore(M.BitDelta(), base, parts, t, F32) for t in range(TASKS)]
    for t in range(TASKS):
        wanted = base + scales[t] * np.where(taus[t] >= 0, 1, -1)
        np.testing.assert_allclose(out[t], wanted, atol=1e-6)
    wanted = relative(out, base, experts)
    np.testing.assert_allclose(errors.relative, wanted, rtol=1e-4, atol=2e-3)


def test_bitdelta_equals_the_pure_functions():
    base, experts = models((50, 90), seed=5)
    parts, _ = fill(M.BitDelta(), base, experts)
    taus = merging.task_vectors({"w": base}, [{"w": e} for e in experts])
    bits = merging.bitdelta(taus)
    np.testing.assert_array_equal(parts["signs"], bits.signs["w"])
    np.testing.assert_allclose(parts["scales"], bits.scales["w"], rtol=1e-5)
    for t in range(TASKS):
        delta = merging.bitdelta_restore(bits, t, {"w": jnp.asarray(base)})["w"]
        found = restore(M.BitDelta(), base, parts, t, F32)
        np.testing.assert_allclose(found, base + np.asarray(delta), atol=1e-6)


def test_bitdelta_leaves_vectors_alone():
    assert M.BitDelta().parts(TensorSpec((9,), F32), [F32]) is None


@pytest.mark.parametrize(
    "method", [M.Tall(scales=(0.4,) * TASKS), M.BitDelta()], ids=lambda m: type(m)
)
def test_experts_that_equal_the_base(method):
    base, _ = models((53, 83))
    parts, errors = fill(method, base, [base] * TASKS)
    assert errors.relative == [0.0] * TASKS
    np.testing.assert_array_equal(restore(method, base, parts, 1, F32), base)


@pytest.mark.parametrize("model", range(TASKS + 1))
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "method", [M.Tall(scales=(0.4,) * TASKS), M.BitDelta()], ids=lambda m: type(m)
)
def test_broken_values_are_refused_with_their_model(method, model, value):
    base, experts = models((53, 83))
    broken = [base, *experts]
    broken[model] = broken[model].copy()
    broken[model][40, 3] = value
    with pytest.raises(M.NotFiniteError) as error:
        fill(method, broken[0], broken[1:])
    assert error.value.model == model


def test_memory_is_bounded_by_the_chunk():
    class Counting(ArrayView):
        longest = 0

        def flat(self, start, stop):
            Counting.longest = max(Counting.longest, stop - start)
            return super().flat(start, stop)

        def whole(self):
            raise AssertionError("a whole tensor was read")

    base, experts = models((53, 83))
    for method in (M.Tall(scales=(0.4,) * TASKS), M.BitDelta()):
        views = [Counting(each) for each in experts]
        specs = method.parts(views[0].spec, [F32] * TASKS)
        method.compress(Counting(base), views, specs, lambda *_: None)
    assert Counting.longest == 2048


def test_errors_add_up():
    total = M.Errors.zero(2)
    total.add(M.Errors(np.array([1.0, 0.0]), np.array([4.0, 0.0])))
    total.add(M.Errors(np.array([3.0, 0.0]), np.array([12.0, 0.0])))
    assert total.relative == [math.sqrt(4 / 16), 0.0]
