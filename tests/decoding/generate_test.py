import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import decoding, models
from mtl_jax.decoding import Reason, logits

PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2]]


def greedy(naive, params, prompt, steps, end=None):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(np.argmax(naive(params, ids))))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_the_naive_loop(recurrent, weights, naive, naive_logprobs, seed):
    params, end = weights(seed), 3
    got = decoding.generate(recurrent(), params, PROMPTS, max_new_tokens=9, stop=end)
    want = [greedy(naive, params, p, 9, end) for p in PROMPTS]
    assert got.rows(stop=True) == want
    assert got.rows() == [w[:-1] if w[-1] == end else w for w in want]
    assert got.tokens.shape == (3, 9)
    stopped = [w[-1] == end for w in want]
    np.testing.assert_array_equal(got.reasons, np.where(stopped, 1, 0))
    for b, (prompt, row) in enumerate(zip(PROMPTS, want, strict=True)):
        for t, token in enumerate(row):
            p = naive_logprobs(params, prompt + row[:t])[token]
            np.testing.assert_allclose(got.logprobs[b, t], p, atol=1e-4)
        assert not got.logprobs[b, len(row) :].any()
        assert not got.tokens[b, len(row) :].any()


def test_greedy_of_a_decoder_is_its_full_forward():
    options = {"vocab_size": 13, "width": 8, "depth": 2, "num_heads": 2}
    more = {"num_kv_heads": 1, "mlp_dim": 12, "max_positions": 24, "scan": True}
    module = models.Decoder(**options, **more)
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape), x.dtype), like["params"]
    )
    full = jax.jit(lambda ids: module.apply({"params": params}, ids))
    model = decoding.from_decoder(module)
    got = decoding.generate(model, params, PROMPTS, max_new_tokens=6).rows()
    for prompt, row in zip(PROMPTS, got, strict=True):
        ids = np.zeros((1, 24), np.int32)
        ids[0, : len(prompt) + 6] = prompt + row
        best = np.argmax(full(ids)[0], axis=-1)
        assert best[len(prompt) - 1 : len(prompt) + 5].tolist() == row
    assert len(set(sum(got, []))) > 3
    # The last slot of the context can be filled.
    whole = decoding.generate(model, params, [PROMPTS[2]], max_new_tokens=19).rows()[0]
    assert whole[:6] == got[2] and len(whole) == 19


def test_rows_do_not_depend_on_their_batch(recurrent, weights):
    params = weights(1)
    options = {"max_new_tokens": 8, "process": logits.temperature(1.5)}
    keys = jax.random.split(jax.random.key(0), 3)

    def run(rows, **more):
        prompts = [PROMPTS[i] for i in rows]
        out = decoding.generate(recurrent(), params, prompts, **options, **more)
        return out.rows()

    together = run([0, 1, 2], key=keys)
    assert run([2, 0], key=keys[jnp.array([2, 0])]) == [together[2], together[0]]
    assert run([1], key=keys[1:2]) == [together[1]]
    # A neighbour of another bucket.
    longer = decoding.generate(
        recurrent(), params, [PROMPTS[0], [1] * 20], key=keys[:2], **options
    )
    assert longer.rows()[0] == together[0]
    one = run([0, 1], key=jax.random.key(5))
    assert run([0], key=jax.random.key(5)) == one[:1]
    assert run([0, 0], key=jax.random.key(5))[1] != one[0]
    assert run([0, 0], key=jax.random.key(6)) != run([0, 0], key=jax.random.key(5))


def test_one_program_per_bucket(recurrent, weights):
    model = recurrent(context=41)  # Equal to no other model that was compiled.

    def run(prompts, new, seed, t, **more):
        process = logits.chain(logits.temperature(t), logits.top_k(3))
        decoding.generate(
            model,
            weights(seed),
            prompts,
            max_new_tokens=new,
            key=jax.random.key(seed),
            process=process,
            stop=seed,
            **more,
        )

    run([[1, 2], [3]], 5, 0, 1.0)
    assert model.traces == ["prefill", "decode"]
    for seed, (size, new) in enumerate([(1, 16), (16, 2), (9, 9)]):
        run([[1] * size, [2]], new, seed, 0.5 + seed)
    run(np.ones((2, 12), np.int32), 3, 1, 2.0, lengths=np.array([12, 4]))
    assert model.traces == ["prefill", "decode"]
    run([[1] * 17, [2]], 5, 0, 1.0)
    assert len(model.traces) == 4


class Fixed:
    """The same logits [B, V] at every step, one row of the parameters per row."""

    context = None
    vocab_size = None

    def init_cache(self, params, batch, length):
        return ()

    def prefill(self, params, ids, lengths, cache):
        return params, cache

    def decode(self, params, token, cache):
        return params, cache


FIXED = Fixed()


class Script:
    """Row b writes params[b, 0], params[b, 1], ... whatever is chosen."""

    context = None
    vocab_size = 10

    def init_cache(self, params, batch, length):
        return jnp.int32(0)

    def prefill(self, params, ids, lengths, cache):
        return jax.nn.one_hot(params[:, 0], 10), jnp.int32(1)

    def decode(self, params, token, cache):
        return jax.nn.one_hot(params[:, cache], 10), cache + 1


SCRIPT = Script()


def test_stop_sequences_end_their_own_row():
    text = jnp.array([[1, 2, 3, 4, 5, 6], [2, 3, 1, 2, 9, 3], [7, 7, 7, 7, 7, 7]])
    prompts = [[1], [1], [2]]
    got = decoding.generate(
        SCRIPT, text, prompts, max_new_tokens=6, stop=[[2, 3], [1, 2, 9], 8]
    )
    assert got.rows() == [[1], [], [7] * 6]
    assert got.rows(stop=True) == [[1, 2, 3], [2, 3], [7] * 6]
    assert got.reasons.tolist() == [Reason.STOP, Reason.STOP, Reason.LENGTH]
    # The longest that ends here; what the prompt holds does not count.
    got = decoding.generate(
        SCRIPT, text, prompts, max_new_tokens=5, stop=[4, [3, 4], [3, 4, 5], [1, 1, 2]]
    )
    assert got.stop_lengths.tolist() == [2, 0, 0]
    assert got.rows()[0] == [1, 2]


def test_rows_without_a_token_and_without_numbers():
    params = jnp.array([[0.0, 1.0, 2.0], [jnp.nan, 0, 0], [0, jnp.inf, 0]])
    got = decoding.generate(FIXED, params, [[1]] * 3, max_new_tokens=3)
    assert got.reasons.tolist() == [0, Reason.NOT_FINITE, Reason.NOT_FINITE]
    assert got.rows() == [[2, 2, 2], [], []]
    got = decoding.generate(
        FIXED, params, [[1]] * 3, max_new_tokens=3, process=logits.banned([0, 1, 2])
    )
    assert got.reasons.tolist()[0] == Reason.NO_TOKEN
    assert got.lengths.tolist() == [0, 0, 0]
    assert np.isfinite(got.logprobs).all()


def test_constrained_rows_say_one_of_the_choices(recurrent, weights):
    found = [[1, 2], [1, 3, 4], [5]]
    out = decoding.generate(
        recurrent(),
        weights(2),
        [[1]] * 40,
        max_new_tokens=6,
        key=jax.random.key(0),
        process=logits.chain(logits.temperature(9.0), logits.choices(found, end=6)),
        stop=6,
    )
    rows = out.rows()
    assert {tuple(r) for r in rows} == {tuple(c) for c in found}
    assert (np.asarray(out.reasons) == Reason.STOP).all()


def chi_square(counts, p):
    """Statistic and its 0.9999 quantile (Wilson-Hilferty) of observed counts."""
    want = p[p > 0] * counts.sum()
    assert not counts[p == 0].any()
    n = len(want) - 1
    limit = n * (1 - 2 / (9 * n) + 3.719 * (2 / (9 * n)) ** 0.5) ** 3
    return ((counts[p > 0] - want) ** 2 / want).sum(), limit


@pytest.mark.parametrize("top_k", [6, 3])
def test_samples_follow_the_distribution(top_k):
    row = np.array([0.3, -1.0, 1.2, 0.0, 0.5, -0.4])
    rows, columns = 1000, 8
    p = np.exp(row / 0.8) * (row >= np.sort(row)[-top_k])
    p /= p.sum()
    out = decoding.generate(
        FIXED,
        jnp.broadcast_to(jnp.asarray(row, jnp.float32), (rows, 6)),
        [[1]] * rows,
        max_new_tokens=columns,
        key=jax.random.key(3),
        process=logits.chain(logits.temperature(0.8), logits.top_k(top_k)),
    )
    tokens = np.asarray(out.tokens)
    found, limit = chi_square(np.bincount(tokens.ravel(), minlength=6), p)
    assert found < limit
    # Steps and rows are independent: pairs follow the product.
    for a, b in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        pairs = np.bincount((6 * a + b).ravel(), minlength=36)
        found, limit = chi_square(pairs, np.outer(p, p).ravel())
        assert found < 1.5 * limit


@pytest.mark.parametrize("sampled", [False, True])
def test_a_stream_ends_as_the_whole(recurrent, weights, sampled):
    model, params = recurrent(context=42 + sampled), weights(3)
    key = jax.random.key(1) if sampled else None
    options = {"max_new_tokens": 10, "key": key, "stop": [2, [4, 4]]}
    whole = decoding.generate(model, params, PROMPTS, **options)
    steps = list(decoding.stream(model, params, PROMPTS, **options))
    last = steps[-1]
    assert len(steps) == max(whole.lengths.tolist()) == last.tokens.shape[1]
    assert last.rows() == whole.rows()
    np.testing.assert_array_equal(last.reasons, whole.reasons)
    for t, step in enumerate(steps):
        np.testing.assert_array_equal(step.tokens, last.tokens[:, : t + 1])
    assert model.traces.count("prefill") == 2
    model.traces.clear()
    list(decoding.stream(model, params, [p[::-1] for p in PROMPTS], **options))
    assert model.traces == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [2, -4]]}, "prompt 1 has token -4"),
        ({"prompts": [[1], [9, 1]]}, "prompt 1 has token 9, the vocabulary 7"),
        ({"prompts": [[1], [1] * 36]}, "prompt 1 has 36 tokens.* context of 40"),
        ({"prompts": [[1] * 60]}, "prompt 0 has 60 tokens"),
        ({"prompts": np.zeros((2, 3))}, "wanted integers"),
        ({"prompts": np.ones((1, 3), int), "lengths": np.array([4])}, "do not fit"),
        ({"prompts": np.ones((1, 3), int), "lengths": np.array([0])}, "0 is empty"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
        ({"key": jax.random.PRNGKey(0)}, "typed key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "2 prompts, but keys"),
        ({"process": lambda x, c: x}, "wrap a function"),
        ({"process": logits.chain(logits.banned([7]))}, "token 7, the vocabulary 7"),
        ({"stop": [[1, 8]]}, "token 8, the vocabulary 7"),
        ({"stop": [[]]}, "sequences of them"),
    ],
)
@pytest.mark.parametrize("run", [decoding.generate, decoding.stream])
def test_errors(recurrent, weights, run, change, message):
    options = {"prompts": [[1], [2]], "max_new_tokens": 5, **change}
    with pytest.raises(ValueError, match=message):
        run(recurrent(), weights(), **options)
