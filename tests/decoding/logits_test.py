import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.decoding import logits as lib

pytestmark = pytest.mark.fast

# Few values, so that ties and both zeros are common.
VALUES = st.sampled_from([-3.0, -1.5, -0.5, -0.0, 0.0, 0.25, 0.5, 2.0, -np.inf])
ROWS = st.lists(VALUES, min_size=6, max_size=6).filter(lambda r: max(r) > -np.inf)


@jax.jit
def run(processor, x):
    return processor(x)


def kept(processor, row):
    out = np.asarray(run(processor, np.array([row], np.float32)))[0]
    keep = out > -np.inf
    np.testing.assert_array_equal(out[keep], np.array(row, np.float32)[keep])
    return keep


def softmax(row):
    e = np.exp(np.array(row, np.float64) - max(row))
    return e / e.sum()


@given(ROWS, st.integers(1, 8))
def test_top_k_keeps_the_k_best_and_their_equals(row, k):
    row = np.array(row)
    border = np.sort(row)[::-1][min(k, 6) - 1]
    np.testing.assert_array_equal(
        kept(lib.top_k(k), row), (row >= border) & (row > -np.inf)
    )


@given(ROWS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_upper_set_of_that_mass(row, p):
    mass = softmax(row)
    levels = sorted(set(mass[mass > 0]), reverse=True)
    sums = [mass[mass >= level].sum() for level in levels]
    if any(abs(s - p) < 1e-5 for s in sums):
        p = p / 2 + 1e-3  # Rounding decides at the border.
        if any(abs(s - p) < 1e-5 for s in sums):
            return
    border = next((level for level, s in zip(levels, sums, strict=True) if s >= p), 0)
    want = (mass >= border) & (mass > 0)
    np.testing.assert_array_equal(kept(lib.top_p(p), row), want)


def test_top_p_of_one_keeps_what_rounds_to_nothing():
    row = [50.0, 0.0, -50.0, 49.0]
    assert kept(lib.top_p(1.0), row).all()
    assert kept(lib.top_p(0.999), row).tolist() == [True, False, False, True]


@given(ROWS, st.floats(0.02, 1.0))
def test_min_p_is_a_share_of_the_best(row, p):
    mass = softmax(row)
    share = mass / mass.max()
    if np.min(np.abs(share - p)) < 1e-5:
        return
    np.testing.assert_array_equal(kept(lib.min_p(p), row), share >= p)


@given(ROWS, st.sampled_from(["top_k", "top_p", "min_p"]))
def test_a_row_keeps_a_token_that_it_had(row, name):
    hardest = getattr(lib, name)({"top_k": 1, "top_p": 1e-6, "min_p": 1.0}[name])
    keep = kept(lib.chain(hardest, hardest), row)
    assert keep.any() and keep[np.argmax(row)]


def test_parameters_per_row():
    x = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 2))
    out = lib.top_k(jnp.array([1, 2]))(x)
    assert (out > -jnp.inf).sum(axis=1).tolist() == [1, 2]
    out = lib.top_p(jnp.array([0.9, 0.4]))(x)
    assert (out > -jnp.inf).sum(axis=1).tolist() == [3, 1]
    np.testing.assert_allclose(
        lib.temperature(jnp.array([0.5, 2.0]))(x), x * np.array([[2.0], [0.5]])
    )


def context(prompts, generated, step):
    """Ragged prompts; the buffer of what was generated is longer than `step`."""
    ids = np.full((len(prompts), max(map(len, prompts)) + 1), 5, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return lib.Context(
        jnp.array(ids),
        jnp.array([len(p) for p in prompts]),
        jnp.array(generated, jnp.int32),
        jnp.int32(step),
    )


def test_repetition_penalty_touches_what_was_seen_only():
    seen = context([[0], [1, 2]], [[3, 4], [0, 4]], 1)
    x = jnp.array([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]] * 2)
    out = lib.repetition_penalty(2.0)(x, seen)
    want = [[0.5, 1, -1, -2, 1, 1], [0.5, 0.5, -2, -1, 1, 1]]
    np.testing.assert_allclose(out, want)


def allowed(processor, generated, step, width=4):
    ctx = context([[0]], [list(generated) + [0] * (width - len(generated))], step)
    out = np.asarray(processor(jnp.zeros((1, 8)), ctx))[0]
    return set(np.flatnonzero(out > -np.inf))


def test_choices_are_a_trie():
    tree = lib.choices([[1, 2], [1, 3, 4], [1], [5]], end=7)
    assert allowed(tree, [], 0) == {1, 5}
    assert allowed(tree, [1], 1) == {2, 3, 7}
    assert allowed(tree, [1, 3], 2) == {4}
    assert allowed(tree, [1, 2], 2) == {7}
    assert allowed(tree, [5], 1) == {7}
    assert allowed(tree, [1, 3, 4], 3) == {7}
    # Left the trie, or past its end: nothing.
    assert allowed(tree, [2], 1) == set()
    assert allowed(tree, [5, 7], 2) == set()
    assert allowed(tree, [1, 3, 4, 7], 4) == set()
    # A buffer narrower than the candidates.
    assert allowed(tree, [1], 1, width=1) == {2, 3, 7}


def test_values_need_no_new_compilation():
    @jax.jit
    def run(processor, x):
        return processor(x)

    def make(t, k, p, ban):
        return lib.chain(
            lib.temperature(t), lib.top_k(k), lib.top_p(p), lib.banned([ban])
        )

    x = jnp.array([[0.0, 1.0, 2.0, 3.0]])
    first = run(make(0.5, 2, 0.9, 0), x)
    second = run(make(1.5, 4, 1.0, 3), x)
    assert run._cache_size() == 1
    np.testing.assert_allclose(first, make(0.5, 2, 0.9, 0)(x))
    np.testing.assert_allclose(second, [[0, 1 / 1.5, 2 / 1.5, -np.inf]])


def test_half_precision_comes_out_as_float32_and_nan_stays():
    x = jnp.array([[1.0, jnp.nan, 0.0]], jnp.bfloat16)
    for processor in (lib.top_k(1), lib.top_p(0.5), lib.min_p(0.5)):
        out = processor(x)
        assert out.dtype == jnp.float32 and bool(jnp.isnan(out).any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lib.temperature(0.0), "temperature: must be finite, above 0, is 0"),
        (lambda: lib.temperature(float("inf")), "temperature"),
        (lambda: lib.top_k(0), "k must be 1 or more"),
        (lambda: lib.top_p(1.5), "top_p: must be finite, above 0 and at most 1"),
        (lambda: lib.min_p(0), "min_p"),
        (lambda: lib.banned([3, -1]), "banned: .* found -1"),
        (lambda: lib.choices([], 1), "one or more candidates"),
        (lambda: lib.choices([[1], []], 1), "one or more tokens"),
        (lambda: lib.chain(abs), "wanted processors"),
        (lambda: lib.top_k(1)(jnp.zeros(3)), r"wanted \[B, V\]"),
        (lambda: lib.choices([[1]], 2)(jnp.zeros((1, 3))), "needs a context"),
        (
            lambda: lib.Processor(lambda x, c: x[:, :1])(jnp.zeros((1, 3))),
            r"makes \(1, 1\) of logits \(1, 3\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
