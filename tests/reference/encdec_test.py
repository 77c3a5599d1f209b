"""Small random encoder-decoders, written by transformers and read here, and back."""

import jax
import numpy as np
import pytest

from mtl_jax import io, models
from mtl_jax.models.layers import distance_buckets

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
    "decoder_start_token_id": 0,
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
    "max_position_embeddings": 32,
    "init_std": 0.3,
}
CASES = {
    "t5": ("t5", T5),
    "t5-gated-tied": ("t5", {**T5, "feed_forward_proj": "gated-silu"}),
    "t5-v1.1": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5-v1.1-repeated": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5-deep": ("t5", {**T5, "num_decoder_layers": 3, "layer_norm_epsilon": 1e-3}),
    "bart": ("bart", BART),
    "bart-scaled": (
        "bart",
        {**BART, "scale_embedding": True, "activation_function": "relu"},
    ),
    "bart-deep": ("bart", {**BART, "encoder_layers": 3, "decoder_layers": 1}),
}
CLASSES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 19, (3, 14)).astype(np.int32)
OUT = RNG.integers(3, 19, (3, 11)).astype(np.int32)


def right(width, lengths):
    return (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)


RIGHT = right(14, [14, 6, 1]), right(11, [2, 11, 5])
PADDINGS = {
    "none": (np.ones_like(IDS), np.ones_like(OUT)),
    "right": RIGHT,
    "left": tuple(mask[:, ::-1].copy() for mask in RIGHT),
}


def make(case):
    name, options = CASES[case]
    torch.manual_seed(0)
    cls = getattr(transformers, CLASSES[name])
    peer = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    if options.get("tie_word_embeddings") is False and "repeated" not in case:
        head = torch.randn_like(peer.lm_head.weight)
        peer.lm_head.weight = torch.nn.Parameter(head)
        peer.all_tied_weights_keys.pop("lm_head.weight", None)
    for parameter in peer.parameters():  # Biases and norms start trivial.
        parameter.data += 0.1 * torch.randn_like(parameter)
    if name == "bart":
        peer.final_logits_bias += torch.randn_like(peer.final_logits_bias)
    return peer


def like_of(module):
    ids = np.zeros((1, 1), np.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]


def read(folder, table, **more):
    """(module, params) of a checkpoint folder, through abstract parameters."""
    options = table.options(io.read_config(folder))
    module = models.build(table.model, **options, **more)
    return module, io.load_pretrained(folder, table, like_of(module))


def ours(module, params, masks):
    # Theirs count learned positions from the first column, padding or not.
    places = [np.broadcast_to(np.arange(m.shape[1]), m.shape) for m in masks]
    places = [x.astype(np.int32) for x in places]
    positions = places if module.position == "learned" else ()

    @jax.jit
    def run(p, *masks):
        return module.apply({"params": p}, IDS, OUT, *masks, *positions)

    return run(params, *masks)


def theirs(peer, masks):
    ids, out, source, target = (
        torch.tensor(x, dtype=torch.long) for x in (IDS, OUT, *masks)
    )
    with torch.no_grad():
        return peer(
            input_ids=ids,
            attention_mask=source,
            decoder_input_ids=out,
            decoder_attention_mask=target,
        ).logits.numpy()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_peer(tmp_path, case, scan):
    peer = make(case)
    peer.save_pretrained(tmp_path)
    module, params = read(tmp_path, getattr(io.names, CASES[case][0]), scan=scan)
    for masks in PADDINGS.values():
        got, want = ours(module, params, masks), theirs(peer, masks)
        real = masks[1].astype(bool)
        assert np.max(np.abs(want[real])) > 0.5
        np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_the_peer_reads(tmp_path, case):
    table = getattr(io.names, CASES[case][0])
    peer = make(case)
    peer.save_pretrained(tmp_path / "theirs")
    module, params = read(tmp_path / "theirs", table, scan=True)
    params = jax.tree.map(lambda x: 1.01 * x, params)  # Numbers of our own.
    want = ours(module, params, RIGHT)
    config = io.read_config(tmp_path / "theirs")
    io.save_pretrained(tmp_path / "ours", params, table, config=config)
    back, info = type(peer).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    real = RIGHT[1].astype(bool)
    got = theirs(back.eval(), RIGHT)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


def test_a_base_model_without_head_and_bias_is_read(tmp_path):
    peer = make("bart")
    peer.final_logits_bias.zero_()
    peer.model.save_pretrained(tmp_path)
    module, params = read(tmp_path, io.names.bart)
    masks = PADDINGS["none"]
    got = ours(module, params, masks)
    np.testing.assert_allclose(got, theirs(peer, masks), atol=1e-4)


def test_embeddings_that_differ_are_refused(tmp_path):
    peer = make("bart")
    peer.save_pretrained(tmp_path)
    tensors = dict(io.safetensors.SafetensorsFile(tmp_path / "model.safetensors"))
    like = like_of(read(tmp_path, io.names.bart)[0])
    shared = tensors["model.shared.weight"]
    tensors["model.decoder.embed_tokens.weight"] = shared
    io.names.bart.load(tensors, like)
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match=f"'{name}' differs from 'model.shared"):
            io.names.bart.load({**tensors, name: 2 * shared}, like)
    with pytest.raises(ValueError, match="tie_word_embeddings=False is not supported"):
        io.names.bart.options({**BART, "tie_word_embeddings": False})


def test_configs_as_published_say_what_is_tied():
    config = {**T5, "model_type": "t5"}
    old = {**config, "tie_word_embeddings": False}
    new = {**config, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    for given, tied in ((config, True), (old, False), (new, False)):
        options = io.names.t5.options(given)
        assert (options["tied"], options["scale_outputs"]) == (tied, tied)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (16, 100)])
@pytest.mark.parametrize("both", [False, True])
def test_distances_fall_into_their_buckets(buckets, farthest, both):
    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = torch.arange(-2 * farthest, 2 * farthest)
    want = attention._relative_position_bucket(
        distance, bidirectional=both, num_buckets=buckets, max_distance=farthest
    ).numpy()
    size = buckets // 2 if both else buckets
    table = distance_buckets(size, farthest)
    back = -distance.numpy()  # How far the key lies behind the query.
    far = np.minimum(np.abs(back) if both else np.maximum(back, 0), farthest)
    got = table[far] + (size * (back < 0) if both else 0)
    np.testing.assert_array_equal(got, want)
