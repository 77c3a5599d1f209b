"""Small random CLIP checkpoints, written by transformers and read here, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models
from mtl_jax.models import heads

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

BLOCKS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
VISION = {**BLOCKS, "image_size": 12, "patch_size": 4}
TEXT = {**BLOCKS, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 17}
WIDE = {"projection_dim": 6}
BOTH = {**WIDE, "text_config": TEXT, "vision_config": VISION}
OLD = {"eos_token_id": 2}
CASES = {
    "CLIPModel": (io.names.clip, BOTH),
    "CLIPModel-old": (io.names.clip, {**BOTH, "text_config": {**TEXT, **OLD}}),
    "CLIPModel-gelu": (
        io.names.clip,
        {**BOTH, "text_config": {**TEXT, "hidden_act": "gelu"}},
    ),
    "CLIPTextModel": (io.names.clip_text, TEXT),
    "CLIPTextModel-old": (io.names.clip_text, {**TEXT, **OLD}),
    "CLIPTextModelWithProjection": (io.names.clip_text, {**TEXT, **WIDE}),
    "CLIPModel-text": (io.names.clip_text, BOTH),
}
IDS = np.array(
    # The first end token counts by one rule, the highest number by the other.
    [[1, 4, 6, 17, 0, 0, 0], [1, 17, 19, 17, 18, 3, 3], [3, 5, 7, 9, 11, 13, 17]],
    np.int32,
)
MASK = (np.arange(7) < np.array([[4], [4], [7]])).astype(np.int32)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


def make(case):
    torch.manual_seed(0)
    cls = getattr(transformers, case.split("-")[0])
    peer = cls(cls.config_class(**CASES[case][1])).eval()
    for parameter in peer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return peer


def inputs_of(table):
    return (IMAGES, IDS, MASK) if table is io.names.clip else (IDS, MASK)


def read(folder, table, **more):
    """(apply, params) of a checkpoint folder, through abstract parameters."""
    module = models.build(table.model, **table.options(io.read_config(folder)), **more)
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs_of(table))["params"]
    params = io.load_pretrained(folder, table, like)
    return module, params


def theirs(peer, table):
    ids, mask = torch.tensor(IDS).long(), torch.tensor(MASK).long()
    pixels = torch.tensor(IMAGES).permute(0, 3, 1, 2)
    with torch.no_grad():
        if table is io.names.clip:
            return peer(ids, pixels, mask).logits_per_image.numpy()
        if hasattr(peer, "get_text_features"):
            return peer.get_text_features(ids, mask).pooler_output.numpy()
        out = peer(ids, mask)
        return getattr(out, "text_embeds", out.get("pooler_output")).numpy()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_the_peer_writes_we_read(tmp_path, case, scan):
    table, _ = CASES[case]
    peer = make(case)
    peer.save_pretrained(tmp_path)
    module, params = read(tmp_path, table, scan=scan)
    got = jax.jit(lambda p: module.apply({"params": p}, *inputs_of(table)))(params)
    want = theirs(peer, table)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("case", ["CLIPTextModel", "CLIPTextModel-old"])
def test_every_hidden_state(tmp_path, case):
    table, _ = CASES[case]
    peer = make(case)
    peer.save_pretrained(tmp_path)
    module, params = read(tmp_path, table)
    run = jax.jit(lambda p: module.apply({"params": p}, IDS, MASK, return_hidden=True))
    with torch.no_grad():
        ids, mask = torch.tensor(IDS).long(), torch.tensor(MASK).long()
        want = peer(ids, mask, output_hidden_states=True).hidden_states
    for a, b in zip(run(params), want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c != "CLIPModel-text"])
def test_what_we_write_the_peer_reads(tmp_path, case):
    table, _ = CASES[case]
    peer = make(case)
    peer.save_pretrained(tmp_path / "theirs")
    module, params = read(tmp_path / "theirs", table, scan=True)
    params = jax.tree.map(lambda x: 1.01 * x, params)  # Numbers of our own.
    want = jax.jit(lambda p: module.apply({"params": p}, *inputs_of(table)))(params)
    config = io.read_config(tmp_path / "theirs")
    io.save_pretrained(tmp_path / "ours", params, table, config=config)
    back, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(back.eval(), table), want, atol=1e-4)


def test_classes_named_in_templates(tmp_path):
    """A head made of texts classifies as the peer's logits do, text by text."""
    case = "CLIPModel"
    table, _ = CASES[case]
    peer = make(case)
    peer.save_pretrained(tmp_path)
    module, params = read(tmp_path, table, scan=True)
    tokens = np.random.default_rng(1).integers(1, 17, (3, 2, 6)).astype(np.int32)
    tokens[..., -1] = 17

    @jax.jit
    def logits(params):
        bound = functools.partial(module.apply, {"params": params})
        encode = functools.partial(bound, method="encode_texts")
        head = heads.zero_shot_head(encode, jnp.asarray(tokens))
        images = bound(IMAGES, method="encode_images")
        return heads.prototype_logits(images, head, jnp.exp(params["logit_scale"]))

    with torch.no_grad():
        flat = torch.tensor(tokens.reshape(6, 6)).long()
        unit = torch.nn.functional.normalize
        found = unit(peer.get_text_features(flat).pooler_output, dim=-1)
        head = unit(found.reshape(3, 2, -1).mean(1), dim=-1)
        pixels = torch.tensor(IMAGES).permute(0, 3, 1, 2)
        images = unit(peer.get_image_features(pixels).pooler_output, dim=-1)
        want = peer.logit_scale.exp() * images @ head.T
    np.testing.assert_allclose(logits(params), want.numpy(), atol=1e-4)
