import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import decoding

PROMPTS = [[1, 2, 3], [4]]


def only_first(found):
    return found[0]


def proxy(found):
    large, small, expert = found
    return large + expert - small


def test_fused_models_read_the_same_tokens(recurrent, weights, naive):
    models = [recurrent()] * 3
    params = tuple(weights(seed) for seed in range(3))
    alone = decoding.generate(models[0], params[0], PROMPTS, max_new_tokens=8)
    first = decoding.generate(
        decoding.fused(models, only_first), params, PROMPTS, max_new_tokens=8
    )
    assert first.rows() == alone.rows()
    got = decoding.generate(
        decoding.fused(models, proxy), params, PROMPTS, max_new_tokens=8
    ).rows()
    for prompt, row in zip(PROMPTS, got, strict=True):
        for t, token in enumerate(row):
            seen = prompt + row[:t]
            large, small, expert = (naive(p, seen) for p in params)
            assert np.argmax(large + expert - small) == token
    assert got != alone.rows()
    beams = decoding.beam_search(
        decoding.fused(models, only_first), params, PROMPTS, max_new_tokens=4, beams=3
    )
    want = decoding.beam_search(
        models[0], params[0], PROMPTS, max_new_tokens=4, beams=3
    )
    assert beams.rows() == want.rows()


def mean(found):
    return sum(found) / len(found)


def test_vocabularies_of_different_size_are_cut(recurrent, weights):
    small, large = recurrent(vocab_size=5), recurrent(context=30)
    with pytest.raises(ValueError, match="vocabularies are of 5, 7 tokens"):
        decoding.fused([small, large], mean)
    with pytest.raises(ValueError, match="vocab_size is 6, the smallest vocabulary 5"):
        decoding.fused([small, large], mean, vocab_size=6)
    with pytest.raises(ValueError, match="one or more"):
        decoding.fused([], mean)
    both = decoding.fused([small, large], mean, vocab_size=5)
    assert (both.vocab_size, both.context) == (5, 30)
    params = (weights(0, vocab=5), weights(1))
    out = decoding.generate(both, params, [[1]], max_new_tokens=6)
    assert np.asarray(out.tokens).max() < 5
    with pytest.raises(ValueError, match="2 models, but the parameters of 1"):
        decoding.generate(both, params[:1], [[1]], max_new_tokens=6)


def test_equal_adapters_are_equal_keys():
    from mtl_jax import models

    module = models.Decoder(depth=1, rotary_scaling={"rope_type": "linear"})
    again = models.Decoder(depth=1, rotary_scaling={"rope_type": "linear"})
    one, two = decoding.from_decoder(module), decoding.from_decoder(again)
    assert one == two and hash(one) == hash(two)
    assert one != decoding.from_decoder(again, cache_dtype=jnp.bfloat16)
    cache = jax.eval_shape(
        lambda: decoding.from_decoder(again, cache_dtype=jnp.bfloat16).init_cache(
            None, 2, 8
        )
    )
    assert cache["layers_0"]["key"].dtype == jnp.bfloat16
