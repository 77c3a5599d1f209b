"""Greedy text, beams and likelihoods of transformers' encoder-decoders, small ones."""

import jax
import numpy as np
import pytest

from mtl_jax import decoding, io, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

T5 = {
    "vocab_size": 19,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.5,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 7,
}
BART = {
    "vocab_size": 19,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 24,
    "init_std": 0.6,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 7,
    "forced_eos_token_id": None,
}
CASES = {
    "t5": ("T5ForConditionalGeneration", io.names.t5, T5, 1),
    "bart": ("BartForConditionalGeneration", io.names.bart, BART, 2),
}
PROMPTS = [[3, 12, 5], [4], [5, 6, 11, 13, 12, 3, 9]]
CANDIDATES = [[[5, 7], [6, 11, 12, 7]], [[8, 7]], [[7], [9, 7], [10, 11, 3, 4, 7]]]
NEW = 8


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, our module, our parameters)."""
    name, table, options, seed = CASES[request.param]
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    config = cls.config_class(**options, attn_implementation="eager")
    peer = cls(config).eval()
    for name, parameter in peer.named_parameters():  # So that prompts matter.
        if "EncDecAttention" in name or "encoder_attn." in name:
            parameter.data *= 2
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    options = table.options(io.read_config(folder))
    module = models.build(table.model, **options, scan=True)
    ids = np.zeros((1, 1), np.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    return peer, module, io.load_pretrained(folder, table, like)


def step_model(peer, module):
    start = peer.config.decoder_start_token_id
    return decoding.from_encoder_decoder(module, start=start)


def theirs(peer, prompt, **options):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def text(row, end=7):
    """What was generated, the end included and nothing after it."""
    row = [int(t) for t in row[1:]]
    return row[: row.index(end) + 1] if end in row else row


def test_greedy_text(pair):
    peer, module, params = pair
    got = decoding.generate(
        step_model(peer, module), params, PROMPTS, max_new_tokens=NEW, stop=7
    )
    rows = got.rows(stop=True)
    assert rows == [text(theirs(peer, p, num_beams=1).sequences[0]) for p in PROMPTS]
    assert len(set(map(tuple, rows))) == len(rows)


@pytest.mark.parametrize(("alpha", "early"), [(1.0, False), (0.5, True)])
def test_beams(pair, alpha, early):
    peer, module, params = pair
    got = decoding.beam_search(
        step_model(peer, module),
        params,
        PROMPTS,
        max_new_tokens=NEW,
        beams=3,
        stop=7,
        alpha=alpha,
        early_stopping=early,
    )
    for b, prompt in enumerate(PROMPTS):
        want = theirs(
            peer,
            prompt,
            num_beams=3,
            num_return_sequences=3,
            length_penalty=alpha,
            early_stopping=True if early else "never",
        )
        assert got.rows(stop=True)[b] == [text(row) for row in want.sequences]
        np.testing.assert_allclose(
            got.scores[b], want.sequences_scores.numpy(), atol=1e-4
        )


def test_ranked_candidates(pair):
    peer, module, params = pair
    start = peer.config.decoder_start_token_id
    fn = decoding.EncoderDecoderLogprobs(module, start=start, chunk=3)
    prompts, lengths = decoding.pad_prompts(PROMPTS)
    candidates = decoding.pad_candidates(CANDIDATES)
    run = jax.jit(lambda p: decoding.rank_classify(fn, p, prompts, lengths, candidates))
    got = run(params)
    for n, (prompt, group) in enumerate(zip(PROMPTS, CANDIDATES, strict=True)):
        want = []
        for answer in group:
            with torch.no_grad():
                logits = peer(
                    input_ids=torch.tensor([prompt]),
                    decoder_input_ids=torch.tensor([[start, *answer[:-1]]]),
                ).logits[0]
            found = torch.log_softmax(logits, dim=-1)
            want.append(sum(float(found[t, y]) for t, y in enumerate(answer)))
        np.testing.assert_allclose(got.logprobs[n, : len(group)], want, atol=1e-4)
        assert np.all(np.isneginf(got.logprobs[n, len(group) :]))
        assert got.best[n] == np.argmax(want)
