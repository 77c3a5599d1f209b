import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.transforms.adapters import lora
from mtl_jax.transforms.quantization import nf4

pytestmark = pytest.mark.fast


def params(dtype=np.float32):
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "layers": {"query": {"kernel": array(3, 6, 4), "bias": array(3, 4)}},
        "head": {"kernel": array(4, 5)},
    }


def adapter(tree, rank=2, seed=1, rules=("kernel$",)):
    """One whose second factor is not zero."""
    shapes = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), tree, rules, rank=rank)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
    )


def product(node, factor):
    a, b = (np.asarray(node[k], np.float64) for k in "ab")
    return factor * np.einsum("...ir,...ro->...io", a, b)


def test_a_new_adapter_is_small_and_changes_nothing():
    base = params(jnp.bfloat16)
    new = lora.init(jax.random.key(0), base, ["query/kernel$", "head"], rank=3)
    shapes = jax.tree.map(jnp.shape, new)
    assert shapes == {
        "layers": {"query": {"kernel": {"a": (3, 6, 3), "b": (3, 3, 4)}}},
        "head": {"kernel": {"a": (4, 3), "b": (3, 5)}},
    }
    merged = lora.merge(base, new, alpha=16.0)
    jax.tree.map(np.testing.assert_array_equal, merged, base)
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(
        lambda x: x.dtype, base
    )
    assert np.abs(np.asarray(new["head"]["kernel"]["a"])).max() <= 1 / np.sqrt(4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_is_added_exactly(rslora):
    base = params()
    own = adapter(base)
    factor = 3.0 / (np.sqrt(2) if rslora else 2)
    merged = lora.merge(base, own, alpha=3.0, rslora=rslora)
    for found, old, node in (
        (merged["head"], base["head"], own["head"]),
        (merged["layers"]["query"], base["layers"]["query"], own["layers"]["query"]),
    ):
        want = np.asarray(old["kernel"], np.float64) + product(node["kernel"], factor)
        np.testing.assert_allclose(found["kernel"], want, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(
        merged["layers"]["query"]["bias"], base["layers"]["query"]["bias"]
    )
    again = lora.unmerge(merged, own, alpha=3.0, rslora=rslora)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), again, base)
    delta = lora.delta(own, alpha=3.0, rslora=rslora)
    np.testing.assert_allclose(
        delta["head"]["kernel"], product(own["head"]["kernel"], factor), rtol=1e-5
    )


def test_the_sum_is_cast_once():
    """Casting the product first would round twice."""
    base = {"kernel": jnp.full((1, 1), 256.0, jnp.bfloat16)}
    own = {"kernel": {"a": jnp.ones((1, 1)), "b": jnp.full((1, 1), 1.0039)}}
    merged = lora.merge(base, own, alpha=1.0)["kernel"]
    assert merged.dtype == jnp.bfloat16 and float(merged[0, 0]) == 258.0


def test_a_leaf_starts_alike_whichever_others_are_adapted():
    key, base = jax.random.key(3), params()
    both = lora.init(key, base, ["kernel$"], rank=2)
    one = lora.init(key, base, ["head"], rank=2)
    np.testing.assert_array_equal(
        both["head"]["kernel"]["a"], one["head"]["kernel"]["a"]
    )
    gaussian = lora.init(key, base, {"head": 2}, init="gaussian")
    assert 0.05 < float(jnp.std(gaussian["head"]["kernel"]["a"])) < 1.5


def test_ranks_by_rule():
    new = lora.init(jax.random.key(0), params(), {"head": 1, "kernel$": 3})
    assert new["head"]["kernel"]["a"].shape == (4, 1)
    assert new["layers"]["query"]["kernel"]["a"].shape == (3, 6, 3)


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_a_combination_is_the_sum_of_products(weights, rank):
    """Kills sums of factors, and a scale that is left out or taken twice."""
    base = {"kernel": jnp.zeros((4, 3))}
    loras = [adapter(base, rank, seed) for seed in range(len(weights))]
    joined = lora.combine(loras, weights, alpha=5.0)
    width = rank * len(weights)
    assert joined["kernel"]["a"].shape == (4, width)
    want = sum(
        w * product(each["kernel"], 5.0 / rank)
        for w, each in zip(weights, loras, strict=True)
    )
    got = lora.delta(joined, alpha=float(width))["kernel"]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_banks():
    base = params()
    loras = [adapter(base, seed=seed) for seed in range(3)]
    bank = lora.stack(loras)
    assert bank["layers"]["query"]["kernel"]["a"].shape == (3, 3, 6, 2)
    jax.tree.map(np.testing.assert_array_equal, lora.unstack(bank)[2], loras[2])
    spliced = lora.splice(base, bank, alpha=4.0, index=jnp.array([2, 0]))
    node = spliced["layers"]["query"]  # Layers lead, then the tasks.
    np.testing.assert_array_equal(
        node["lora_a"][1, 2], loras[2]["layers"]["query"]["kernel"]["a"][1]
    )
    np.testing.assert_allclose(
        node["lora_b"][1, 2], 2 * loras[2]["layers"]["query"]["kernel"]["b"][1]
    )
    assert node["lora_index"].shape == (3, 2)
    assert "lora_a" not in base["head"], "the parameters themselves stay as they are"


def test_quantised_leaves_count_as_what_they_stand_for():
    base = params()
    small = nf4.quantize(base, "head", block=2)
    own = adapter(small, rules=["head"])
    merged = lora.merge(small, own, alpha=2.0)
    want = lora.merge(nf4.dequantize(small), own, alpha=2.0)
    jax.tree.map(np.testing.assert_array_equal, merged, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: lora.init(jax.random.key(0), p, ["kernel", "queri"]),
            "rule 'queri' finds none of the 3 leaves, such as head/kernel",
        ),
        (lambda p: lora.init(jax.random.key(0), p, "kernel"), "one or more regexes"),
        (
            lambda p: lora.init(jax.random.key(0), p, ["kernel"], rank=5),
            "rank 5 for 'head/kernel' of \\(4, 5\\), wanted 1 ... 4",
        ),
        (
            lambda p: lora.init(jax.random.key(0), {"w": jnp.ones(3)}, ["w"], rank=1),
            "'w' is float32\\[3\\], wanted a floating matrix",
        ),
        (
            lambda p: lora.merge({"head": p["head"]}, adapter(p), alpha=1.0),
            "merge: the adapted 'layers/query/kernel' is not in params",
        ),
        (
            lambda p: lora.merge(
                {**p, "head": {"kernel": jnp.ones((5, 4))}}, adapter(p), alpha=1.0
            ),
            "'head/kernel' is \\(5, 4\\), the adapter is for \\(4, 5\\)",
        ),
        (
            lambda p: lora.splice(p, lora.stack([adapter(p)] * 2), alpha=1.0),
            "'head/kernel' is \\(4, 5\\), the adapter is for \\(2, 4, 5\\)",
        ),
        (
            lambda p: lora.splice(
                {"w": p["head"]["kernel"]},
                adapter({"w": p["head"]["kernel"]}, rules=["w"]),
                alpha=1.0,
            ),
            "'w' is not named kernel; use merge",
        ),
        (
            lambda p: lora.stack([adapter(p), adapter(p, rank=1)]),
            "stack: 'head/kernel/a' is \\(4, 1\\) in tree 1",
        ),
        (
            lambda p: lora.delta({"w": {"a": jnp.ones((2, 1))}}, alpha=1.0),
            "'w' of the adapter has \\['a'\\], wanted a and b",
        ),
        (
            lambda p: lora.combine([adapter(p)], [1.0, 2.0], alpha=1.0),
            "1 adapters with 2 weights",
        ),
    ],
)
def test_errors_name_the_leaf(call, message):
    with pytest.raises(ValueError, match=message):
        call(params())
