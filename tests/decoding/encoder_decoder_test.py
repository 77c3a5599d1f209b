import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from mtl_jax import decoding, models
from mtl_jax.decoding import _generate
from mtl_jax.models.backbones.encdec_sizes import ENCODER_DECODERS

SIZES = {
    "vocab_size": 13,
    "width": 8,
    "depth": 1,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 12,
    "relative_buckets": 6,
    "relative_distance": 5,
}
BART = {**ENCODER_DECODERS["bart-base"], **SIZES, "max_positions": 20}
CASES = {"t5": ({}, 0), "bart": (BART, 2)}
PROMPTS = [[3, 12, 5], [4], [5, 6, 11, 7, 12, 3]]
ANSWERS = [[[5, 7], [6, 11, 12]], [[8]], [[7], [9, 7], [10, 11, 3, 4]]]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(module, parameters, start token)."""
    options, start = CASES[request.param]
    module = models.EncoderDecoder(**{**SIZES, **options}, scan=True)
    ids = np.zeros((1, 4), np.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape) + 0.1, x.dtype), like
    )
    return module, params, start


def test_ahead_of_time_answers_have_room_of_their_own():
    """As many slots as tokens, whatever the prompt has."""
    module = models.EncoderDecoder(**{**BART, "max_positions": 6}, scan=True)
    ids = np.ones((1, 6), np.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), like)
    model = decoding.from_encoder_decoder(module, start=2)
    both = decoding.fused([model, model], sum)
    want = decoding.generate(model, params, ids, max_new_tokens=6)
    for step, own in ((model, params), (both, (params, params))):
        run = decoding.generation_fn(step, max_new_tokens=6)
        assert run(own, ids, np.array([6], np.int32)).rows() == want.rows()
        assert decoding.generate(step, own, ids, max_new_tokens=6).rows() == want.rows()
    with pytest.raises(ValueError, match="6 and 7 new tokens exceed the context of 6"):
        long = decoding.generation_fn(model, max_new_tokens=7)
        jax.eval_shape(long, params, ids, np.array([6], np.int32))
    with pytest.raises(ValueError, match="decoders and encoder-decoders keep prompts"):
        decoder = decoding.from_decoder(models.Decoder(vocab_size=13, max_positions=6))
        decoding.fused([model, decoder], sum)


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, read, mask, written):
    logits = module.apply({"params": params}, read, written, mask)
    return jax.nn.log_softmax(logits)


def logprobs_of(module, params, start, prompt, answer):
    """log p of every next token [L + 1, V], one pass over all, without a cache.

    What there is of padding is read by nothing: `models.EncoderDecoder` has a test.
    """
    read, written = np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32)
    read[0, : len(prompt)] = prompt
    written[0, : len(answer) + 1] = [start, *answer]
    mask = (np.arange(8) < len(prompt)).astype(np.int32)[None]
    found = forward(module, params, read, mask, written)
    return np.asarray(found[0, : len(answer) + 1])


def test_greedy_text_is_the_best_token_after_all_before(case):
    """Kills a start token that is generated, and padding that is read."""
    module, params, start = case
    model = decoding.from_encoder_decoder(module, start=start)
    got = decoding.generate(model, params, PROMPTS, max_new_tokens=5)
    for prompt, row, found in zip(PROMPTS, got.rows(), got.logprobs, strict=True):
        want = logprobs_of(module, params, start, prompt, row)[:5]
        np.testing.assert_array_equal(np.argmax(want, axis=1), row)
        own = np.take_along_axis(want, np.array(row)[:, None], 1)[:, 0]
        np.testing.assert_allclose(found, own, atol=1e-3, rtol=1e-3)
    alone = decoding.generate(model, params, PROMPTS[1:2], max_new_tokens=5)
    assert alone.rows() == got.rows()[1:2]
    before = _generate._generate._cache_size()
    decoding.generate(model, params, [[1, 2], [3], [4]], max_new_tokens=7)
    assert _generate._generate._cache_size() == before


def test_beams_share_the_memory_of_their_prompt(case):
    """One beam is greedy; of several, each scores what the model gives its text."""
    module, params, start = case
    model = decoding.from_encoder_decoder(module, start=start)
    options = {"max_new_tokens": 4, "alpha": 0.0}
    greedy = decoding.generate(model, params, PROMPTS, max_new_tokens=4)
    one = decoding.beam_search(model, params, PROMPTS, beams=1, **options)
    assert [rows[0] for rows in one.rows()] == greedy.rows()
    found = decoding.beam_search(model, params, PROMPTS, beams=3, **options)
    for prompt, rows, totals in zip(PROMPTS, found.rows(), found.logprobs, strict=True):
        assert len(set(map(tuple, rows))) == 3
        for row, total in zip(rows, totals, strict=True):
            want = logprobs_of(module, params, start, prompt, row)
            want = sum(want[t, y] for t, y in enumerate(row))
            np.testing.assert_allclose(total, want, atol=1e-3, rtol=1e-3)


def test_the_encoder_is_not_in_the_loop(case):
    """No product inside of the loop is over more rows than there are texts."""
    module, params, start = case
    model = decoding.from_encoder_decoder(module, start=start)

    def shapes(x, inside=False):
        for eqn in x.eqns:
            if inside and eqn.primitive.name == "dot_general":
                yield eqn.outvars[0].aval.shape
            for sub in jex.jaxprs_in_params(eqn.params):
                yield from shapes(sub, inside or eqn.primitive.name == "while")

    ids, lengths = decoding.pad_prompts(PROMPTS)

    def run(params):
        return decoding.generate(model, params, ids, lengths=lengths, max_new_tokens=3)

    jaxpr = jax.make_jaxpr(run)(params).jaxpr
    # [3, 1, F] in the decoder, [3, 16, F] in the encoder.
    widths = {s[1] for s in shapes(jaxpr) if len(s) == 3 and s[-1] == 12}
    assert widths == {1}


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_ragged_candidates_are_scored_one_by_one(case, rows):
    module, params, start = case
    fn = decoding.EncoderDecoderLogprobs(module, start=start, chunk=2)
    prompts, lengths = decoding.pad_prompts(PROMPTS)
    candidates = decoding.pad_candidates(ANSWERS)
    rank = jax.jit(
        lambda p, **more: decoding.rank_classify(
            fn, p, prompts, lengths, candidates, rows=rows, **more
        )
    )
    got = rank(params)
    for n, (prompt, group) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        want = []
        for answer in group:
            found = logprobs_of(module, params, start, prompt, answer)
            want.append(sum(float(found[t, y]) for t, y in enumerate(answer)))
        np.testing.assert_allclose(
            got.logprobs[n, : len(group)], want, atol=1e-3, rtol=1e-3
        )
        assert got.best[n] == np.argmax(want)
    assert np.isneginf(np.asarray(got.scores)[1, 1:]).all()


def test_packed_texts_score_what_they_score_alone(case):
    module, params, start = case
    fn = decoding.EncoderDecoderLogprobs(module, start=start)
    source = np.array([[3, 12, 5, 4, 5, 6, 0]], np.int32)
    source_segments = np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32)
    texts = np.array([[5, 7, 8, 9, 10, 0]], np.int32)
    segments = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    got = decoding.sequence_logprob(
        fn,
        params,
        texts,
        segment_ids=segments,
        source=source,
        source_segment_ids=source_segments,
    )
    assert got.count.tolist() == [5]
    for n in (1, 2):
        prompt = source[source_segments == n].tolist()
        answer = texts[segments == n].tolist()
        want = logprobs_of(module, params, start, prompt, answer)
        want = [want[t, y] for t, y in enumerate(answer)]
        np.testing.assert_allclose(
            got.tokens[segments == n], want, atol=1e-3, rtol=1e-3
        )
    assert got.tokens[0, -1] == 0


def test_prompts_and_answers_have_room_of_their_own():
    module = models.EncoderDecoder(**BART, scan=True)
    model = decoding.from_encoder_decoder(module, start=2)
    ids = np.zeros((1, 4), np.int32)
    params = module.init(jax.random.key(0), ids, ids)["params"]
    out = decoding.generate(model, params, [[1] * 20], max_new_tokens=20)
    assert out.lengths.tolist() == [20]
    assert np.isfinite(out.logprobs).all()
    for prompt, new in (([1] * 21, 2), ([1], 21)):
        with pytest.raises(ValueError, match="the context holds 20 of either"):
            decoding.generate(model, params, [prompt], max_new_tokens=new)
    with pytest.raises(ValueError, match="start is token 13, the vocabulary 13"):
        decoding.from_encoder_decoder(module, start=13)


def test_sources_belong_to_encoders():
    ids = jnp.ones((1, 3), jnp.int32)
    fn = decoding.EncoderDecoderLogprobs(models.EncoderDecoder(**SIZES))
    with pytest.raises(ValueError, match="a source belongs to models with an encoder"):
        decoding.sequence_logprob(fn, {}, ids)
    with pytest.raises(ValueError, match="a source belongs to models with an encoder"):
        decoding.sequence_logprob(
            decoding.DecoderLogprobs(models.Decoder()), {}, ids, source=ids
        )
