import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax import metrics

pytestmark = pytest.mark.fast

HIGHER = {
    "segmentation": {"miou": True, "accuracy": True},
    "depth": {"error": False},
}
BASE = {"segmentation": {"miou": 50.0, "accuracy": 80.0}, "depth": {"error": 0.2}}
OURS = {"segmentation": {"miou": 55.0, "accuracy": 76.0}, "depth": {"error": 0.15}}


def test_by_hand():
    found = metrics.delta_p(OURS, BASE, HIGHER)
    assert found.by_metric["segmentation"] == {
        "miou": pytest.approx(10),
        "accuracy": pytest.approx(-5),
    }
    assert found.by_metric["depth"]["error"] == pytest.approx(25)
    assert found.by_task == {
        "segmentation": pytest.approx(2.5),
        "depth": pytest.approx(25),
    }
    assert found.task == pytest.approx((2.5 + 25) / 2)
    assert found.metric == pytest.approx((10 - 5 + 25) / 3)
    assert metrics.delta_m(OURS, BASE, HIGHER) == found.task


def test_published_row():
    """Four NYUv2-like rows: better on all of them is positive, whichever way."""
    assert metrics.delta_m(BASE, BASE, HIGHER) == 0
    flipped = {t: {m: not h for m, h in ms.items()} for t, ms in HIGHER.items()}
    assert metrics.delta_m(OURS, BASE, flipped) == pytest.approx(
        -metrics.delta_m(OURS, BASE, HIGHER)
    )


@hypothesis.given(st.floats(1e-3, 1e3))
def test_units_do_not_count(factor):
    scaled = [
        {**x, "depth": {"error": x["depth"]["error"] * factor}} for x in (OURS, BASE)
    ]
    assert metrics.delta_m(*scaled, HIGHER) == pytest.approx(
        metrics.delta_m(OURS, BASE, HIGHER)
    )


def test_negative_baseline():
    found = metrics.delta_m(
        {"a": {"reward": -1.0}}, {"a": {"reward": -2.0}}, {"a": {"reward": True}}
    )
    assert found == pytest.approx(50)


def test_one_value_per_seed():
    seeds = np.array([55.0, 60.0])
    ours = {**OURS, "segmentation": {"miou": seeds, "accuracy": 76.0}}
    found = metrics.delta_p(ours, BASE, HIGHER)
    np.testing.assert_allclose(found.by_metric["segmentation"]["miou"], [10, 20])
    np.testing.assert_allclose(found.task, [13.75, 16.25])
    assert found.metric.shape == (2,)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ({"depth": OURS["depth"]}, BASE, HIGHER),
            "'segmentation/accuracy' is in baselines but not in scores",
        ),
        (
            (OURS, BASE, {"segmentation": HIGHER["segmentation"]}),
            "'depth/error' is in scores but not in higher_is_better",
        ),
        (
            ({"a": {"m": 1}}, {"a": {"m": 0}}, {"a": {"m": True}}),
            "baseline of 'a/m' is 0",
        ),
        (
            ({"a": {"m": np.nan}}, {"a": {"m": 1}}, {"a": {"m": True}}),
            "score of 'a/m' is not finite",
        ),
        (({}, {}, {}), "no scores"),
    ],
)
def test_bad_scores(args, message):
    with pytest.raises(ValueError, match=message):
        metrics.delta_p(*args)


def grams(seed=0, steps=50, tasks=4):
    g = np.random.default_rng(seed).normal(size=(steps, tasks, 3))
    return g, g @ g.transpose(0, 2, 1)


def test_conflicts_count_negative_inner_products():
    g, gram = grams()
    found = metrics.conflicts(gram)
    unit = g / np.linalg.norm(g, axis=2, keepdims=True)
    cosines = unit @ unit.transpose(0, 2, 1)
    np.testing.assert_allclose(found.cosines, cosines.mean(0))
    np.testing.assert_allclose(metrics.cosine_matrix(gram), cosines)
    negative = [[a @ b < 0 for i, a in enumerate(s) for b in s[:i]] for s in g]
    assert found.pairs == pytest.approx(np.mean(negative))
    assert found.steps == pytest.approx(np.mean([any(x) for x in negative]))
    np.testing.assert_allclose(found.rates, (cosines < -1e-12).mean(0))


def test_zero_gradient_has_no_cosine():
    g, gram = grams(steps=3)
    g[0, 1] = 0
    gram = g @ g.transpose(0, 2, 1)
    found = metrics.conflicts(gram)
    assert np.isfinite(found.cosines).all()
    assert np.isnan(metrics.cosine_matrix(gram)[0, 1]).all()
    g[:, 1] = 0
    found = metrics.conflicts(g @ g.transpose(0, 2, 1))
    assert np.isnan(found.cosines[1]).all() and np.isfinite(found.cosines[0, 0])


def test_one_task_never_conflicts():
    found = metrics.conflicts([[2.0]])
    assert (found.pairs, found.steps) == (0, 0)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((2, 3)), r"is \(2, 3\), wanted"),
        (np.ones((0, 2, 2)), "no steps"),
        ([[np.nan]], "NaN"),
    ],
)
def test_bad_gramians(gram, message):
    with pytest.raises(ValueError, match=message):
        metrics.conflicts(gram)
