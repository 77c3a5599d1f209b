import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import decoding, models, train
from mtl_jax.train import sharding

MODULE = models.Decoder(
    vocab_size=19,
    width=16,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    max_positions=24,
    scan=True,
)
IDS = np.random.default_rng(0).integers(0, 19, (4, 16)).astype(np.int32)
LENGTHS = np.array([16, 3, 9, 1], np.int32)


@pytest.fixture(scope="module")
def params():
    like = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + 0.1, x.dtype),
        like["params"],
    )


def run(**options):
    model = decoding.from_decoder(MODULE)
    return decoding.generation_fn(model, max_new_tokens=8, **options)


def test_it_is_what_generate_does(params):
    prompts = [row[:n] for row, n in zip(IDS, LENGTHS, strict=True)]
    model = decoding.from_decoder(MODULE)
    first = decoding.generate(model, params, prompts, max_new_tokens=8)
    stop = int(first.tokens[0, 4])  # Some row ends before the last token.
    want = decoding.generate(model, params, prompts, max_new_tokens=8, stop=stop)
    got = jax.jit(run(stop=stop))(params, IDS, LENGTHS)
    assert got.tokens.shape == (4, 8)
    assert got.rows() == want.rows() != first.rows()
    np.testing.assert_array_equal(got.reasons, want.reasons)


def test_on_a_mesh_nothing_changes_and_the_cache_is_split(params):
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    want = jax.jit(run())(params, IDS, LENGTHS)
    split = NamedSharding(mesh, P("data"))
    ids, lengths = (jax.device_put(x, split) for x in (IDS, LENGTHS))
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run()).lower(whole, ids, lengths).compile()
    got = compiled(whole, ids, lengths)
    assert got.rows() == want.rows()
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    # Keys of one row and one of two heads a device, 24 slots; nowhere all of them.
    text = compiled.as_text()
    assert "f32[2,1,24,1,4]" in text and "f32[2,4,24,2,4]" not in text


@pytest.mark.parametrize("rows", [4, 3])
def test_generate_takes_parameters_that_lie_on_a_mesh(params, rows):
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    module = MODULE.clone(vocab_size=20)
    table = jnp.pad(params["embeddings"]["word"]["embedding"], ((0, 1), (0, 0)))
    params = {**params, "embeddings": {"word": {"embedding": table}}}
    specs = train.specs_from_rules(params, models.sharding_rules(module))
    split = jax.device_put(params, sharding.shardings(mesh, params, specs))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(split))
    prompts = [row[:n] for row, n in zip(IDS[:rows], LENGTHS, strict=False)]
    model = decoding.from_decoder(module)
    want = decoding.generate(model, params, prompts, max_new_tokens=6)
    got = decoding.generate(model, split, prompts, max_new_tokens=6)
    assert got.rows() == want.rows()
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


@pytest.mark.fast
def test_sizes_and_stops_that_the_model_lacks(params):
    with pytest.raises(
        ValueError, match="16 and 9 new tokens exceed the context of 24"
    ):
        model = decoding.from_decoder(MODULE)
        long = decoding.generation_fn(model, max_new_tokens=9)
        jax.eval_shape(long, params, IDS, LENGTHS)
    with pytest.raises(ValueError, match="has token 19, the vocabulary 19"):
        run(stop=19)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, is 0"):
        decoding.generation_fn(decoding.from_decoder(MODULE), max_new_tokens=0)
