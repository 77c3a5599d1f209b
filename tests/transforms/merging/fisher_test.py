"""Fisher merging and diagonals of the Fisher information, against float64 loops."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging

SHAPES = {"kernel": (4, 3), "bias": (3,)}


def draw(seed, T=3):
    rng = np.random.default_rng(seed)
    taus = {k: rng.normal(size=(T, *s)) for k, s in SHAPES.items()}
    diagonals = {k: rng.gamma(0.5, size=(T, *s)) for k, s in SHAPES.items()}
    return taus, diagonals


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(taus, diagonals, **options):
    found = merging.fisher(narrow(taus), narrow(diagonals), **options)
    return jax.tree.map(np.asarray, found)


def oracle(taus, diagonals, weights, floor, normalize):
    """The definition, entry by entry."""
    T = len(weights)
    norms = [
        np.sqrt(sum((f[t] ** 2).sum() for f in diagonals.values())) for t in range(T)
    ]
    scale = np.array([1 / n if normalize and n else 1.0 for n in norms])
    whole = [scale[t] * f[t] for f in diagonals.values() for t in range(T)]
    least = floor * sum(w.sum() for w in whole) / sum(w.size for w in whole)
    out = {}
    for name, x in taus.items():
        out[name] = np.zeros(x.shape[1:])
        for at in np.ndindex(x.shape[1:]):
            p = [
                weights[t] * max(scale[t] * diagonals[name][t][at], least)
                for t in range(T)
            ]
            values = [x[t][at] for t in range(T)]
            out[name][at] = np.dot(p if sum(p) else weights, values) / (
                sum(p) or sum(weights)
            )
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_matches_the_definition(normalize, floor):
    taus, diagonals = draw(0)
    diagonals["kernel"][:, 1, 2] = 0  # nobody's
    diagonals["bias"] *= np.array([[1.0], [30.0], [0.1]])
    weights = [1.0, 2.0, 0.5]
    options = {"floor": floor, "normalize": normalize}
    got = run(taus, diagonals, weights=weights, **options)
    want = oracle(taus, diagonals, weights, **options)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5)


@hypothesis.given(st.integers(0, 999), st.sampled_from([1e-25, 1e25]), st.booleans())
def test_scale_order_and_range(seed, factor, normalize):
    taus, diagonals = draw(seed)
    base = run(taus, diagonals, normalize=normalize)
    scaled = {k: factor * f for k, f in diagonals.items()}
    other = run(taus, scaled, normalize=normalize)
    turn = [2, 0, 1]
    permuted = run(
        {k: x[turn] for k, x in taus.items()},
        {k: f[turn] for k, f in diagonals.items()},
        normalize=normalize,
    )
    longer = run({k: 8 * x for k, x in taus.items()}, diagonals, normalize=normalize)
    for name, x in taus.items():
        np.testing.assert_allclose(other[name], base[name], atol=2e-5)
        np.testing.assert_allclose(permuted[name], base[name], atol=2e-5)
        np.testing.assert_allclose(longer[name], 8 * base[name], atol=2e-4)
        assert (base[name] <= x.max(0) + 1e-5).all()
        assert (base[name] >= x.min(0) - 1e-5).all()


def test_one_task_equal_and_missing_diagonals():
    taus, diagonals = draw(1)
    ones = jax.tree.map(lambda x: x[:1], narrow(taus))
    alone = merging.fisher(ones, jax.tree.map(lambda x: x[:1], narrow(diagonals)))
    mean = {k: x.mean(0) for k, x in taus.items()}
    equal = {k: np.repeat(f[:1], 3, 0) for k, f in diagonals.items()}
    for name in SHAPES:
        assert jnp.array_equal(alone[name], ones[name][0])
        np.testing.assert_allclose(run(taus, equal)[name], mean[name], atol=1e-5)
        nothing = {k: 0 * f for k, f in diagonals.items()}
        np.testing.assert_allclose(run(taus, nothing)[name], mean[name], atol=1e-5)
    # One that depends on an entry alone decides it.
    diagonals["bias"][:] = [[0.0], [1.0], [0.0]]
    got = run(taus, diagonals, floor=0.0)
    np.testing.assert_allclose(got["bias"], taus["bias"][1], atol=1e-5)


def test_trees_dtypes_and_jit():
    taus = {
        "w": jnp.array([[1.0, 2.0], [3.0, 6.0]], jnp.bfloat16),
        "step": jnp.array([4, 5]),
        "empty": jnp.zeros((2, 0)),
    }
    diagonals = {**taus, "w": jnp.ones((2, 2)), "empty": jnp.zeros((2, 0))}
    for merge in (merging.fisher, jax.jit(merging.fisher)):
        got = merge(taus, diagonals)
        assert got["w"].dtype == jnp.bfloat16 and got["w"].tolist() == [2.0, 4.0]
        assert got["step"] == 4 and got["empty"].shape == (0,)
        part = {name: taus[name] for name in ("step", "empty")}
        nothing = merge(part, {name: diagonals[name] for name in part})
        assert nothing["step"] == 4 and nothing["empty"].shape == (0,)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"bias": -1.0}, {}, "'bias' of the fishers goes down to -"),
        ({"bias": np.nan}, {}, "fishers: 'bias' holds NaN"),
        ({}, {"floor": -1.0}, "floor is -1.0"),
        ({}, {"weights": [1.0, -1.0, 1.0]}, "weights are"),
        ({}, {"weights": [1.0]}, r"wanted \(3,\)"),
    ],
)
def test_refuses_by_name(change, options, message):
    taus, diagonals = draw(0)
    diagonals = {k: f * change.get(k, 1.0) for k, f in diagonals.items()}
    with pytest.raises(ValueError, match=f"fisher: .*{message}"):
        run(taus, diagonals, **options)


def test_refuses_diagonals_of_another_model():
    taus, diagonals = draw(0)
    with pytest.raises(ValueError, match="fisher: 'bias' is"):
        run(taus, {**diagonals, "bias": diagonals["bias"][:, :2]})


def network(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None]) * params["gain"][None]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(4, 3)),
        "bias": rng.normal(size=3),
        "gain": rng.normal(size=3),
    }
    return narrow(params), rng.normal(size=(5, 4))


def slope_of_label(params, x, label):
    """d log p(label | x) of one example by hand, float64."""
    w, b, gain = (np.asarray(params[k], float) for k in ("kernel", "bias", "gain"))
    h = np.tanh(x @ w + b)
    p = np.exp(h * gain) / np.exp(h * gain).sum()
    out = np.eye(3)[label] - p
    inner = out * gain * (1 - h**2)
    return {"kernel": np.outer(x, inner), "bias": inner, "gain": out * h}, p


def mean_squares(params, inputs, weigh):
    total = {k: 0.0 for k in params}
    for n, x in enumerate(inputs):
        for label in range(3):
            slopes, p = slope_of_label(params, x, label)
            for k, g in slopes.items():
                total[k] = total[k] + weigh(n, label, p) * g**2 / len(inputs)
    return total


@pytest.mark.parametrize("chunk", [2, 8])
def test_expected_diagonal_matches_the_definition(model, chunk):
    params, inputs = model
    got = merging.fisher_diagonal(
        network, params, jnp.asarray(inputs, jnp.float32), chunk=chunk
    )
    want = mean_squares(params, inputs, lambda n, label, p: p[label])
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_given_labels_and_single_examples(model):
    params, inputs = model
    labels = np.array([2, 0, 1, 1, 2])
    x = jnp.asarray(inputs, jnp.float32)
    got = merging.fisher_diagonal(network, params, x, labels=labels, chunk=3)
    want = mean_squares(params, inputs, lambda n, label, p: float(labels[n] == label))
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    # The square of the batch's gradient is something else.
    whole = sum(
        slope_of_label(params, i, y)[0]["bias"] for i, y in zip(x, labels, strict=True)
    )
    assert (
        np.abs((whole / 5) ** 2 - want["bias"]).max()
        > 10 * np.abs(got["bias"] - want["bias"]).max()
    )


def test_sampled_labels_are_the_model_s(model):
    params, inputs = model
    x = jnp.repeat(jnp.asarray(inputs[:1], jnp.float32), 2000, 0)
    sampled = merging.fisher_diagonal(
        network, params, x, labels="sampled", key=jax.random.key(1), chunk=2000
    )
    exact = mean_squares(params, inputs[:1], lambda n, label, p: p[label])
    for name in params:
        error = np.abs(sampled[name] - exact[name]).max()
        assert error < 0.15 * np.abs(exact[name]).max()


def test_diagonals_of_any_likelihood_and_tree():
    params = {"mean": jnp.zeros(2, jnp.bfloat16), "step": jnp.array(3)}

    def log_prob(params, example):
        return -0.5 * jnp.sum((example["y"] - params["mean"].astype(jnp.float32)) ** 2)

    y = jnp.array([[1.0, 2.0], [3.0, -4.0]])
    got = jax.jit(lambda p, y: merging.squared_gradients(log_prob, p, {"y": y}))(
        params, y
    )
    assert got["mean"].tolist() == [5.0, 10.0] and got["mean"].dtype == jnp.float32
    assert got["step"] == 0 and got["step"].dtype == params["step"].dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "true"}, "labels is 'true'"),
        ({"labels": "sampled"}, "key is missing"),
        ({"labels": np.zeros(4, np.int32)}, r"labels are int32\[4\]"),
        ({"chunk": 0}, "chunk is 0"),
        ({"inputs": np.zeros((0, 4), np.float32)}, "there are no examples"),
        ({"apply_fn": lambda p, x: x[0]}, r"logits are \(4,\)"),
    ],
)
def test_diagonals_refuse_by_name(model, options, message):
    params, inputs = model
    options = {
        "apply_fn": network,
        "inputs": jnp.asarray(inputs, jnp.float32),
    } | options
    with pytest.raises(ValueError, match=f"fisher_diagonal: .*{message}"):
        merging.fisher_diagonal(params=params, **options)


def test_the_next_model_compiles_nothing(model):
    params, inputs = model
    x = jnp.asarray(inputs, jnp.float32)
    traces = []

    def counted(params, x):
        traces.append(1)
        return network(params, x)

    for labels in ("expected", np.zeros(5, np.int32)):
        merging.fisher_diagonal(counted, params, x, labels=labels)
        before = len(traces)
        other = jax.tree.map(lambda p: 2 * p, params)
        merging.fisher_diagonal(counted, other, x, labels=labels)
        assert len(traces) == before > 0
