"""Weightings against the scalarizers of TorchJD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting

torch = pytest.importorskip("torch")
peer = pytest.importorskip("torchjd.scalarization")

pytestmark = pytest.mark.reference

W = [0.5, 0.2, 0.3]
Z = [0.1, 0.2, 0.3]
BATCHES = np.random.default_rng(0).uniform(0.5, 4, (6, 3)).astype(np.float32)


def tensor(x):
    return torch.tensor(np.asarray(x, np.float64))


PAIRS = {
    "sum": (weighting.sum, peer.Sum),
    "mean": (weighting.mean, peer.Mean),
    "constant": (
        lambda: weighting.constant(W),
        lambda: peer.Constant(tensor(W)),
    ),
    "geometric_mean": (weighting.geometric_mean, peer.GeometricMean),
    "stch": (
        lambda: weighting.stch(mu=0.2, weights=W, ideal=Z),
        lambda: peer.STCH(0.2, tensor(W), tensor(Z)),
    ),
    "cosmos": (
        lambda: weighting.cosmos(W, penalty=2.0),
        lambda: peer.COSMOS(2.0, tensor(W)),
    ),
    "pbi": (
        lambda: weighting.pbi(W, penalty=3.0, ideal=Z),
        lambda: peer.PBI(3.0, tensor(W), tensor(Z)),
    ),
    "uncertainty": (weighting.uncertainty, lambda: peer.UW(3).double()),
    "imtl_l": (weighting.imtl_l, lambda: peer.IMTLL(3).double()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_weights(name):
    ours, theirs = (make() for make in PAIRS[name])
    params, state = ours.init(3)
    for batch in BATCHES:
        x = tensor(batch).requires_grad_()
        want = theirs(x)
        want.backward()
        value = ours.loss(jnp.asarray(batch), params, state)
        np.testing.assert_allclose(value, want.item(), rtol=1e-5, atol=1e-6)
        weights = ours.weights(jnp.asarray(batch), params, state)
        np.testing.assert_allclose(weights, x.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["uncertainty", "imtl_l"])
def test_learned_scalars(name):
    ours, theirs = (make() for make in PAIRS[name])
    params, state = ours.init(3)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for batch in BATCHES:
        sgd.zero_grad()
        theirs(tensor(batch)).backward()
        sgd.step()
        grads = jax.grad(ours.loss, argnums=1)(jnp.asarray(batch), params, state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    (found,) = jax.tree.leaves(params)
    want = next(iter(theirs.parameters())).detach().numpy()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_dwa():
    ours, theirs = weighting.dwa(2, temperature=1.5), peer.DWA(1.5)
    params, state = ours.init(3)
    for step, batch in enumerate(BATCHES):
        want = theirs(tensor(batch)).item()
        value = ours.loss(jnp.asarray(batch), params, state)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        state = ours.update(state, jnp.asarray(batch))
        if step % 2:
            theirs.step()


def test_famo():
    ours = weighting.famo(lower_bounds=Z)
    theirs = peer.FAMO(3, min_losses=torch.tensor(Z)).double()
    params, state = ours.init(3)
    for batch in BATCHES:
        x = tensor(batch).requires_grad_()
        want = theirs(x)
        want.backward()
        weights = ours.weights(jnp.asarray(batch), params, state)
        np.testing.assert_allclose(weights, x.grad.numpy(), rtol=1e-4)
        after = batch * np.array([0.9, 0.6, 1.1], np.float32)
        theirs.update(tensor(after))
        state = ours.update(state, jnp.asarray(batch), after=jnp.asarray(after))
    logits = theirs._w.detach().numpy()
    np.testing.assert_allclose(state.method.logits, logits, rtol=1e-4, atol=1e-6)
