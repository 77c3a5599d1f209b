"""Low-rank adapters against PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.adapted import apply_adapted
from mtl_jax.transforms.adapters import lora

pytestmark = pytest.mark.reference


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.relu(nn.Dense(5, name="up")(x)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(rslora):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["up", "down"], use_rslora=rslora
    )
    theirs = peft.get_peft_model(Theirs(), config)
    state = dict(theirs.named_parameters())
    for name, value in state.items():
        if "lora_" in name:
            torch.nn.init.normal_(value)

    def kernel(name):
        return jnp.asarray(state[name].detach().numpy().T)

    params, own = {}, {}
    for layer in ("up", "down"):
        front = f"base_model.model.{layer}"
        params[layer] = {
            "kernel": kernel(f"{front}.base_layer.weight"),
            "bias": jnp.asarray(state[f"{front}.base_layer.bias"].detach().numpy()),
        }
        a, b = (kernel(f"{front}.lora_{k}.default.weight") for k in "AB")
        own[layer] = {"kernel": {"a": a, "b": b}}
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    out = theirs(torch.tensor(x))
    (out**2).sum().backward()
    options = {"alpha": 6.0, "rslora": rslora}

    def merged(own):
        return Two().apply({"params": lora.merge(params, own, **options)}, x)

    def read(own):
        return apply_adapted(Two(), params, own, x, **options)

    for f in (merged, read):
        np.testing.assert_allclose(f(own), out.detach().numpy(), rtol=1e-4, atol=1e-5)
        grads = jax.grad(lambda own, f=f: jnp.sum(jnp.square(f(own))))(own)
        for layer in ("up", "down"):
            for ours, name in (("a", "A"), ("b", "B")):
                want = state[f"base_model.model.{layer}.lora_{name}.default.weight"]
                np.testing.assert_allclose(
                    grads[layer]["kernel"][ours],
                    want.grad.numpy().T,
                    rtol=1e-3,
                    atol=1e-3,
                )
    fresh = lora.init(jax.random.key(0), params, ["kernel$"], rank=2)
    bound = float(jnp.abs(fresh["up"]["kernel"]["a"]).max())
    assert 0.2 < bound <= 0.5 + 1e-6, "kaiming: uniform in +-1/sqrt(in)"
