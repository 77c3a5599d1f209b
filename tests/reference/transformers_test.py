"""Small random checkpoints, written by transformers and read here, and back.

Each case compares every hidden state and the features. The folders are what
`save_pretrained` of the peer writes: configuration and safetensors.
"""

import jax
import numpy as np
import pytest

from mtl_jax import io, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

BLOCKS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGE = {"image_size": 12, "patch_size": 4}
CLIP_TEXT = {**BLOCKS, "vocab_size": 20, "max_position_embeddings": 8}
SPREAD = {"initializer_range": 0.3}

TEXT = {
    "bert": ("BertModel", {}),
    "bert-relu": ("BertModel", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "bert-tanh": ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
}
VISION = {
    "vit": ("ViTModel", io.names.vit),
    "vit-classifier": ("ViTForImageClassification", io.names.vit),
    "clip-tower": ("CLIPVisionModel", io.names.clip_vision),
    "clip-tower-projected": ("CLIPVisionModelWithProjection", io.names.clip_vision),
    "clip": ("CLIPModel", io.names.clip_vision),
}


def make(class_name, **options):
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    peer = cls(cls.config_class(**options)).eval()
    for parameter in peer.parameters():  # Biases and norms start trivial.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return peer


def read(folder, table, *inputs, **more):
    """(module, params) of a checkpoint folder, through abstract parameters."""
    options = table.options(io.read_config(folder))
    module = models.build(table.model, **options, **more)
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return module, io.load_pretrained(folder, table, like)


def everything(module, params, *inputs):
    """(hidden states, output)."""
    return jax.jit(
        lambda p: (
            module.apply({"params": p}, *inputs, return_hidden=True),
            module.apply({"params": p}, *inputs),
        )
    )(params)


def assert_close(got, want):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", TEXT)
def test_text_encoders(tmp_path, case, scan):
    class_name, options = TEXT[case]
    peer = make(
        class_name,
        **BLOCKS,
        **SPREAD,
        vocab_size=20,
        max_position_embeddings=8,
        **options,
    )
    peer.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids, types = rng.integers(0, 20, (3, 7)), rng.integers(0, 2, (3, 7))
    mask = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int32)
    inputs = ids.astype(np.int32), mask, types.astype(np.int32)
    module, params = read(tmp_path, io.names.bert, *inputs, scan=scan)
    hidden, last = everything(module, params, *inputs)
    want = peer(
        torch.tensor(ids),
        torch.tensor(mask).long(),
        torch.tensor(types),
        output_hidden_states=True,
    ).hidden_states
    for a, b in zip(hidden, want, strict=True):
        assert_close(a, b)
    assert_close(last, want[-1])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", VISION)
def test_image_encoders(tmp_path, case, scan):
    class_name, table = VISION[case]
    options = {**BLOCKS, **IMAGE, "projection_dim": 6}
    if case == "clip":
        options = {
            "text_config": CLIP_TEXT,
            "vision_config": {**BLOCKS, **IMAGE},
            "projection_dim": 6,
        }
    peer = make(class_name, **options)
    peer.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    module, params = read(tmp_path, table, images, scan=scan)
    hidden, features = everything(module, params, images)

    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    tower = peer.vision_model if case == "clip" else peer
    out = tower(pixels, output_hidden_states=True)
    for a, b in zip(hidden, out.hidden_states, strict=True):
        assert_close(a, b)
    if case == "vit":
        assert_close(features, out.last_hidden_state[:, 0])
    elif case == "clip-tower":
        assert_close(features, out.pooler_output)
    elif case == "clip-tower-projected":
        assert_close(features, out.image_embeds)
    elif case == "clip":
        assert_close(features, peer.visual_projection(out.pooler_output))


BACK = {
    "BertModel": (io.names.bert, {**BLOCKS, "vocab_size": 20}),
    "ViTModel": (io.names.vit, {**BLOCKS, **IMAGE}),
    "CLIPVisionModel": (io.names.clip_vision, {**BLOCKS, **IMAGE}),
    "CLIPVisionModelWithProjection": (
        io.names.clip_vision,
        {**BLOCKS, **IMAGE, "projection_dim": 6},
    ),
}


@pytest.mark.parametrize("class_name", BACK)
def test_what_we_write_the_peer_reads(tmp_path, class_name):
    table, options = BACK[class_name]
    peer = make(class_name, **options)
    peer.save_pretrained(tmp_path / "theirs")
    params = io.load_pretrained(tmp_path / "theirs", table)
    config = io.read_config(tmp_path / "theirs")
    io.save_pretrained(tmp_path / "ours", params, table, config=config)
    back, info = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    lost = {n for n in info["missing_keys"] if not n.startswith("pooler.")}
    assert not lost
    assert not info["unexpected_keys"]
    own = dict(back.named_parameters())
    for name, parameter in peer.named_parameters():
        if not name.startswith("pooler."):
            assert torch.equal(parameter, own[name]), name
