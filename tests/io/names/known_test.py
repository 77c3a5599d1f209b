import pytest

from mtl_jax import io
from mtl_jax.io.names import _known

pytestmark = pytest.mark.fast


def test_every_kind_has_the_table_of_its_name():
    for kind in ("bert", "clip", "gemma2", "gpt2", "llama", "olmoe", "qwen3", "vit"):
        assert io.names.of_config({"model_type": kind}) is getattr(io.names, kind)
    tower = io.names.of_config({"model_type": "clip_text_model"})
    assert tower is io.names.clip_text
    decoder = io.names.of_config({"model_type": "llama"}, model="decoder")
    assert decoder is io.names.llama


@pytest.mark.parametrize("kind", ["mamba", None, ["llama"]])
def test_other_kinds_are_named(kind):
    with pytest.raises(ValueError, match=r"x: model_type .* is not supported, only ba"):
        io.names.of_config({"model_type": kind}, where="x")


def test_only_what_the_backbone_reads():
    with pytest.raises(ValueError, match="'bert' is not supported, only gemma, gemma2"):
        io.names.of_config({"model_type": "bert"}, model="decoder")


@pytest.mark.parametrize("kind", sorted(_known._BY_TYPE))
def test_quantised_checkpoints_are_refused(kind):
    """Their tensors mean something else, under names of their own or the same ones."""
    config = {
        "model_type": kind,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "text_config": {},
        "vision_config": {},
    }
    table = io.names.of_config(config)
    with pytest.raises(ValueError, match=r"names\..*: quantization_config is not supp"):
        table.options(config)
