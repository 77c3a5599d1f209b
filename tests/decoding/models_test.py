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


def mixed(found):
    """The sharper of two models counts more, row by row; says how much."""
    peaks = jnp.stack([jnp.max(x, axis=1) for x in found], axis=1)
    alpha = jax.nn.softmax(peaks, axis=1)
    logits = sum(alpha[:, i, None] * x for i, x in enumerate(found))
    return logits, {"alpha": alpha, "first": jnp.argmax(found[0], axis=1)}


def test_what_is_recorded_comes_back_step_by_step(recurrent, weights, naive):
    model = decoding.fused([recurrent()] * 2, mixed)
    params = weights(0), weights(1)
    free = decoding.generate(model, params, PROMPTS, max_new_tokens=6)
    stop = [free.rows()[0][:3]]
    options = {"max_new_tokens": 6, "stop": stop}
    out = decoding.generate(model, params, PROMPTS, **options)
    assert out.records["alpha"].shape == (6, 2, 2)
    assert out.records["first"].shape == (6, 2)
    lengths = out.lengths.tolist()
    assert lengths[0] == 3
    for b, (prompt, row) in enumerate(zip(PROMPTS, out.rows(stop=True), strict=True)):
        for t, token in enumerate(row):
            a, b_ = (naive(p, prompt + row[:t]) for p in params)
            odds = np.exp(a.max() - b_.max())
            want = odds / (1 + odds), 1 / (1 + odds)
            np.testing.assert_allclose(out.records["alpha"][t, b], want, rtol=1e-4)
            assert out.records["first"][t, b] == np.argmax(a)
            assert np.argmax(want[0] * a + want[1] * b_) == token
        assert not np.any(out.records["alpha"][lengths[b] :, b])
    *_, last = decoding.stream(model, params, PROMPTS, **options)
    steps = max(lengths)
    for ours, streamed in zip(
        jax.tree.leaves(out.records), jax.tree.leaves(last.records), strict=True
    ):
        np.testing.assert_allclose(streamed, ours[:steps], rtol=1e-6)
    alone = decoding.generate(recurrent(), params[0], PROMPTS, max_new_tokens=2)
    assert alone.records is None


def test_beams_of_a_model_that_records(recurrent, weights):
    models, params = [recurrent()] * 2, (weights(0), weights(1))
    found = [
        decoding.beam_search(
            decoding.fused(models, fuse), params, PROMPTS, max_new_tokens=4, beams=2
        ).rows()
        for fuse in (mixed, lambda x: mixed(x)[0])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        (lambda x: (x[0], jnp.ones(3)), r"lead with 2 rows, found \(3,\)"),
        (lambda x: (x[0], 1.0), r"lead with 2 rows, found \(\)"),
        (lambda x: (x[0], x[0], x[0]), "makes 3 things"),
    ],
)
def test_records_that_do_not_fit(recurrent, weights, fuse, message):
    model = decoding.fused([recurrent()], fuse)
    with pytest.raises(ValueError, match=message):
        decoding.generate(model, (weights(),), PROMPTS, max_new_tokens=2)


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


def test_records_of_a_model_inside_are_refused(recurrent, weights):
    inner = decoding.fused([recurrent()] * 2, mixed)
    outer = decoding.fused([inner, recurrent()], sum)
    own = ((weights(0), weights(1)), weights(0))
    with pytest.raises(ValueError, match="a model inside records something itself"):
        decoding.generate(outer, own, PROMPTS, max_new_tokens=4)
