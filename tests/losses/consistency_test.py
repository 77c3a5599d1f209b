"""FixMatch with trusted examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)
WEAK = (6 * RNG.normal(size=(12, 4))).astype(np.float32)
STRONG = RNG.normal(size=(12, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, 12)
KNOWN = np.arange(12) % 3 == 0


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_matches_the_definition():
    target = np.where(KNOWN[:, None], np.eye(4)[LABELS], softmax(WEAK))
    counts = target.max(1) > 0.95
    assert 2 < counts.sum() < 12 and not counts[~KNOWN].all()
    want = np.where(counts, -(target * np.log(softmax(STRONG))).sum(1), 0)
    found, kept = losses.fixmatch(WEAK, STRONG, LABELS, KNOWN, threshold=0.95)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kept, counts)
    mean = losses.weighted_mean(found, kept)
    np.testing.assert_allclose(mean, want.sum() / counts.sum(), rtol=1e-5)


def test_targets_pass_no_gradient():
    def loss(weak, strong):
        return jnp.sum(losses.fixmatch(weak, strong, threshold=0.5)[0])

    weak, strong = jax.grad(loss, (0, 1))(WEAK, STRONG)
    assert not weak.any() and strong.any()


def test_labels_of_unknown_rows_are_not_read():
    other = np.where(KNOWN, LABELS, (LABELS + 1) % 4)
    a = losses.fixmatch(WEAK, STRONG, LABELS, KNOWN)
    b = losses.fixmatch(WEAK, STRONG, other, KNOWN)
    np.testing.assert_array_equal(a[0], b[0])


def test_absent_classes_take_no_part():
    mask = np.array([True, True, True, False])
    found, kept = losses.fixmatch(WEAK, STRONG, class_mask=jnp.asarray(mask))
    want = losses.fixmatch(WEAK[:, :3], STRONG[:, :3])
    np.testing.assert_allclose(found, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kept, want[1])
    assert np.isfinite(found).all()


def test_every_class_puts_its_surest_rows_forward():
    p = softmax(RNG.normal(size=(200, 4)))
    rows, labels = losses.trusted(p)
    assert len(rows) <= 4 * 5 and len(set(rows)) == len(rows)
    for c in range(4):
        assert set(np.argsort(-p[:, c])[:5]) <= set(rows)
    np.testing.assert_array_equal(labels, p[rows].argmax(1))
    assert len(losses.trusted(p[:8])[0]) <= 4


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="fixmatch: weak_logits are"):
        losses.fixmatch(WEAK, STRONG[:3])
    with pytest.raises(ValueError, match="labels and known, or neither"):
        losses.fixmatch(WEAK, STRONG, labels=LABELS)
    with pytest.raises(ValueError, match="fixmatch: labels must be integers"):
        losses.fixmatch(WEAK, STRONG, LABELS * 1.0, KNOWN)
    with pytest.raises(ValueError, match="per_class is 0"):
        losses.trusted(np.ones((2, 2)), 0)
    with pytest.raises(ValueError, match=r"wanted \[N, C\]"):
        losses.trusted(np.ones(2))
