"""Greedy text and beams of transformers on a small random Llama."""

import jax
import numpy as np
import pytest

from mtl_jax import decoding, io, models
from mtl_jax.decoding import logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

OPTIONS = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 7,
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 1, 11, 12, 3]]
NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their model, our StepModel, our parameters)."""
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**OPTIONS)).eval()
    folder = tmp_path_factory.mktemp("llama")
    peer.save_pretrained(folder)
    table = io.names.llama
    module = models.build(
        table.model, **table.options(io.read_config(folder)), scan=True
    )
    ids = np.zeros((1, 1), np.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    params = io.load_pretrained(folder, table, like)
    return peer, decoding.from_decoder(module), params


def theirs(peer, prompt, **options):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        return peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def text(row, prompt, end=7):
    """What was generated, the end included and nothing after it."""
    row = [int(t) for t in row[len(prompt) :]]
    return row[: row.index(end) + 1] if end in row else row


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_greedy_text(pair, penalty):
    peer, model, params = pair
    process = logits.repetition_penalty(penalty) if penalty else None
    got = decoding.generate(
        model, params, PROMPTS, max_new_tokens=NEW, stop=7, process=process
    )
    options = {"repetition_penalty": penalty} if penalty else {}
    for prompt, row in zip(PROMPTS, got.rows(stop=True), strict=True):
        want = theirs(peer, prompt, **options)
        assert row == text(want.sequences[0], prompt)


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("early", [False, True])
def test_beams(pair, alpha, early):
    peer, model, params = pair
    got = decoding.beam_search(
        model,
        params,
        PROMPTS,
        max_new_tokens=NEW,
        beams=4,
        stop=7,
        alpha=alpha,
        early_stopping=early,
    )
    for b, prompt in enumerate(PROMPTS):
        want = theirs(
            peer,
            prompt,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=alpha,
            # Our rule is what they call "never".
            early_stopping=True if early else "never",
        )
        rows = [text(row, prompt) for row in want.sequences]
        assert got.rows(stop=True)[b] == rows
        np.testing.assert_allclose(
            got.scores[b], want.sequences_scores.numpy(), atol=1e-4
        )


def test_warpers_where_nothing_is_equal():
    x = torch.randn(5, 19, generator=torch.Generator().manual_seed(0))
    lib = transformers.generation.logits_process
    cases = [
        (logits.temperature(0.7), lib.TemperatureLogitsWarper(0.7)),
        (logits.top_k(4), lib.TopKLogitsWarper(4)),
        (logits.top_p(0.8), lib.TopPLogitsWarper(0.8)),
        (logits.min_p(0.2), lib.MinPLogitsWarper(0.2)),
    ]
    for ours, other in cases:
        np.testing.assert_allclose(ours(x.numpy()), other(None, x).numpy(), rtol=1e-6)
