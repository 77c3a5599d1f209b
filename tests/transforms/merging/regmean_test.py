"""RegMean against least squares in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging


def draw(seed, T=3, side=4, out=2, rows=9):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(T, side, side))
    return rng.normal(size=(T, side, out)), rng.normal(size=(T, rows, side)) @ mix


def grams(x):
    return np.einsum("tni,tnj->tij", x, x)


def run(kernels, gram, **options):
    taus = {"w": jnp.asarray(kernels, jnp.float32)}
    gram = {"w": jnp.asarray(gram, jnp.float32)}
    return np.asarray(merging.regmean(taus, gram, **options)["w"])


def test_is_the_least_squares_solution():
    kernels, x = draw(0)
    weights = [1.0, 0.5, 2.0]
    roots = np.sqrt(weights)[:, None, None]
    inputs = (roots * x).reshape(-1, 4)
    outputs = (roots * (x @ kernels)).reshape(-1, 2)
    want = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    got = run(kernels, grams(x), alpha=1.0, weights=weights)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_alpha_and_jitter_are_the_definition(alpha):
    kernels, x = draw(1)
    cut = grams(x) * (alpha + (1 - alpha) * np.eye(4))
    want = np.linalg.solve(cut.sum(0), (cut @ kernels).sum(0))
    np.testing.assert_allclose(run(kernels, grams(x), alpha=alpha), want, atol=1e-4)
    total = cut.sum(0)
    pull = 0.5 * np.trace(total) / 4 * np.eye(4)
    want = np.linalg.solve(
        total + pull, (cut @ kernels).sum(0) + pull @ kernels.mean(0)
    )
    got = run(kernels, grams(x), alpha=alpha, jitter=0.5)
    np.testing.assert_allclose(got, want, atol=1e-4)


@hypothesis.given(st.integers(0, 999), st.sampled_from([1e-6, 1e6]))
def test_algebra(seed, factor):
    kernels, x = draw(seed)
    gram = grams(x)
    base = run(kernels, gram)
    np.testing.assert_allclose(run(kernels, factor * gram), base, atol=1e-4)
    turn = [2, 0, 1]
    np.testing.assert_allclose(run(kernels[turn], gram[turn]), base, atol=1e-4)
    np.testing.assert_allclose(run(4 * kernels, gram), 4 * base, atol=4e-4)
    # Grams that are multiples of one another: the mean with those weights.
    share = np.array([1.0, 2.0, 5.0])
    got = run(kernels, share[:, None, None] * gram[:1])
    want = np.einsum("t,tio->io", share / 8, kernels)
    np.testing.assert_allclose(got, want, atol=1e-4)
    # A pull that outweighs everything: the mean.
    got = run(kernels, gram, jitter=1e6)
    np.testing.assert_allclose(got, kernels.mean(0), atol=1e-4)


def test_one_model_and_equal_models_are_unchanged():
    kernels, x = draw(2)
    one = np.float32(kernels[:1])
    assert np.array_equal(run(one, grams(x)[:1]), one[0])
    same = np.repeat(one, 3, 0)
    np.testing.assert_allclose(run(same, grams(x)), one[0], atol=1e-6)


def test_inputs_that_nobody_has_keep_the_mean_and_a_task_s_own_its_rows():
    kernels, x = draw(3)
    x[:, :, 0] = 0
    x[1:, :, 1] = 0
    x[0, :, 2:] = 0
    got = run(kernels, grams(x), alpha=1.0)
    np.testing.assert_allclose(got[0], kernels[:, 0].mean(0), atol=1e-5)
    np.testing.assert_allclose(got[1], kernels[0, 1], atol=1e-4)


def test_trees_layouts_views_and_jit():
    kernels, x = draw(4)
    gram, plain = jnp.asarray(grams(x), jnp.float32), run(kernels, grams(x))
    w = jnp.asarray(kernels, jnp.float32)
    taus = {
        "bias": jnp.array([[1.0], [2.0], [6.0]]),
        "half": w.astype(jnp.bfloat16),
        "heads": w.reshape(3, 2, 2, 2),
        "layers": jnp.stack([w, 2 * w], 1),
        "none": w,
        "step": jnp.arange(3),
    }
    found = {
        "half": gram,
        "heads": gram,
        "layers": jnp.stack([gram, gram], 1),
        "none": None,
    }
    for merge in (merging.regmean, jax.jit(merging.regmean)):
        got = merge(taus, found)
        assert got["bias"].tolist() == [3.0] and got["step"] == 0
        assert got["half"].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(got["half"]), plain, atol=0.1)
        np.testing.assert_allclose(got["heads"].reshape(4, 2), plain, atol=1e-4)
        np.testing.assert_allclose(got["layers"][1], 2 * plain, atol=2e-4)
        np.testing.assert_allclose(got["none"], kernels.mean(0), atol=1e-5)
    turned = run(kernels.swapaxes(1, 2), grams(x), layout="out_in")
    np.testing.assert_allclose(turned.T, plain, atol=1e-4)


def test_singular_sums_are_refused_or_nan_or_mended():
    kernels, x = draw(5, rows=1)
    with pytest.raises(ValueError, match="regmean: .*'w' is not positive definite"):
        run(kernels, grams(x), alpha=1.0)
    traced = jax.jit(lambda w, g: merging.regmean({"w": w}, {"w": g}, alpha=1.0))
    args = jnp.asarray(kernels, jnp.float32), jnp.asarray(grams(x), jnp.float32)
    assert jnp.isnan(traced(*args)["w"]).all()
    got = run(kernels, grams(x), alpha=1.0, jitter=1e-2)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"w": np.ones((3, 5, 5))}, {}, r"the Gram of 'w' is \(3, 5, 5\)"),
        ({"w": np.ones((2, 4, 4))}, {}, r"the Gram of 'w' is \(2, 4, 4\)"),
        ({"v": np.ones((3, 4, 4))}, {}, "'v', which is no leaf"),
        ({"w": None}, {}, "there is no Gram"),
        ({"w": np.full((3, 4, 4), np.nan)}, {}, "grams: 'w' holds NaN"),
        ({"w": -np.ones((3, 4, 4))}, {}, "'w' is not positive definite"),
        ({}, {"alpha": 1.5}, "alpha is 1.5"),
        ({}, {"jitter": -1.0}, "jitter is -1.0"),
        ({}, {"layout": "rows"}, "layout is 'rows'"),
        ({}, {"weights": [1.0, 1.0, -1.0]}, "weights are"),
    ],
)
def test_refuses_by_name(change, options, message):
    kernels, x = draw(0)
    taus = {"w": jnp.asarray(kernels, jnp.float32)}
    found = {"w": grams(x).astype(np.float32), **change}
    with pytest.raises(ValueError, match=f"regmean: .*{message}"):
        merging.regmean(taus, found, **options)


def chain(params, x, names="abc"):
    """Three layers and what each of them saw."""
    seen = {}
    for name in names:
        seen[name] = x
        x = np.tanh(x @ params[name])
    return seen


def capture(params, x):
    seen = {}
    for name in "abc":
        seen[name] = merging.InputGram(x.T @ x, jnp.float32(x.shape[0]))
        x = jnp.tanh(x @ params[name])
    return seen


def test_plus_plus_sees_the_layers_merged_so_far():
    rng = np.random.default_rng(6)
    base = {name: rng.normal(size=(3, 3)) for name in "abc"}
    taus = {name: rng.normal(size=(2, 3, 3)) for name in "abc"}
    inputs = rng.normal(size=(2, 4, 5, 3))
    inputs[1] *= 3
    done: dict = {}
    for name in "abc":
        gram = []
        for t in range(2):
            params = {
                k: base[k] + (done[k] if k in done else taus[k][t]) for k in "abc"
            }
            x = chain(params, inputs[t].reshape(-1, 3))[name]
            gram.append(x.T @ x / len(x) * (0.9 + 0.1 * np.eye(3)))
        right = sum(g @ taus[name][t] for t, g in enumerate(gram))
        done[name] = np.linalg.solve(sum(gram), right)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (base, taus))
    batches = [jnp.asarray(x, jnp.float32) for x in inputs]
    got = merging.regmean_plus_plus(*single, capture, batches, ["a", "b", "c"])
    for name in "abc":
        np.testing.assert_allclose(got[name], done[name], atol=2e-3)


@pytest.mark.parametrize(
    ("groups", "sets", "message"),
    [
        (["a", "[ab]"], 2, "'a' is in 'a' and"),
        (["d"], 2, "groups: .*'d' matches no leaf"),
        (["a"], 3, "3 sets of batches, 2 tasks"),
    ],
)
def test_plus_plus_refuses_by_name(groups, sets, message):
    base = {name: jnp.eye(3) for name in "abc"}
    taus = {name: jnp.ones((2, 3, 3)) for name in "abc"}
    with pytest.raises(ValueError, match=f"regmean_plus_plus: .*{message}"):
        merging.regmean_plus_plus(
            base, taus, capture, [jnp.ones((1, 2, 3))] * sets, groups
        )


def test_mean_grams_weigh_rows_not_batches():
    def masked(params, batch):
        x = batch["x"] * batch["mask"][:, None]
        return {"w": merging.InputGram(x.T @ x, batch["mask"].sum())}

    mask = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    x = np.random.default_rng(7).normal(size=(2, 3, 2)).astype(np.float32)
    got = merging.mean_grams(
        masked, None, {"x": jnp.asarray(x), "mask": jnp.asarray(mask)}
    )
    rows = x[mask > 0]
    np.testing.assert_allclose(got["w"], rows.T @ rows / 4, rtol=1e-5)
    with pytest.raises(ValueError, match="no tree of InputGram"):
        merging.mean_grams(lambda params, batch: {"w": batch}, None, jnp.ones((1, 2)))


def test_the_next_model_compiles_nothing():
    traces = []

    def counted(params, x):
        traces.append(1)
        return capture(params, x)

    params, x = {name: jnp.eye(3) for name in "abc"}, jnp.ones((2, 5, 3))
    merging.mean_grams(counted, params, x)
    before = len(traces)
    merging.mean_grams(counted, jax.tree.map(lambda p: 2 * p, params), x)
    assert len(traces) == before > 0
