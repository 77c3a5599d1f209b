import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.adapted import apply_adapted
from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.quantization import nf4

RULES = (r"attention/(query|out)/kernel$", r"mlp/\w+/kernel$")
IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])


def decoder(scan):
    return models.Decoder(
        vocab_size=13,
        width=8,
        depth=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=10,
        max_positions=8,
        scan=scan,
        remat=scan,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "scan, remat"])
def case(request, fill):
    module = decoder(request.param)
    params = fill(module, IDS)
    rng = np.random.default_rng(1)

    def adapter():
        like = lora.init(jax.random.key(0), params, RULES, rank=2)
        return jax.tree.map(
            lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), like
        )

    return module, params, [adapter(), adapter(), adapter()]


def test_intercepted_equals_merged_with_gradients(case):
    """Kills a scale that is left out, and factors that every layer shares."""
    module, params, (own, *_) = case

    def merged(own):
        whole = lora.merge(params, own, alpha=6.0)
        return module.apply({"params": whole}, IDS)

    def read(own):
        return apply_adapted(module, params, own, IDS, alpha=6.0)

    def both(own):
        outs = [jax.vjp(f, own) for f in (merged, read)]
        return [(out, back(jnp.cos(out))[0]) for out, back in outs]

    (want, want_grad), (got, got_grad) = jax.jit(both)(own)
    plain = module.apply({"params": params}, IDS)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-5)
    for x, y in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def test_every_example_by_its_own_adapter(case):
    module, params, loras = case
    index = jnp.array([2, 0])

    def banked(bank):
        return apply_adapted(module, params, bank, IDS, alpha=6.0, index=index)

    got = jax.jit(banked)(lora.stack(loras))
    for row, which in enumerate(index.tolist()):
        whole = lora.merge(params, loras[which], alpha=6.0)
        want = module.apply({"params": whole}, IDS[row : row + 1])[0]
        np.testing.assert_allclose(got[row], want, atol=2e-5)


def test_quantised_kernels_are_decoded_in_their_layers(case):
    module, params, (own, *_) = case
    small = nf4.quantize(params, r"layers.*kernel$", "embedding", block=4)
    whole = lora.merge(nf4.dequantize(small), own, alpha=6.0)
    want = module.apply({"params": whole}, IDS)
    run = jax.jit(lambda p, a: apply_adapted(module, p, a, IDS, alpha=6.0))
    np.testing.assert_allclose(run(small, own), want, atol=2e-5)
    alone = apply_adapted(module, small, None, IDS)
    plain = module.apply({"params": nf4.dequantize(small)}, IDS)
    np.testing.assert_allclose(alone, plain, atol=2e-5)


def test_quantised_layers_are_decoded_one_at_a_time():
    """Scratch memory of a gradient: less than a quarter of the decoded kernels."""
    sizes = {"depth": 16, "width": 64, "mlp_dim": 256}
    module = decoder(True).clone(**sizes)
    like = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    small = jax.eval_shape(lambda p: nf4.quantize(p, r"layers.*kernel$"), like)
    own = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, RULES, rank=1), like)

    def loss(own, small):
        return jnp.sum(apply_adapted(module, small, own, IDS, alpha=1.0))

    compiled = jax.jit(jax.grad(loss)).lower(own, small).compile()
    kernels = sum(x.size * 4 for x in jax.tree.leaves(like["layers"]) if x.ndim > 2)
    assert compiled.memory_analysis().temp_size_in_bytes < kernels / 4


def test_what_no_layer_reads_is_refused(fill):
    """`head=False` does not read the head; its adapter must not vanish silently."""
    module = decoder(False).clone(tied=False, depth=1)
    params = fill(module, IDS)
    own = lora.init(jax.random.key(0), params, ["head/kernel"], rank=1)
    with pytest.raises(ValueError, match="'head' is adapted or quantised, but no Den"):
        apply_adapted(module, params, own, IDS, head=False)
    small = nf4.quantize(params, "head/kernel")
    with pytest.raises(ValueError, match="'head' is adapted or quantised, but no Den"):
        apply_adapted(module, small, None, IDS, head=False)
