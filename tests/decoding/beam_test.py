import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import decoding
from mtl_jax.decoding import logits

END = 0


def penalty(kind, alpha, n):
    return n**alpha if kind == "mean" else ((5 + n) / 6) ** alpha


def naive_beam(step, size, limit, kind, alpha, end, early=False):
    """Texts as (score, tokens, log p), best first; `step(tokens) -> log p [V]`."""
    alive, ended = [((), 0.0)], []
    for n in range(1, limit + 1):
        ranked = [
            (total + p, (*tokens, v))
            for tokens, total in alive
            for v, p in enumerate(step(tokens))
            if p > -np.inf
        ]
        ranked.sort(key=lambda item: -item[0])
        for total, tokens in ranked[:size]:
            if tokens[-1] == end or n == limit:
                ended.append((total / penalty(kind, alpha, n), tokens, total))
        ended = sorted(ended, key=lambda item: -item[0])[:size]
        alive = [(t, s) for s, t in ranked if t[-1] != end and n < limit][:size]
        full = len(ended) == size
        if not alive or (full and early):
            break
        if full and ended[-1][0] >= alive[0][1] / penalty(kind, alpha, limit):
            break
    return ended


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("kind", "alpha"), [("mean", 1.0), ("mean", 0.0), ("gnmt", 0.6)]
)
def test_beams_are_those_of_the_naive_search(
    recurrent, weights, naive_logprobs, kind, alpha, early
):
    prompts, size, limit = [[1, 2, 3], [4], [5, 6]], 3, 6
    params = weights(5)
    got = decoding.beam_search(
        recurrent(),
        params,
        prompts,
        max_new_tokens=limit,
        beams=size,
        stop=END,
        penalty=kind,
        alpha=alpha,
        early_stopping=early,
    )
    for b, prompt in enumerate(prompts):
        want = naive_beam(
            lambda tokens, prompt=prompt: naive_logprobs(params, [*prompt, *tokens]),
            size,
            limit,
            kind,
            alpha,
            END,
            early,
        )
        assert [tuple(r) for r in got.rows(stop=True)[b]] == [t for _, t, _ in want]
        np.testing.assert_allclose(got.scores[b], [s for s, _, _ in want], atol=1e-4)
        np.testing.assert_allclose(got.logprobs[b], [s for _, _, s in want], atol=1e-4)
        stops = [int(t[-1] == END) for _, t, _ in want]
        assert got.stop_lengths[b].tolist() == stops


def texts(vocab, limit):
    """Every text that ends, by END or by its length."""
    for n in range(1, limit + 1):
        for tokens in itertools.product(range(vocab), repeat=n):
            if END not in tokens[:-1] and (tokens[-1] == END or n == limit):
                yield tokens


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_wide_beams_are_the_exhaustive_search(
    recurrent, weights, naive_logprobs, alpha
):
    params, limit, best = weights(1, vocab=3), 4, 20
    size = 60
    got = decoding.beam_search(
        recurrent(vocab_size=3),
        params,
        [[1, 2]],
        max_new_tokens=limit,
        beams=size,
        stop=END,
        alpha=alpha,
    )
    scores = {}
    for tokens in texts(3, limit):
        total = sum(
            naive_logprobs(params, [1, 2, *tokens[:i]])[t] for i, t in enumerate(tokens)
        )
        scores[tokens] = total / len(tokens) ** alpha
    want = sorted(scores, key=lambda t: -scores[t])
    assert [tuple(r) for r in got.rows(stop=True)[0][:best]] == want[:best]
    # All there are, each once; the other places are empty.
    found = [tuple(r) for r in got.rows(stop=True)[0] if r]
    assert sorted(found) == sorted(want)
    empty = np.asarray(got.lengths[0]) == 0
    np.testing.assert_array_equal(np.asarray(got.scores[0]) == -np.inf, empty)


def test_one_beam_is_greedy_and_one_program_serves_many(recurrent, weights):
    model = recurrent(context=41)  # Equal to no other model that was compiled.
    for seed, (new, alpha) in enumerate([(6, 1.0), (9, 0.5), (12, 0.0)]):
        options = {"max_new_tokens": new, "stop": 7 - 1 - seed}
        prompts = [[1] * (seed + 1), [2]]
        got = decoding.beam_search(
            model,
            weights(seed),
            prompts,
            beams=1,
            alpha=alpha,
            early_stopping=True,
            **options,
        )
        assert model.traces.count("decode") == 1
        want = decoding.generate(recurrent(), weights(seed), prompts, **options)
        np.testing.assert_allclose(
            got.logprobs[:, 0], want.logprobs.sum(axis=1), atol=1e-4
        )
        assert [r[0] for r in got.rows()] == want.rows()


def test_stop_sequences_and_choices(recurrent, weights, naive_logprobs):
    found = [[1, 2], [1, 3, 4], [5]]
    params = weights(3)
    got = decoding.beam_search(
        recurrent(),
        params,
        [[2, 1]],
        max_new_tokens=5,
        beams=4,
        stop=[6, [3, 4]],
        process=logits.choices(found, end=6),
        alpha=0.0,
    )
    rows = got.rows(stop=True)[0]
    # "1 3 4" ends by its own last tokens; three texts for four places.
    assert sorted(r for r in rows if r) == [[1, 2, 6], [1, 3, 4], [5, 6]]
    assert rows[3] == [] and got.scores[0, 3] == -jnp.inf
    for row, total in zip(rows[:3], got.logprobs[0], strict=False):
        want = sum(
            naive_logprobs(params, [2, 1, *row[:i]])[t] for i, t in enumerate(row)
        )
        np.testing.assert_allclose(total, want, atol=1e-4)


def test_rows_that_are_not_finite_say_so(recurrent, weights):
    params = weights(0)
    params["embed"] = params["embed"].at[3].set(jnp.nan)
    got = decoding.beam_search(
        recurrent(),
        params,
        [[3], [1]],
        max_new_tokens=3,
        beams=2,
        process=logits.banned([3]),
    )
    assert np.isnan(got.scores[0]).all() and got.rows()[0] == [[], []]
    assert np.isfinite(got.scores[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "beams must be 1 or more"),
        ({"penalty": "median"}, "penalty must be one of"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"max_new_tokens": 40}, "context of 40"),
        ({"stop": 9}, "token 9, the vocabulary 7"),
    ],
)
def test_errors(recurrent, weights, change, message):
    options = {"prompts": [[1]], "max_new_tokens": 5, "beams": 2, **change}
    with pytest.raises(ValueError, match=message):
        decoding.beam_search(recurrent(), weights(), **options)
