import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import _bank_methods as M
from mtl_jax.checkpoints._bank_rmm import Rmm
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
TASKS, SHAPE = 3, (24, 40)


def experts_of(base, rank, seed=0, tasks=TASKS):
    """Changes of exactly this rank."""
    rng = np.random.default_rng(seed)
    rows, columns = base.shape[0], base.size // base.shape[0]
    moves = rng.normal(size=(tasks, rows, rank)) @ rng.normal(
        size=(tasks, rank, columns)
    )
    return [(base + m.reshape(base.shape)).astype(base.dtype) for m in moves]


def fill(method, base, experts):
    spec = TensorSpec(base.shape, base.dtype)
    specs = method.parts(spec, [e.dtype for e in experts])
    parts = {}

    def put(name, start, values):
        assert start == 0 and values.size == specs[name].size
        parts[name] = ArrayView(values.reshape(specs[name].shape))

    errors = method.compress(ArrayView(base), list(map(ArrayView, experts)), specs, put)
    assert {n: v.spec for n, v in parts.items()} == specs
    return parts, errors


def restore(method, base, parts, task, dtype=F32):
    ((start, values),) = method.restore(ArrayView(base), parts, task, dtype)
    assert start == 0 and values.dtype == dtype
    return values.reshape(base.shape)


@pytest.fixture(scope="module")
def base():
    return np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def experts(base):
    return experts_of(base, rank=2)


def oracle(base, experts, rank, p):
    """SVD, then the closed form at every position, in float64 loops."""
    a, b = [], []
    for expert in experts:
        tau = (expert.astype(np.float64) - base).reshape(base.shape[0], -1)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        a.append(u[:, :rank] * np.sqrt(s[:rank]))
        b.append((np.sqrt(s[:rank])[:, None] * vt[:rank]).T)

    def shared(factors):  # [T, positions, r]
        out = np.zeros_like(factors)
        for i in range(factors.shape[1]):
            x = factors[:, i].T
            mu = x.mean(1, keepdims=True)
            w = np.linalg.svd(x - mu, full_matrices=False)[0][:, :p]
            out[:, i] = (mu + w @ (w.T @ (x - mu))).T
        return out

    pairs = zip(shared(np.stack(a)), shared(np.stack(b)), strict=True)
    return [x @ y.T for x, y in pairs]


@pytest.mark.parametrize("shape", [SHAPE, (24, 5, 8)])
def test_full_basis_and_rank_are_exact(base, experts, shape):
    base, experts = base.reshape(shape), [e.reshape(shape) for e in experts]
    method = Rmm(rank=2, basis=2, svd="svd")
    parts, errors = fill(method, base, experts)
    assert max(errors.relative) < 1e-5
    for t in (0, TASKS - 1):
        np.testing.assert_allclose(
            restore(method, base, parts, t), experts[t], atol=1e-4
        )


def test_errors_are_those_of_what_is_restored(base, experts):
    method = Rmm(rank=2, basis=1, svd="svd")
    parts, errors = fill(method, base, experts)
    for t in range(TASKS):
        found = restore(method, base, parts, t)
        lost = np.linalg.norm(found - experts[t]) / np.linalg.norm(experts[t] - base)
        np.testing.assert_allclose(errors.relative[t], lost, rtol=1e-4)
    assert min(errors.relative) > 0.01


def test_equals_the_closed_form_up_to_the_sign_of_singular_vectors(base):
    # Of one direction each, signs chosen alike: then the bases are the same, too.
    experts = experts_of(base, rank=1, seed=3, tasks=1) * 2
    experts.append(experts_of(base, rank=1, seed=3, tasks=1)[0] * 0.5 + 0.5 * base)
    method = Rmm(rank=1, basis=0, svd="svd")
    parts, _ = fill(method, base, experts)
    wanted = oracle(base, experts, rank=1, p=0)
    for t in range(3):
        np.testing.assert_allclose(
            restore(method, base, parts, t) - base, wanted[t], atol=1e-4
        )


def test_alignment_does_not_change_what_a_full_basis_restores(base, experts):
    method = Rmm(rank=2, basis=2, svd="svd", align=True)
    _, errors = fill(method, base, experts)
    assert max(errors.relative) < 1e-5


def test_alignment_gives_equal_changes_one_gauge(base):
    changed = experts_of(base, rank=2, tasks=1)[0]
    mirrored = [changed, 2 * base - changed]  # tau and -tau.
    lost = [
        max(fill(Rmm(rank=2, basis=1, align=align), base, mirrored)[1].relative)
        for align in (False, True)
    ]
    assert lost[1] < 1e-4  # On one line: a basis of one vector is enough.


@pytest.mark.parametrize("tasks", [1, 3])
def test_equal_experts_need_no_basis(base, tasks):
    experts = experts_of(base, rank=2, tasks=1) * tasks
    parts, errors = fill(Rmm(rank=2, basis=4, svd="svd"), base, experts)
    assert max(errors.relative) < 1e-5
    if tasks == 1:  # No vectors: everything is in the mean.
        assert parts["a.basis"].spec.shape == (24, 2, 0)


def test_experts_that_equal_the_base(base):
    method = Rmm(rank=2, basis=1)
    parts, errors = fill(method, base, [base] * 3)
    assert errors.relative == [0.0] * 3
    np.testing.assert_array_equal(restore(method, base, parts, 2), base)


def test_the_bank_has_the_dtype_of_the_experts(base, experts):
    narrow = [expert.astype(BF16) for expert in experts]
    method = Rmm(rank=2, basis=2, svd="svd")
    parts, errors = fill(method, base.astype(BF16), narrow)
    assert {view.spec.dtype for view in parts.values()} == {BF16}
    assert 1e-4 < max(errors.relative) < 3e-2
    found = restore(method, base.astype(BF16), parts, 2, BF16)
    np.testing.assert_allclose(
        found.astype(np.float32), narrow[2].astype(np.float32), atol=0.3
    )


@pytest.mark.parametrize("shape", [(40,), (3, 3), (2, 1)])
def test_what_would_take_more_room_is_left(shape):
    assert Rmm(rank=4, basis=4).parts(TensorSpec(shape, F32), [F32] * 3) is None


@pytest.mark.parametrize("model", [0, 2])
def test_broken_values_are_refused_with_their_model(base, experts, model):
    models = [base.copy(), *experts]
    models[model] = models[model].copy()
    models[model][3, 4] = np.nan
    with pytest.raises(M.NotFiniteError) as error:
        fill(Rmm(rank=2, basis=1), models[0], models[1:])
    assert error.value.model == model
