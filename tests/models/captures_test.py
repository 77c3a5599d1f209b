"""Grams of layers' inputs against inputs that were written down, and RegMean."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, models, tree


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


@pytest.fixture(scope="module")
def mlp():
    module = models.Mlp(features=(4, 2), activation="tanh")
    params = module.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    return params, lambda params, x: module.apply({"params": params}, x)


def test_grams_of_every_layer_over_batches(mlp):
    params, apply_fn = mlp
    x = draw(0, 3, 5, 3)
    got = merging.mean_grams(models.input_grams(apply_fn), params, jnp.asarray(x))
    first = params["layers_0"]
    hidden = np.tanh(x @ np.asarray(first["kernel"]) + np.asarray(first["bias"]))
    np.testing.assert_allclose(got["layers_0"]["kernel"], gram(x) / 15, rtol=1e-4)
    np.testing.assert_allclose(got["layers_1"]["kernel"], gram(hidden) / 15, rtol=1e-4)
    assert got["layers_0"]["bias"] is None


class Stack(nn.Module):
    """Three blocks, scanned and recomputed or written out, and a pooled head."""

    scan: bool

    @nn.compact
    def __call__(self, x, mask):
        def make_block(name):
            return nn.remat(Block)(name=name) if not self.scan else Block(name=name)

        x, _ = models.layers.run_stack(
            make_block, 3, x, None, scan=self.scan, remat=self.scan
        )
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        self.sow("intermediates", "pooled", pooled)
        return nn.Dense(2, name="head")(pooled)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        self.sow("intermediates", "input", x)
        return x + nn.tanh(nn.Dense(4, name="dense")(x))


def test_scanned_layers_and_masks_give_the_same_grams():
    x = jnp.asarray(draw(1, 2, 5, 4))
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    batch = {"x": x, "mask": mask}
    scanned, plain = Stack(True), Stack(False)
    params = scanned.init(jax.random.key(0), x, mask)["params"]
    apart = models.unstack_layers(params)

    def capture(module):
        return models.input_grams(
            lambda params, b: module.apply({"params": params}, b["x"], b["mask"]),
            mask_fn=lambda b: b["mask"],
        )

    together = jax.jit(capture(scanned))(params, batch)
    found = capture(plain)(apart, batch)
    _, kept = plain.apply({"params": apart}, x, mask, mutable=["intermediates"])
    kept = kept["intermediates"]
    for i in range(3):
        rows = kept[f"layers_{i}"]["input"][0][mask.astype(bool)]
        own = found[f"layers_{i}"]["dense"]["kernel"]
        np.testing.assert_allclose(own.total, gram(rows), rtol=1e-4, atol=1e-5)
        assert own.rows == 4
        stacked = together["layers"]["dense"]["kernel"]
        np.testing.assert_allclose(stacked.total[i], own.total, rtol=1e-4, atol=1e-5)
        assert stacked.rows[i] == 4
    head = found["head"]["kernel"]
    np.testing.assert_allclose(
        head.total, gram(kept["pooled"][0]), rtol=1e-4, atol=1e-5
    )
    assert head.rows == 2


def squared_error(apply_fn, params, experts, inputs):
    """Of the outputs against those of each task's own model on its own inputs."""
    return sum(
        float(jnp.sum((apply_fn(params, x) - apply_fn(own, x)) ** 2))
        for own, x in zip(experts, inputs, strict=True)
    )


def test_regmean_on_captured_grams_keeps_outputs(mlp):
    base, apply_fn = mlp
    experts = [
        jax.tree.map(lambda x, s=s: x + 0.5 * draw(s, *x.shape), base) for s in (1, 2)
    ]
    # Inputs of the two tasks lie along different axes.
    inputs = [draw(3, 40, 3) * [1.0, 0.1, 0.1], draw(4, 40, 3) * [0.1, 1.0, 0.1]]
    batches = [jnp.asarray(x, jnp.float32).reshape(4, 10, 3) for x in inputs]
    inputs = [x.reshape(40, 3) for x in batches]
    taus = merging.task_vectors(base, experts)
    capture = models.input_grams(apply_fn)
    grams = tree.stack(
        [
            merging.mean_grams(capture, p, x)
            for p, x in zip(experts, batches, strict=True)
        ]
    )
    layers = ["layers_0/", "layers_1/"]
    deltas = {
        "average": merging.average(taus),
        "regmean": merging.regmean(taus, grams, alpha=1.0),
        "plus_plus": merging.regmean_plus_plus(
            base, taus, capture, batches, layers, alpha=1.0
        ),
    }
    errors = {
        name: squared_error(apply_fn, tree.add_scaled(base, delta), experts, inputs)
        for name, delta in deltas.items()
    }
    assert errors["regmean"] < 0.9 * errors["average"]
    assert errors["plus_plus"] < 0.9 * errors["average"]
    first, second = deltas["regmean"], deltas["plus_plus"]
    np.testing.assert_allclose(
        first["layers_0"]["kernel"], second["layers_0"]["kernel"], rtol=1e-4, atol=1e-5
    )
    moved = first["layers_1"]["kernel"] - second["layers_1"]["kernel"]
    assert jnp.abs(moved).max() > 1e-3


def test_refuses_by_name(mlp):
    params, apply_fn = mlp
    with pytest.raises(ValueError, match="reads no kernel"):
        models.input_grams(lambda params, x: x.sum())(params, jnp.ones((2, 3)))
    capture = models.input_grams(apply_fn, mask_fn=lambda x: jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"inputs of 'layers_0' are \(2, 3\)"):
        capture(params, jnp.ones((2, 3)))
