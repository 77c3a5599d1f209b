"""Mixtures from dense decoders: what they must equal, and who gets which prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models

IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def decoder(scan=False, **options):
    return models.Decoder(
        vocab_size=13,
        width=8,
        depth=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=10,
        max_positions=8,
        scan=scan,
        **options,
    )


def moved(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p + jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), params
    )


@pytest.mark.parametrize("scan", [False, True])
def test_equal_experts_are_the_dense_model(scan, fill):
    dense = decoder(scan)
    base = fill(dense, IDS)
    gates = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    params = models.assemble_experts(base, [base] * 3, gates)
    mixture = decoder(scan, num_experts=3, normalize_experts=True)
    wanted = jax.eval_shape(mixture.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    got = mixture.apply({"params": params}, IDS, SEGMENTS)
    want = dense.apply({"params": base}, IDS, SEGMENTS)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_each_expert_alone_is_its_feed_forward_in_the_base(scan, fill):
    dense = decoder(scan)
    base = fill(dense, IDS)
    experts = [moved(base, seed) for seed in (1, 2)]
    hidden = jnp.stack(dense.apply({"params": base}, IDS, return_hidden=True)[:-1])
    assert hidden.shape == (2, 2, 5, 8)
    flat = jnp.zeros((2, 2, 8))
    params = models.assemble_experts(base, experts, flat)
    names = ["layers"] if scan else ["layers_0", "layers_1"]
    for t, expert in enumerate(experts):
        own = base | {k: base[k] | {"mlp": expert[k]["mlp"]} for k in names}
        want = dense.apply({"params": own}, IDS)
        override = jnp.zeros((2, 2, 5, 2)).at[..., t].set(1.0)
        single = decoder(
            scan, num_experts=2, experts_per_token=1, normalize_experts=True
        )
        got = single.apply({"params": params}, IDS, routing_override=override)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_prompts_go_to_their_expert(fill):
    dense = decoder()
    base = fill(dense, IDS)
    prompts = [jnp.array([[1, 2, 3]]), jnp.array([[7, 8, 9]])]

    def hidden(ids):
        return jnp.stack(dense.apply({"params": base}, ids, return_hidden=True)[:-1])

    seen = [hidden(ids)[:1] for ids in prompts]
    gates = jnp.stack(
        [
            models.prompt_gates(seen[0], reduce="sum", negative=seen[1]),
            models.prompt_gates(seen[1], reduce="sum", negative=seen[0]),
        ],
        1,
    )
    for t in range(2):
        logits = jnp.einsum("nbld,ned->e", seen[t], gates)
        assert int(jnp.argmax(logits)) == t


@pytest.mark.parametrize("reduce", ["last", "mean", "sum"])
def test_gates_count_tokens_alone(reduce):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 2, 5, 4))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    rows = {
        "last": (hidden[:, 0, 4] + hidden[:, 1, 2]) / 2,
        "mean": (hidden[:, 0].mean(1) + hidden[:, 1, :3].mean(1)) / 2,
        "sum": hidden[:, 0].sum(1) + hidden[:, 1, :3].sum(1),
    }
    want = rows[reduce] / np.linalg.norm(rows[reduce], axis=-1, keepdims=True)
    run = jax.jit(lambda h: models.prompt_gates(h, jnp.asarray(mask), reduce=reduce))
    np.testing.assert_allclose(run(jnp.asarray(hidden, "f4")), want, atol=1e-5)
    same = models.prompt_gates(
        jnp.asarray(hidden, "f4"), reduce=reduce, negative=jnp.asarray(hidden, "f4")
    )
    assert not same.any()


def test_errors(fill):
    dense = decoder()
    base = fill(dense, IDS)
    gates = jnp.zeros((2, 1, 8))
    with pytest.raises(ValueError, match="assemble_experts: no experts"):
        models.assemble_experts(base, [], gates)
    with pytest.raises(ValueError, match=r"assemble_experts: gates are \(2, 1, 8\)"):
        models.assemble_experts(base, [base, base], gates)
    with pytest.raises(ValueError, match="assemble_experts: .* expert 0"):
        models.assemble_experts(base, [base["layers_0"]], gates)
    plain = decoder(gated=False)
    other = fill(plain, IDS)
    with pytest.raises(ValueError, match="'layers_0/mlp' has .* wanted kernels gate"):
        models.assemble_experts(other, [other], gates)
    with pytest.raises(ValueError, match="assemble_experts: base has"):
        models.assemble_experts({"w": gates}, [{"w": gates}], gates)
    with pytest.raises(ValueError, match="prompt_gates: reduce is 'max'"):
        models.prompt_gates(jnp.zeros((1, 1, 1, 1)), reduce="max")
    with pytest.raises(ValueError, match="prompt_gates: hidden is"):
        models.prompt_gates(jnp.zeros((1, 2, 3)))
