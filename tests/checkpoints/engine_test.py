"""Streamed merges against the definitions, computed in float64 as a whole."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import engine, rules
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

CHUNK = 64  # One size, so that programs are shared.
BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (7, 24)


class Sink:
    """A writer into memory."""

    def __init__(self, done=()):
        self.done, self.parts = frozenset(done), {}

    def write(self, name, start, values):
        self.parts.setdefault(name, []).append((start, np.array(values)))

    def tensor(self, name):
        parts = sorted(self.parts[name], key=lambda part: part[0])
        ends = [start + values.size for start, values in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]]  # Without gaps.
        return np.concatenate([values for _, values in parts])


def make_job(rule, arrays, *, name="w", dtype=None, base=True, **options):
    views = [ArrayView(np.asarray(a)) for a in arrays]
    takes = base and rules.RULES[rule].takes_base
    return rules.Job(
        name=name,
        spec=TensorSpec(views[0].spec.shape, np.dtype(dtype or views[0].spec.dtype)),
        rule=rule,
        base=views[0] if takes else None,
        experts=tuple(views[1:] if takes else views),
        options=options,
    )


def merge(rule, arrays, *, chunk=CHUNK, seed=0, threads=1, **more):
    """One tensor through the engine."""
    job = make_job(rule, arrays, **more)
    sink = Sink()
    engine.run([job], sink, chunk=chunk, seed=seed, threads=threads)
    if not job.size:
        return np.zeros(job.spec.shape, job.spec.dtype)
    return sink.tensor("w").reshape(job.spec.shape)


def models(seed=0, count=4, shape=SHAPE, spread=0.1, dtype=np.float32):
    """A base and its fine-tunings."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape)
    rest = [base + spread * rng.normal(size=shape) for _ in range(count - 1)]
    return [np.asarray(x).astype(np.float32).astype(dtype) for x in (base, *rest)]


def wide(arrays):
    return [np.asarray(a).astype(np.float64) for a in arrays]


def top(values, k):
    """Mask of the k largest magnitudes."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-np.abs(values).ravel(), kind="stable")[:k]] = True
    return mask.reshape(values.shape)


def fuse(base, deltas, weights, normalize, scale, elect):
    """Task arithmetic with elected signs or without."""
    values = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    weights = np.reshape(weights, (-1, *(1,) * base.ndim))
    mask = np.ones(values.shape)
    if elect:
        mask = np.sign(values) == np.where(values.sum(0) >= 0, 1, -1)
    total, share = (values * mask).sum(0), (weights * mask).sum(0)
    return base + scale * (
        total / np.where(share == 0, 1, share) if normalize else total
    )


WEIGHTS = (0.5, 1.0, 0.7)


def oracle_trimmed(arrays, elect, normalize, density=1.0, gamma=None, scale=1.0):
    base, *rest = wide(arrays)
    deltas = []
    for x in rest:
        size, kept = base.size, int(density * base.size)
        first = int(gamma * size) if gamma else 0
        bottom = max(size - kept - first, 0)
        first = size - kept - bottom
        delta = x - base
        deltas.append(delta * (top(delta, size - bottom) & ~top(delta, first)))
    return fuse(base, deltas, WEIGHTS, normalize, scale, elect)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("rule", "elect", "options"),
    [
        ("task_arithmetic", False, {}),
        ("ties", True, {"density": 0.3}),
        ("ties", True, {"density": 1.0}),
        ("breadcrumbs", False, {"density": 0.5, "gamma": 0.05}),
        ("breadcrumbs_ties", True, {"density": 0.5, "gamma": 0.05}),
        ("breadcrumbs", False, {"density": 0.98, "gamma": 0.05}),
        ("breadcrumbs", False, {"density": 0.9, "gamma": 0.001}),
    ],
)
def test_trimmed(rule, elect, normalize, options):
    arrays = models()
    found = merge(
        rule, arrays, weight=WEIGHTS, normalize=normalize, **options, **{"lambda": 0.8}
    )
    wanted = oracle_trimmed(arrays, elect, normalize, scale=0.8, **options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear(normalize):
    arrays = models()
    weights = (0.1, 0.5, 2.0, 0.7)
    found = merge("linear", arrays, weight=weights, normalize=normalize)
    wanted = sum(w * x for w, x in zip(weights, wide(arrays), strict=True))
    wanted = wanted / (sum(weights) if normalize else 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def arc(t, a, b, above):
    """Interpolation along the great circle of two vectors."""
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > above:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.001])
def test_slerp(spread):
    arrays = models(count=2, spread=spread)
    found = merge("slerp", arrays, t=0.3)
    wanted = arc(0.3, *wide(arrays), above=0.9995)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_nuslerp_of_models_and_of_task_vectors():
    arrays = models(count=3)
    base, a, b = wide(arrays)
    t = 1.5 / 2
    found = merge("nuslerp", arrays[1:], base=False, weight=(0.5, 1.5))
    np.testing.assert_allclose(found, arc(t, a, b, 1), rtol=0, atol=1e-5)
    found = merge("nuslerp", arrays, weight=(0.5, 1.5))
    wanted = base + arc(t, a - base, b - base, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_nuslerp_by_rows_and_by_columns():
    arrays = models(count=2, spread=1.0)
    a, b = wide(arrays)
    for axis, row_wise in ((0, False), (1, True)):
        pairs = zip(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), strict=True)
        wanted = np.moveaxis([arc(0.5, x, y, 1) for x, y in pairs], 0, axis)
        found = merge(
            "nuslerp",
            arrays,
            base=False,
            weight=1.0,
            nuslerp_flatten=False,
            nuslerp_row_wise=row_wise,
        )
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def oracle_multislerp(vectors, weights, eps=1e-8):
    """As mergekit writes it, tangent space and all."""
    flat = [v.ravel() for v in vectors]
    lengths = [np.linalg.norm(v) for v in flat]
    unit = [v / (n + eps) for v, n in zip(flat, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, unit, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(
        w * (u - (u @ mean) * mean) for w, u in zip(weights, unit, strict=True)
    )
    norm = np.linalg.norm(tangent) + eps
    result = mean * np.cos(norm) + tangent * (np.sin(norm) / norm)
    size = sum(w * n for w, n in zip(weights, lengths, strict=True))
    return (result * size).reshape(vectors[0].shape)


def test_multislerp():
    arrays = models(spread=1.0)
    base, *rest = wide(arrays)
    weights = np.array(WEIGHTS) / sum(WEIGHTS)
    found = merge("multislerp", arrays, weight=WEIGHTS)
    wanted = base + oracle_multislerp([x - base for x in rest], weights)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    found = merge("multislerp", arrays[1:], base=False, weight=WEIGHTS)
    wanted = oracle_multislerp(rest, weights)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def oracle_karcher(vectors, steps, tolerance):
    unit = [v.ravel() / np.linalg.norm(v) for v in vectors]
    u = sum(unit) / len(unit)
    u = u / np.linalg.norm(u)
    for _ in range(steps):
        tangent = np.zeros_like(u)
        for v in unit:
            angle = np.arccos(np.clip(u @ v, -1, 1))
            if angle >= tolerance:
                tangent += angle / np.sin(angle) * (v - (u @ v) * u) / len(unit)
        norm = np.linalg.norm(tangent)
        if norm < tolerance:
            break
        u = np.cos(norm) * u + np.sin(norm) * tangent / norm
        u = u / np.linalg.norm(u)
    return (np.mean([np.linalg.norm(v) for v in vectors]) * u).reshape(vectors[0].shape)


@pytest.mark.parametrize("spread", [2.0, 0.1])
def test_karcher(spread):
    arrays = models(spread=spread)
    found = merge("karcher", arrays, max_iter=10, tol=1e-5)
    wanted = oracle_karcher(wide(arrays), 10, 1e-5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def oracle_model_stock(arrays, rows):
    base, *rest = wide(arrays)
    shape = base.shape
    view = (-1, shape[-1]) if rows else (1, -1)
    deltas = [(x - base).reshape(view) for x in rest]
    cosines = [
        (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        for a, b in itertools.combinations(deltas, 2)
    ]
    cosine, count = np.mean(cosines, 0)[:, None], len(rest)
    t = count * cosine / (1 + (count - 1) * cosine)
    return base + (t * np.mean(deltas, 0)).reshape(shape)


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock(rows):
    arrays = models(1)
    shift = 0.3 * np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    arrays[1:] = [x + shift for x in arrays[1:]]
    found = merge("model_stock", arrays, filter_wise=rows)
    wanted = oracle_model_stock(arrays, rows)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_nearswap():
    arrays = models(count=2)
    a, b = wide(arrays)
    weight = np.clip(0.05 / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    wanted = weight * b + (1 - weight) * a
    np.testing.assert_allclose(merge("nearswap", arrays, t=0.05), wanted, atol=1e-5)


def oracle_ram(arrays, epsilon, boost):
    base, *rest = wide(arrays)
    deltas = np.stack([x - base for x in rest])
    moved = np.abs(deltas) > epsilon
    count = moved.sum(0)
    shared = (moved & (count > 1)).sum((1, 2))
    unique = (moved & (count == 1)).sum((1, 2))
    factor = np.ones(len(rest))
    if boost is not None:
        factor += boost[0] * np.clip(shared / np.maximum(unique, epsilon), 0, boost[1])
    single = deltas * moved * (count == 1) * factor[:, None, None]
    both = deltas * moved * (count > 1) / np.maximum(count, 1)
    return base + (single + both).sum(0)


def test_ram():
    arrays, epsilon = models(3), 0.08
    found = merge("ram", arrays, epsilon=epsilon)
    np.testing.assert_allclose(found, oracle_ram(arrays, epsilon, None), atol=1e-5)
    found = merge("ramplus_tl", arrays, epsilon=epsilon, r=0.5, alpha=3.0)
    wanted = oracle_ram(arrays, epsilon, (0.5, 3.0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def oracle_sce(arrays, share):
    base, *rest = wide(arrays)
    deltas = np.stack([x - base for x in rest])
    if share < 1:
        variance = deltas.var(0)
        deltas = deltas * top(variance, int(np.count_nonzero(variance) * share))
    weights = (deltas**2).mean((1, 2))
    weights = weights / weights.sum() if weights.sum() >= 1e-6 else np.full(3, 1 / 3)
    mask = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    shares = weights[:, None, None] * mask
    return base + (deltas * shares).sum(0) / np.maximum(shares.sum(0), 1e-6)


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("spread", [0.1, 1e-4])
def test_sce(share, spread):
    arrays = models(spread=spread)
    arrays[1][:2], arrays[2][:2], arrays[3][:2] = (arrays[0][:2],) * 3
    found = merge("sce", arrays, select_topk=share)
    np.testing.assert_allclose(found, oracle_sce(arrays, share), rtol=0, atol=1e-5)


def test_magmax():
    arrays = models()
    base, *rest = wide(arrays)
    deltas = np.stack([x - base for x in rest])
    best = np.take_along_axis(deltas, np.abs(deltas).argmax(0)[None], 0)[0]
    found = merge("magmax", arrays, **{"lambda": 0.5})
    np.testing.assert_allclose(found, base + 0.5 * best, rtol=0, atol=1e-5)


def test_passthrough():
    (array,) = models(count=1, dtype=BF16)
    assert (merge("passthrough", [array]) == array).all()
    found = merge("passthrough", [array], scale=0.5, dtype=np.float32)
    np.testing.assert_array_equal(found, 0.5 * array.astype(np.float32))


RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.mark.parametrize("rule", RANDOM)
@pytest.mark.parametrize("rescale", ["none", "l1", "probability"])
def test_random_selection_is_a_mask_rescaled(rule, rescale):
    """Of one model: the share kept, and what it is multiplied by."""
    arrays = models(count=2, shape=(40, 50))
    options = {"density": 0.6, "weight": 1.0, "rescale": rescale, "normalize": False}
    base, other = wide(arrays)
    delta = other - base
    found = merge(rule, arrays, **options).astype(np.float64) - base
    factor = found / delta
    kept = np.abs(factor) > 0.01
    assert abs(kept.mean() - 0.6) < 0.06  # Five standard deviations.
    if rescale == "l1":
        np.testing.assert_allclose(np.abs(found).sum(), np.abs(delta).sum(), rtol=1e-4)
    elif rescale == "none":
        np.testing.assert_allclose(factor[kept], 1, atol=2e-3)
    elif rule.startswith("dare"):
        np.testing.assert_allclose(factor[kept], 1 / 0.6, atol=2e-3)
    else:
        chance = 0.45 + 0.3 * np.argsort(np.argsort(np.abs(delta))) / 49
        np.testing.assert_allclose(factor[kept], 1 / chance[kept], atol=5e-3)


@pytest.mark.parametrize("rule", RANDOM)
def test_draws_depend_on_seed_tensor_and_model(rule):
    array, *_ = models(count=1, shape=(40, 50))
    # Equal magnitudes: only what is drawn tells entries apart.
    other = array + np.float32(1)
    options = {"weight": (1.0, 10.0), "density": 0.5, "rescale": "none"}

    def bits(seed=0, name="w"):
        job = make_job(rule, [array, other, other], name=name, **options)
        sink = Sink()
        engine.run([job], sink, chunk=CHUNK, seed=seed, threads=1)
        return sink.tensor(name) - array.ravel() > 0.5

    first = merge(rule, [array, other, other], normalize=False, **options) - array
    one, ten = np.round(first).astype(int) % 2 == 1, first > 5
    assert 0.4 < (one == ten).mean() < 0.6
    assert (bits() == bits()).all()
    assert (bits() != bits(seed=1)).any()
    assert (bits() != bits(name="v")).any()


@pytest.fixture(scope="module")
def folder():
    """Tensors of many shapes, four models."""
    shapes = {"a": (7, 24), "b": (1, 200), "c": (130,), "d": (), "e": (0, 5), "f": (1,)}
    shapes |= {"g": (5, 1), "h": (2, 3, 4)}
    return {
        n: models(i, 4, shape, dtype=BF16)
        for i, (n, shape) in enumerate(shapes.items())
    }


REQUIRED = {
    "slerp": {"t": 0.4},
    "nearswap": {"t": 0.05},
    "linear": {"weight": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "ties": {"density": 0.4, "scope": "model"},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.4},
    "della_linear": {"density": 0.4, "rescale": "probability"},
    "breadcrumbs": {"density": 0.4},
    "breadcrumbs_ties": {"density": 0.4},
    "sce": {"select_topk": 0.5},
}
STREAMED = [name for name, rule in rules.RULES.items() if not rule.whole]


def run_all(rule, tensors, **more):
    limit = rules.RULES[rule].max_experts
    options = dict(REQUIRED.get(rule, {}))
    if "weight" in rules.RULES[rule].options:
        options.setdefault("weight", 0.7)
    takes = rules.RULES[rule].takes_base
    jobs = [
        make_job(rule, arrays[: (limit or 9) + takes], name=name, **options)
        for name, arrays in tensors.items()
    ]
    sink = Sink()
    summary = engine.run(jobs, sink, seed=3, **more)
    return sink, summary


@pytest.mark.parametrize("rule", STREAMED)
def test_chunks_and_threads_change_nothing(rule, folder):
    """Not a bit with threads; rounding of statistics with other chunks."""
    one, summary = run_all(rule, folder, chunk=CHUNK, threads=1)
    two, _ = run_all(rule, dict(reversed(folder.items())), chunk=CHUNK, threads=3)
    whole, _ = run_all(rule, folder, chunk=256, threads=1)
    assert summary.counts == {rule: len(folder)}
    assert set(one.parts) == {name for name, arrays in folder.items() if arrays[0].size}
    for name in one.parts:
        assert one.tensor(name).dtype == BF16
        assert np.isfinite(one.tensor(name).astype(np.float32)).all()
        assert (one.tensor(name) == two.tensor(name)).all()
        np.testing.assert_allclose(
            one.tensor(name).astype(np.float32),
            whole.tensor(name).astype(np.float32),
            rtol=2**-7,
            atol=1e-6,
        )


@pytest.mark.parametrize("rule", STREAMED)
@pytest.mark.parametrize("case", ["equal", "opposite"])
def test_zero_and_opposite_task_vectors(rule, case):
    array, other = models(count=2, shape=(5, 24))
    delta = np.float32(0) if case == "equal" else np.round(other - array, 2)
    array = np.round(array, 2).astype(np.float32)
    arrays = [array, array + delta, array - delta, array + delta]
    sink, _ = run_all(rule, {"w": arrays}, chunk=CHUNK, threads=1)
    found = sink.tensor("w")
    assert np.isfinite(found).all()
    if case == "equal" and rules.RULES[rule].needs_base:
        np.testing.assert_allclose(found, array.ravel(), rtol=0, atol=1e-6)
    assert np.abs(found).max() < 10


def test_slerp_of_zeros_and_models_that_cancel():
    array, *_ = models(count=1)
    zero = np.zeros_like(array)
    assert (merge("slerp", [zero, zero], t=0.5) == 0).all()
    np.testing.assert_allclose(merge("slerp", [array, zero], t=0.25), 0.75 * array)
    pair = [array, -array]
    found = merge("multislerp", pair, base=False, weight=(0.5, 0.5))
    np.testing.assert_allclose(found, 0, atol=1e-6)
    assert np.isfinite(merge("karcher", pair)).all()


def test_model_stock_near_its_pole():
    """Two opposite task vectors have cosine -1, where the ratio divides by zero."""
    array, other = models(count=2)
    found = merge("model_stock", [array, other, 2 * array - other])
    np.testing.assert_allclose(found, array, atol=1e-5)


def test_ties_over_the_model_is_ties_of_the_concatenation(folder):
    options = {"weight": 1.0, "density": 0.3}
    parts = {n: [a.astype(np.float32) for a in arrays] for n, arrays in folder.items()}
    jobs = [
        make_job("ties", arrays, name=name, scope="model", **options)
        for name, arrays in parts.items()
    ]
    sink = Sink()
    engine.run(jobs, sink, chunk=CHUNK)
    names = sorted(sink.parts)
    joined = [np.concatenate([parts[n][i].ravel() for n in names]) for i in range(4)]
    wanted = merge("ties", joined, **options)
    found = np.concatenate([sink.tensor(name) for name in names])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_equals_are_kept_in_order_until_there_are_enough():
    base = np.zeros((10, 20), np.float32)
    delta = np.ones((10, 20), np.float32)
    delta[3, 4], delta[5] = 2, 0
    found = merge("ties", [base, delta], weight=1.0, density=0.4, normalize=False)
    wanted = (delta == 1) & (np.cumsum(delta.ravel() == 1) <= 79).reshape(delta.shape)
    np.testing.assert_array_equal(found != 0, wanted | (delta == 2))


@pytest.mark.parametrize("stored", [np.float16, np.float32, BF16, np.float64])
@pytest.mark.parametrize("out", [np.float16, np.float32, BF16, np.float64])
def test_dtypes(stored, out):
    arrays = models(dtype=stored, count=3)
    found = merge("task_arithmetic", arrays, weight=1.0, dtype=out)
    base, a, b = wide(arrays)
    assert found.dtype == out
    step = {2: 2**-7, 4: 1e-5, 8: 1e-5}[np.dtype(out).itemsize]
    np.testing.assert_allclose(
        found.astype(np.float64), a + b - base, rtol=0, atol=step * 4
    )


def test_models_of_different_dtypes():
    arrays = [
        a.astype(d)
        for a, d in zip(models(count=3), (BF16, np.float16, np.float32), strict=True)
    ]
    base, a, b = wide(arrays)
    found = merge("task_arithmetic", arrays, weight=1.0, dtype=np.float32)
    np.testing.assert_allclose(found, a + b - base, rtol=0, atol=1e-5)


def test_task_vectors_are_not_rounded_to_the_stored_dtype():
    """The difference of two bfloat16 numbers has more digits than bfloat16."""
    base = np.array([1.0, 256.0], BF16)
    other = np.array([0.00390625, 1.0], BF16)
    found = merge("task_arithmetic", [base, other], weight=1.0, dtype=np.float32)
    np.testing.assert_array_equal(found, other.astype(np.float32))


def test_integers_are_copied_where_equal():
    ids = np.arange(200).reshape(10, 20)
    assert (merge("ties", [ids, ids, ids], weight=1.0) == ids).all()
    other = ids.copy()
    other[9, 9] += 1
    with pytest.raises(ValueError, match=r"'w' is int64 and differs .* expert 1"):
        merge("ties", [ids, ids, other], weight=1.0)
    flags = ids > 7
    assert (merge("linear", [flags, flags], weight=1.0) == flags).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_values_that_are_not_finite_are_refused(bad, dtype):
    arrays = models(dtype=dtype)
    arrays[2] = arrays[2].copy()
    arrays[2][6, 20] = bad
    with pytest.raises(ValueError, match="ties: 'w': NaN or infinity in expert 1"):
        merge("ties", arrays, weight=1.0, density=0.5)


def test_results_out_of_range_are_refused():
    arrays = [np.full(10, 6e4, np.float16)] * 2
    with pytest.raises(ValueError, match="result is not finite in float16"):
        merge("linear", arrays, weight=1.0, normalize=False)


def test_a_failure_ends_the_run(folder):
    arrays = {n: [a.astype(np.float32) for a in arrays] for n, arrays in folder.items()}
    arrays["a"][1][0, 0] = np.nan
    seen = []
    with pytest.raises(ValueError, match="'a': NaN or infinity in expert 0"):
        run_all(
            "task_arithmetic", arrays, threads=1, progress=lambda *a: seen.append(a)
        )
    assert not [s for s in seen if s[0] == s[1]]


def test_done_tensors_are_left_out_and_progress_counts_the_rest(folder):
    jobs = [
        make_job("task_arithmetic", arrays, name=name, weight=1.0)
        for name, arrays in folder.items()
    ]
    sink, seen = Sink(done=["a", "c"]), []
    summary = engine.run(jobs, sink, chunk=CHUNK, progress=lambda *a: seen.append(a))
    assert not {"a", "c"} & set(sink.parts)
    wanted = sum(2 * arrays[0].size for n, arrays in folder.items() if n not in "ac")
    assert seen[-1] == (wanted, wanted) and summary.bytes_written == wanted
    assert summary.bytes_read == 4 * wanted


def test_resumed_scope_of_the_model_counts_what_is_done(folder):
    """What is kept of the rest does not depend on what was written before."""
    jobs = [
        make_job("ties", arrays, name=n, weight=1.0, density=0.3, scope="model")
        for n, arrays in folder.items()
    ]
    whole, rest = Sink(), Sink(done=["a"])
    engine.run(jobs, whole, chunk=CHUNK)
    engine.run(jobs, rest, chunk=CHUNK)
    assert set(whole.parts) - set(rest.parts) == {"a"}
    for name in rest.parts:
        assert (whole.tensor(name) == rest.tensor(name)).all()
