"""Adapters of trained task vectors, and their common gauge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import adapters, merging

pytestmark = pytest.mark.fast
T, R = 3, 2


def draw(seed):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "dense": {"kernel": part(T, 5, 4), "bias": part(T, 4)},
        "layers": {"kernel": part(T, 2, 5, 4)},
    }


def stacked(name, shape):
    return name.endswith("kernel")


def product(adapter):
    return adapters.lora.delta(adapter, alpha=adapter["dense"]["kernel"]["a"].shape[-1])


@pytest.mark.parametrize("svd", ["svd", "gram"])
def test_factors_are_the_best_of_their_rank(svd):
    taus = draw(0)
    found = merging.lora_from_taus(taus, rank=R, matrices=stacked, svd=svd)
    for t, adapter in enumerate(found):
        assert "bias" not in adapter["dense"]
        for name in ("dense", "layers"):
            x = np.asarray(taus[name]["kernel"][t], np.float64)
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            want = (u[..., :R] * s[..., None, :R]) @ vt[..., :R, :]
            np.testing.assert_allclose(
                product(adapter)[name]["kernel"], want, atol=1e-4
            )
        a, b = adapter["dense"]["kernel"]["a"], adapter["dense"]["kernel"]["b"]
        np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-4)  # Balanced.


def test_all_of_the_rank_is_exact_and_plain_axes_need_no_rule():
    taus = draw(1)
    found = merging.lora_from_taus(taus, rank=9)
    assert found[0].keys() == {"dense"}
    for t, adapter in enumerate(found):
        assert adapter["dense"]["kernel"]["a"].shape == (5, 9)
        got = product(adapter)["dense"]["kernel"]
        np.testing.assert_allclose(got, taus["dense"]["kernel"][t], atol=1e-5)


def turns(count, seed):
    rng = np.random.default_rng(seed)
    return [np.linalg.qr(rng.normal(size=(R, R)))[0] for _ in range(count)]


def turned(adapter, turn):
    turn = jnp.asarray(turn, jnp.float32)
    return jax.tree.map(
        lambda node: {"a": node["a"] @ turn, "b": turn.T @ node["b"]},
        adapter,
        is_leaf=lambda node: "a" in node,
    )


def test_alignment_keeps_products_and_undoes_turns():
    loras = merging.lora_from_taus(draw(2), rank=R, matrices=stacked)
    mixed = [turned(x, turn) for x, turn in zip(loras, turns(T, 0), strict=True)]
    for one, other in zip(mixed, merging.lora_align(mixed), strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
            product(one),
            product(other),
        )
    # One adapter in three gauges is three times the same.
    same = merging.lora_align([turned(loras[0], turn) for turn in turns(3, 1)])
    errors = merging.rmm_errors(same)
    assert max(float(e[0]) for e in jax.tree.leaves(errors)) < 1e-6


def test_alignment_leaves_less_to_store():
    taus = draw(3)
    # Tasks that share most of what they change.
    taus = jax.tree.map(lambda x: x[:1] + 0.1 * x, taus)
    loras = merging.lora_from_taus(taus, rank=R, matrices=stacked)
    mixed = [turned(x, turn) for x, turn in zip(loras, turns(T, 2), strict=True)]

    def lost(loras):
        return sum(float(e[1]) for e in jax.tree.leaves(merging.rmm_errors(loras)))

    assert lost(merging.lora_align(mixed)) < 0.2 * lost(mixed)


def test_zeros_stay_zeros():
    taus = jax.tree.map(jnp.zeros_like, draw(4))
    loras = merging.lora_from_taus(taus, rank=R, matrices=stacked)
    assert not any(x.any() for x in jax.tree.leaves(merging.lora_align(loras)))


def test_refuses_by_name():
    taus = draw(5)
    with pytest.raises(ValueError, match="lora_from_taus: rank is 0"):
        merging.lora_from_taus(taus, rank=0)
    with pytest.raises(ValueError, match="lora_from_taus: no leaf of taus is a matrix"):
        merging.lora_from_taus({"bias": taus["dense"]["bias"]}, rank=1)
    with pytest.raises(
        ValueError, match="sees 'layers/kernel' of .* the last two axes"
    ):
        merging.lora_from_taus(
            taus, rank=1, matrices=lambda name, _: (0, 2) if "layers" in name else False
        )
    loras = merging.lora_from_taus(taus, rank=R)
    with pytest.raises(ValueError, match="dense/kernel/a"):
        merging.lora_align([loras[0], merging.lora_from_taus(taus, rank=1)[1]])
    bad = jax.tree.map(lambda x: x * jnp.nan, loras[1])
    with pytest.raises(ValueError, match="lora_align: adapter 1: 'dense/kernel/a'"):
        merging.lora_align([loras[0], bad])
