"""Arrow, Poly and X-LoRA: gates over adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models, routing
from mtl_jax.transforms.adapters import lora

T, IN, OUT, R = 4, 6, 5, 2


def draw(seed=0, lead=(), dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def one():
        return {
            "layers_0": {
                "kernel": {
                    "a": jnp.asarray(rng.normal(size=(*lead, IN, R)), dtype),
                    "b": jnp.asarray(rng.normal(size=(*lead, R, OUT)), dtype),
                }
            }
        }

    return [one() for _ in range(T)]


def arrow(x, loras, scale, top_k, temperature):
    """The released gates, token by token in float64."""
    nodes = [each["layers_0"]["kernel"] for each in loras]
    products = [np.float64(n["a"]) @ np.float64(n["b"]) for n in nodes]
    seen = np.array([abs(x @ np.linalg.svd(p)[0][:, 0]) for p in products])
    chosen = np.argsort(-seen)[:top_k]
    weights = np.exp((seen[chosen] - seen.max()) / temperature)
    weights /= weights.sum()
    return sum(
        w * scale * (x @ products[t]) for w, t in zip(weights, chosen, strict=True)
    )


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_arrow_by_token(top_k, temperature):
    loras = draw()
    x = np.random.default_rng(1).normal(size=(2, 3, IN))
    experts = routing.arrow_experts(loras, alpha=3.0, temperature=temperature)
    got = routing.smile_dense(
        jnp.asarray(x, jnp.float32), experts["layers_0"], top_k=top_k
    )
    for b in range(2):
        for i in range(3):
            want = arrow(x[b, i], loras, 3.0 / R, top_k, temperature)
            np.testing.assert_allclose(got[b, i], want, atol=1e-4)


def test_arrow_inside_a_module_and_of_layers():
    loras = draw(2)
    mlp = models.Mlp(features=(OUT,))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(7, IN)), jnp.float32)
    params = mlp.init(jax.random.key(0), x)["params"]
    experts = routing.arrow_experts(loras, alpha=2.0)
    got = models.apply_smile(mlp, params, experts, x, top_k=2)
    want = mlp.apply({"params": params}, x)
    want += routing.smile_dense(x, experts["layers_0"], top_k=2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    one = models.apply_smile(
        mlp, params, routing.arrow_experts(loras[:1], alpha=2.0), x
    )
    merged = mlp.apply({"params": lora.merge(params, loras[0], alpha=2.0)}, x)
    np.testing.assert_allclose(one, merged, atol=1e-5)
    stacked = routing.arrow_experts(draw(4, lead=(3,), dtype=jnp.bfloat16), alpha=1.0)
    shapes = jax.tree.map(lambda x: x.shape, stacked["layers_0"])
    assert shapes == {"a": (3, T, IN, R), "b": (3, T, R, OUT), "gate": (3, T, IN, 1)}
    assert stacked["layers_0"]["gate"].dtype == jnp.bfloat16


def test_arrow_of_an_adapter_of_zeros_and_errors():
    loras = draw(5)
    loras[1] = jax.tree.map(jnp.zeros_like, loras[1])
    experts = routing.arrow_experts(loras, alpha=1.0)
    assert not experts["layers_0"]["gate"][1].any()
    with pytest.raises(ValueError, match="arrow_experts: no adapters"):
        routing.arrow_experts([], alpha=1.0)
    with pytest.raises(ValueError, match="arrow_experts: temperature is 0.0"):
        routing.arrow_experts(loras, alpha=1.0, temperature=0.0)
    with pytest.raises(ValueError, match="arrow_experts: 'w' is adapted, wanted kern"):
        routing.arrow_experts([{"w": loras[0]["layers_0"]["kernel"]}], alpha=1.0)
    with pytest.raises(ValueError, match="arrow_experts: adapter 0"):
        bad = jax.tree.map(lambda x: x * jnp.nan, loras[0])
        routing.arrow_experts([bad], alpha=1.0)


def test_poly_weights():
    logits = jnp.array([[2.0, -1.0, 0.5], [-200.0, -201.0, -202.0]])
    got = np.asarray(routing.poly_weights(logits))
    gates = 1 / (1 + np.exp(-np.float64(logits[0])))
    np.testing.assert_allclose(got[0], gates / gates.sum(), rtol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    assert got[1, 0] > got[1, 1] > got[1, 2] > 0
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda k: routing.poly_weights(logits[0], k, temperature=1e-3))(
        keys
    )
    # Nearly hard: each skill is taken with its probability.
    taken = np.asarray(drawn > 1e-6).mean(0)
    some = 1 - np.prod(1 - gates)
    np.testing.assert_allclose(taken, gates, atol=float(1 - some) + 0.03)
    slopes = jax.grad(lambda x: routing.poly_weights(x, keys[0])[0])(logits[0])
    assert np.isfinite(slopes).all()
    assert slopes[0] > 0
    with pytest.raises(ValueError, match="poly_weights: temperature"):
        routing.poly_weights(logits, temperature=-1.0)


def test_poly_weights_make_one_adapter():
    loras = draw(6)
    weights = routing.poly_weights(jnp.array([3.0, -1.0, 0.0, 1.0]))
    both = lora.combine(loras, weights, alpha=float(R))
    got = lora.delta(both, alpha=float(T * R))["layers_0"]["kernel"]
    x = jnp.eye(IN)
    layer = jax.tree.map(lambda *n: jnp.stack(n), *loras)["layers_0"]["kernel"]
    want = routing.low_rank_mix(x, layer, jnp.broadcast_to(weights, (IN, T)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_x_lora_gates():
    params = routing.init_router(jax.random.key(0), 6, 12, depth=1, std=1.0)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    got = routing.x_lora_gates(params, hidden, 3, temperature=0.5)
    logits = np.asarray(routing.router(params, hidden)).reshape(2, 3, 3, 4) / 0.5
    want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    few = np.asarray(routing.x_lora_gates(params, hidden, 3, top_k=2, temperature=0.5))
    assert ((few > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(few[few > 0], want[few > 0], rtol=1e-4)
    with pytest.raises(ValueError, match="x_lora_gates: the router has 12 gates"):
        routing.x_lora_gates(params, hidden, 5)
    with pytest.raises(ValueError, match="x_lora_gates: top_k is 5, wanted 1 to 4"):
        routing.x_lora_gates(params, hidden, 3, top_k=5)
    with pytest.raises(ValueError, match="x_lora_gates: temperature"):
        routing.x_lora_gates(params, hidden, 3, temperature=0.0)
