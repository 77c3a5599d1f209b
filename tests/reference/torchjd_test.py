"""Directions from one Gramian, here and by TorchJD in float64.

Each method is compared on Jacobians of several kinds. Where the two are meant to
differ, the kind is left out of the row and the reason stands beside it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import aggregation
from mtl_jax.transforms.aggregation import _pcgrad

torch = pytest.importorskip("torch")
peer = pytest.importorskip("torchjd.aggregation")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

COUNT = 4
weights = aggregation.weights


@functools.cache
def jacobians():
    """Task gradients by kind, [4, 10] float64."""
    rng = np.random.default_rng(5)
    plain, shared = rng.normal(size=(COUNT, 10)), rng.normal(size=10)
    signs = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    zero, closed, twice = plain.copy(), plain.copy(), plain.copy()
    zero[2] = 0
    closed[3] = -(plain[0] + 2 * plain[1] + 0.5 * plain[2])
    twice[1] = twice[0]
    return {
        "random": plain,
        "agreeing": plain + 2 * shared,
        "conflicting": plain + 2 * signs * shared,
        "uneven": plain * np.array([[0.01], [1.0], [10.0], [0.1]]),
        "rank two": rng.normal(size=(COUNT, 2)) @ rng.normal(size=(2, 10)),
        "stationary": closed,
        "a repeat": twice,
        "a zero": zero,
    }


def each(*without):
    return tuple(kind for kind in jacobians() if kind not in without)


INDEPENDENT = ("random", "agreeing", "conflicting", "uneven")
ROWS = {
    "aligned_mtl": (
        weights.aligned_mtl,
        lambda: peer.AlignedMTLWeighting(),
        each("uneven"),  # Its smallest eigenvalue is lost in a float32 Gramian.
    ),
    "aligned_mtl mean": (
        functools.partial(weights.aligned_mtl, scale="mean"),
        lambda: peer.AlignedMTLWeighting(scale_mode="rmse"),
        each("uneven"),
    ),
    "cagrad": (
        functools.partial(weights.cagrad, c=0.4),
        lambda: peer.CAGradWeighting(c=0.4, norm_eps=1e-9),
        # Returns zero where a combination vanishes.
        each("rank two", "stationary", "a zero"),
    ),
    "cagrad wide": (
        functools.partial(weights.cagrad, c=1.0),
        lambda: peer.CAGradWeighting(c=1.0, norm_eps=1e-9),
        each("rank two", "stationary", "a zero"),
    ),
    "dual_proj": (weights.dual_proj, lambda: peer.DualProjWeighting(), each()),
    "dual_proj preference": (
        lambda g: weights.dual_proj(g, jnp.array([0.1, 0.2, 0.3, 0.4])),
        lambda: peer.DualProjWeighting(torch.tensor([0.1, 0.2, 0.3, 0.4]).double()),
        each(),
    ),
    "fair_grad": (
        functools.partial(weights.fair_grad, alpha=2.0),
        lambda: peer.FairGradWeighting(alpha=2.0),
        # Its least squares stops early on badly scaled Gramians.
        ("random", "agreeing", "conflicting"),
    ),
    "imtl_g": (weights.imtl_g, lambda: peer.IMTLGWeighting(), INDEPENDENT),
    "krum": (
        functools.partial(weights.krum, faulty=1, selected=2, squared=False),
        lambda: peer.KrumWeighting(n_byzantine=1, n_selected=2),
        each("a repeat"),  # Ties.
    ),
    "mean": (weights.mean, lambda: peer.MeanWeighting(), each()),
    "mgda": (
        weights.mgda,
        lambda: peer.MGDAWeighting(epsilon=1e-9, max_iters=20_000),
        each(),
    ),
    "sum": (weights.sum, lambda: peer.SumWeighting(), each()),
    "upgrad": (weights.upgrad, lambda: peer.UPGradWeighting(), each()),
    "upgrad preference": (
        lambda g: weights.upgrad(g, jnp.array([0.1, 0.2, 0.3, 0.4])),
        lambda: peer.UPGradWeighting(torch.tensor([0.1, 0.2, 0.3, 0.4]).double()),
        each(),
    ),
}
CASES = [(name, kind) for name, row in ROWS.items() for kind in row[2]]


@functools.cache
def compiled(name):
    return jax.jit(ROWS[name][0])


def gram_of(g):
    return jnp.asarray(g @ g.T, jnp.float32)


def check(got, want, g, tolerance=2e-3):
    """Directions agree, relative to the longer of direction and gradients' mean."""
    got, want = np.asarray(got, float) @ g, np.asarray(want, float) @ g
    size = max(np.linalg.norm(want), np.linalg.norm(g, axis=1).mean())
    np.testing.assert_allclose(got, want, atol=tolerance * size)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_same_direction(name, kind):
    g = jacobians()[kind]
    theirs = ROWS[name][1]()(torch.tensor(g @ g.T))
    check(compiled(name)(gram_of(g)), theirs, g)


def test_every_gramian_method_is_compared():
    alone = {"config", "constant", "grad_vac", "modo", "nash_mtl", "pcgrad", "sdm_grad"}
    without_values = {"random"}
    named = {name.split()[0] for name in ROWS} | alone | without_values
    assert named == set(weights.__all__)


@pytest.mark.parametrize("kind", each("a zero"))  # Divides by zero there.
@pytest.mark.parametrize("steps", [1, 3])
def test_surgery_in_our_orders(kind, steps, monkeypatch):
    """PCGrad and, over steps, GradVac, when the peer draws the orders that we draw."""
    g = jacobians()[kind]
    tx = aggregation.pcgrad() if steps == 1 else aggregation.grad_vac(COUNT)
    theirs = peer.PCGradWeighting() if steps == 1 else peer.GradVacWeighting()
    state = tx.rule.init()
    weigh = jax.jit(tx.rule.weigh)
    for _ in range(steps):
        key = state if steps == 1 else state.key
        use = jax.random.split(key)[1]
        orders = np.asarray(_pcgrad.random_orders(use, COUNT))
        drawn = iter(orders)
        row = itertools.count()

        def ours(size, drawn=drawn, row=row):
            order, i = next(drawn), next(row)
            if size < COUNT:  # Positions among the others.
                order = np.array([j - (j > i) for j in order if j != i])
            return torch.tensor(order)

        monkeypatch.setattr(torch, "randperm", ours)
        got, state = weigh(gram_of(g), state)
        check(got, theirs(torch.tensor(g @ g.T)), g, 5e-3)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_nash_mtl(kind, scale, max_norm):
    """The same update, in direction and length, where the peer's iteration ends."""
    pytest.importorskip("ecos")
    if kind == "uneven" and scale != 1:
        pytest.skip("the peer's solver gives up")
    g = scale * jacobians()[kind]
    theirs = peer.NashMTL(n_tasks=COUNT, max_norm=max_norm, optim_niter=100)
    want = theirs(torch.tensor(g)).numpy()
    got = weights.nash_mtl(gram_of(g), max_norm=max_norm)
    got = np.asarray(got, float) @ g
    np.testing.assert_allclose(got, want, atol=2e-3 * np.linalg.norm(want))


@pytest.mark.parametrize("kind", each("rank two", "stationary"))  # Noise inverted.
def test_config(kind):
    g = jacobians()[kind]
    want = peer.ConFIG()(torch.tensor(g)).numpy()
    got = np.asarray(weights.config(gram_of(g)), float) @ g
    np.testing.assert_allclose(got, want, atol=2e-3 * np.linalg.norm(want))


@pytest.mark.parametrize("kind", each())
@pytest.mark.parametrize("name", ["modo", "sdm_grad"])
def test_two_batches_over_steps(name, kind):
    """From one's own last weights, with gradients of two batches."""
    g = jacobians()[kind] / np.linalg.norm(jacobians()[kind], axis=1).max()
    other = g + 0.1 * np.random.default_rng(1).normal(size=g.shape)
    if name == "modo":
        ours, theirs = aggregation.modo(COUNT), peer.MoDoWeighting()
    else:
        ours = aggregation.sdm_grad(COUNT, learning_rate=0.5)
        theirs = peer.SDMGradWeighting(lr=0.5)
    state = ours.rule.init()
    cross = g @ other.T
    for _ in range(3):
        got, state = ours.rule.weigh(
            gram_of(g), state, cross_gram=jnp.asarray(cross, jnp.float32)
        )
        check(got, theirs(torch.tensor(cross)), g)


@pytest.mark.parametrize("count", [40, 64])
@pytest.mark.parametrize("width", [400, 10])
@pytest.mark.parametrize("name", ["upgrad", "dual_proj", "mgda", "cagrad"])
def test_many_tasks(name, count, width):
    g = np.random.default_rng(count).normal(size=(count, width))
    if name == "cagrad" and width < count:
        g = g + 3 * np.random.default_rng(0).normal(size=width)
    theirs = ROWS[name][1]()(torch.tensor(g @ g.T))
    check(compiled(name)(gram_of(g)), theirs, g)
