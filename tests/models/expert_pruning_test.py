"""Pruning and skipping of experts against the layer itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import layers

D, E = 6, 5


def layer(experts=E, **options):
    return layers.MixtureOfExperts(num_experts=experts, hidden=4, **options)


@pytest.fixture(scope="module")
def case():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, D)), jnp.float32)
    params = layer(top_k=2).init(jax.random.key(1), x)["params"]
    params = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(p.size).normal(size=p.shape), "f4"),
        params,
    )
    return params, x


@pytest.mark.parametrize(
    ("keep", "top_k", "normalize"), [(3, 2, True), (2, 1, False), (4, 2, False)]
)
def test_losses_are_those_of_layers_with_fewer_experts(case, keep, top_k, normalize):
    params, x = case
    options = {"top_k": top_k, "normalize": normalize}
    found = models.prune_experts(params, x, keep, **options)
    assert found.subsets.tolist() == [
        list(s) for s in itertools.combinations(range(E), keep)
    ]
    whole = layer(**options).apply({"params": params}, x)
    losses = []
    for subset in found.subsets:
        fewer = models.take_experts(params, jnp.asarray(subset))
        out = layer(keep, **options).apply({"params": fewer}, x)
        losses.append(float(jnp.linalg.norm(whole - out, axis=(1, 2)).sum()))
    np.testing.assert_allclose(found.losses, losses, rtol=2e-4)
    assert found.kept.tolist() == found.subsets[int(np.argmin(losses))].tolist()


def test_finds_the_expert_that_nobody_asks(case):
    params, x = case
    params = jax.tree.map(lambda p: p, params)
    x = jnp.abs(x)
    kernel = params["router"]["kernel"].at[:, 2].set(-50.0)
    params["router"] = {"kernel": kernel}
    found = models.prune_experts(params, x, E - 1, top_k=1)
    assert found.kept.tolist() == [0, 1, 3, 4]
    assert float(found.losses.min()) == 0.0
    all_kept = models.prune_experts(params, x, E, top_k=1)
    assert all_kept.kept.tolist() == list(range(E))


def test_skipping_leaves_out_half_of_the_second_experts(case):
    params, x = case
    _, sown = layer(top_k=2).apply({"params": params}, x, mutable="intermediates")
    probabilities = sown["intermediates"]["router_probabilities"][0]
    ratio = float(models.skip_ratio(probabilities))
    top = np.sort(np.asarray(probabilities).reshape(-1, E))[:, ::-1]
    assert ratio == pytest.approx(np.median(top[:, 1] / top[:, 0]), rel=1e-5)
    skips = top[:, 1] < ratio * top[:, 0]
    assert skips.sum() == 12
    for normalize in (False, True):
        one, two, mixed = (
            layer(**{"normalize": normalize} | options)
            .apply({"params": params}, x)
            .reshape(-1, D)
            for options in (
                {"top_k": 1},
                {"top_k": 2},
                {"top_k": 2, "skip": ratio},
            )
        )
        want = np.where(skips[:, None], one, two)
        np.testing.assert_allclose(mixed, want, atol=1e-4, rtol=1e-4)


def test_scanned_layers_dtypes_and_errors(case):
    params, x = case
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    few = models.take_experts(stacked, jnp.array([1, 4]))
    assert few["router"]["kernel"].shape == (2, D, 2)
    np.testing.assert_array_equal(
        few["experts"]["out"]["kernel"][0],
        params["experts"]["out"]["kernel"][np.array([1, 4])],
    )
    half = models.prune_experts(params, x.astype(jnp.bfloat16), 3, top_k=2)
    assert half.losses.dtype == jnp.float32
    for keep, top_k in ((1, 2), (6, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"keep is {keep} and top_k"):
            models.prune_experts(params, x, keep, top_k=top_k)
    with pytest.raises(ValueError, match="prune_experts: inputs are"):
        models.prune_experts(params, x[0], 3, top_k=2)
    many = {"router": {"kernel": jnp.zeros((D, 64))}}
    with pytest.raises(ValueError, match="32 of 64 experts are .* subsets"):
        models.prune_experts(many, x, 32, top_k=2)
    with pytest.raises(ValueError, match="skip_ratio: probabilities are"):
        models.skip_ratio(jnp.ones((4, 1)))
