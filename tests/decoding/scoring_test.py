import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import decoding, models

OPTIONS = {"vocab_size": 11, "width": 8, "depth": 1, "num_heads": 2, "num_kv_heads": 1}
MODULE = models.Decoder(**OPTIONS, mlp_dim=12, max_positions=32, logit_softcap=3.0)
CHUNKED = decoding.DecoderLogprobs(MODULE, chunk=3)
TOKENS = np.random.default_rng(0).integers(1, 11, (4, 9)).astype(np.int32)


def logits_fn(params, ids, segment_ids):
    return MODULE.apply({"params": params}, ids, segment_ids)


WHOLE = decoding.LogitsLogprobs(logits_fn)


@pytest.fixture(scope="module")
def params():
    like = jax.eval_shape(MODULE.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape), x.dtype), like
    )


@pytest.fixture(scope="module")
def given(params):
    """(before, token) -> log p, one plain forward pass for each, in float64."""
    full = jax.jit(lambda ids: logits_fn(params, ids, None))

    @functools.cache
    def rows(before):
        ids = np.zeros((1, 16), np.int32)
        ids[0, : len(before)] = before
        x = np.asarray(full(ids)[0, len(before) - 1], np.float64)
        return x - np.log(np.exp(x).sum())

    return lambda before, token: rows(tuple(int(t) for t in before))[token]


@pytest.mark.parametrize("fn", [CHUNKED, WHOLE], ids=["chunked", "whole"])
def test_sequences_against_one_forward_per_token(params, given, fn):
    mask = np.ones(TOKENS.shape, bool)
    mask[0, 4], mask[1, :6], mask[2] = False, False, False
    got = jax.jit(functools.partial(decoding.sequence_logprob, fn))(
        params, TOKENS, mask
    )
    want = np.zeros(TOKENS.shape)
    for b, row in enumerate(TOKENS):
        for i in range(1, 9):
            want[b, i] = given(row[:i], row[i]) * mask[b, i]
    np.testing.assert_allclose(got.tokens, want, atol=1e-4)
    np.testing.assert_allclose(got.total, want.sum(axis=1), atol=1e-4)
    assert got.count.tolist() == [7, 3, 0, 8]


def test_packed_segments_score_as_rows_of_their_own(params, given):
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    got = jax.jit(
        lambda ids, s: decoding.sequence_logprob(CHUNKED, params, ids, segment_ids=s)
    )(TOKENS[:1], segments)
    row, want = TOKENS[0], np.zeros((1, 9))
    for i in (1, 2, 3):
        want[0, i] = given(row[:i], row[i])
    for i in (5, 6):
        want[0, i] = given(row[4:i], row[i])
    np.testing.assert_allclose(got.tokens, want, atol=1e-4)
    assert got.count.tolist() == [5]


PROMPTS = [[1, 2, 3], [4]]
CANDIDATES = [[[5], [6, 7, 8], [9, 9]], [[2, 3, 4, 5], [10]]]
CHARACTERS = np.array([[1, 5, 4], [7, 2, 0]])
FREE = [8, 1]


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("normalize", ["none", "tokens", "characters", "unconditional"])
def test_ranking_against_loops(params, given, normalize, rows):
    ids, lengths = decoding.pad_prompts(PROMPTS)
    candidates = decoding.pad_candidates(CANDIDATES)
    more = {"normalize": normalize, "rows": rows}
    if normalize == "characters":
        more["characters"] = CHARACTERS
    if normalize == "unconditional":
        more["unconditional"] = np.array(FREE)
    run = functools.partial(decoding.rank_classify, CHUNKED, **more)
    got = jax.jit(run)(params, ids, lengths, candidates)

    def total(prompt, tokens):
        return sum(given([*prompt, *tokens[:i]], t) for i, t in enumerate(tokens))

    for n, prompt in enumerate(PROMPTS):
        scores = []
        for m, tokens in enumerate(CANDIDATES[n]):
            plain = total(prompt, tokens)
            np.testing.assert_allclose(got.logprobs[n, m], plain, atol=1e-4)
            scores.append(
                {
                    "none": plain,
                    "tokens": plain / len(tokens),
                    "characters": plain / CHARACTERS[n, m],
                    "unconditional": plain - total(FREE, tokens),
                }[normalize]
            )
        np.testing.assert_allclose(got.scores[n, : len(scores)], scores, atol=1e-4)
        assert got.best[n] == int(np.argmax(scores))
    assert got.scores[1, 2] == got.logprobs[1, 2] == -jnp.inf


def constant(params, ids, labels, segments):
    del ids, segments
    return jnp.where(labels >= 0, params, params)


def test_equal_candidates_take_the_first_and_nan_takes_none():
    ids, lengths = decoding.pad_prompts([[1], [2]])
    candidates = decoding.pad_candidates([[[3], [4], [5]]] * 2)
    best = decoding.rank_classify(
        constant, jnp.float32(-1.0), ids, lengths, candidates
    ).best
    assert best.tolist() == [0, 0]
    best = decoding.rank_classify(
        constant, jnp.float32(jnp.nan), ids, lengths, candidates
    ).best
    assert best.tolist() == [-1, -1]
    # Without a prompt nothing predicts the first token.
    best = decoding.rank_classify(
        constant, jnp.float32(-1.0), ids, lengths * np.array([0, 1]), candidates
    ).best
    assert best.tolist() == [-1, 0]


@pytest.mark.parametrize(("window", "stride"), [(4, None), (5, 2), (9, 3), (32, 1)])
def test_perplexity_scores_every_token_once(params, given, window, stride):
    documents = [TOKENS[0].tolist(), TOKENS[1, :4].tolist(), [3], []]
    got = decoding.perplexity(
        CHUNKED, params, documents, window=window, stride=stride, batch_size=3
    )
    step, nll, tokens = stride or window - 1, 0.0, 0
    for document in documents:
        for i in range(1, len(document)):
            # The first window that reaches token i.
            begin = step * max(0, -(-(i + 1 - window) // step))
            nll -= given(document[begin:i], document[i])
            tokens += 1
    assert got.tokens == tokens == 11
    np.testing.assert_allclose(got.nll, nll, rtol=1e-4)
    np.testing.assert_allclose(got.value, np.exp(nll / tokens), rtol=1e-4)


def rank(params=None, **change):
    ids, lengths = decoding.pad_prompts(PROMPTS)
    candidates = decoding.pad_candidates(change.pop("candidates", CANDIDATES))
    return decoding.rank_classify(constant, 0.0, ids, lengths, candidates, **change)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: rank(normalize="length"), "normalize must be one of"),
        (lambda: rank(normalize="characters"), "characters belongs to"),
        (lambda: rank(unconditional=np.ones(2)), "unconditional belongs to"),
        (
            lambda: rank(normalize="unconditional", unconditional=np.ones(0, int)),
            "with a token or more",
        ),
        (lambda: rank(candidates=CANDIDATES[:1]), "wanted prompts"),
        (lambda: decoding.pad_candidates([[[1]], [[2], []]]), "question 1"),
        (lambda: decoding.pad_candidates([[]]), "question 0"),
        (lambda: decoding.sequence_logprob(constant, 0.0, jnp.ones(3)), "input_ids"),
        (
            lambda: decoding.sequence_logprob(
                constant, 0.0, jnp.ones((1, 3), int), jnp.ones((1, 2))
            ),
            r"mask is \(1, 2\)",
        ),
        (lambda: decoding.perplexity(constant, 0.0, [[1, 2]], window=1), "window"),
        (
            lambda: decoding.perplexity(constant, 0.0, [[1, 2]], window=4, stride=4),
            "stride",
        ),
        (lambda: decoding.perplexity(constant, 0.0, [[1]], window=4), "two tokens"),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()
