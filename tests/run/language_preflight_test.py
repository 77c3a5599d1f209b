import importlib.util
import math

import jax
import pytest

from mtl_jax import configs, run
from mtl_jax.run import language_preflight

CONFIG = "experiments/configs/lm_demo.py"


def config_of(variant, **changes):
    dotted = {k.replace("__", "."): v for k, v in changes.items()}
    return configs.load_config(f"{CONFIG}:{variant}", dotted)


def size(params):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["lora", "decode", "full"])
def test_variants_of_llama_are_its_shapes(kind):
    config = config_of(f"llama3_8b_{kind}")
    module, params = language_preflight.outline(config)
    assert size(params) == 8_030_261_248
    assert module.scan and module.attention == "blocked"
    kinds = {str(x.dtype) for x in jax.tree.leaves(params)}
    assert kinds == {"float32" if kind == "full" else "bfloat16"}
    assert (config.lora is None) == (kind == "full")


@pytest.mark.fast
def test_models_of_runs_have_outlines_too():
    _, params = language_preflight.outline(config_of("demo"))
    assert size(params) == 134_515_008
    _, packed = language_preflight.outline(config_of("nf4"))
    assert "uint8" in {str(x.dtype) for x in jax.tree.leaves(packed)}
    _, tiny = language_preflight.outline(config_of("tiny"))
    assert tiny["embeddings"]["word"]["embedding"].shape == (257, 32)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model__name": "llama-9"}, {}, "llama-9"),
        ({"model__name": "bert"}, {}, "'bert' has no option"),
        ({}, {"method": "PCGrad"}, "compares no methods, found 'PCGrad'"),
        ({"experiment": "vision"}, {}, "'vision' does not exist; known: language"),
    ],
)
def test_what_cannot_be_compiled_is_said_first(changes, options, message):
    with pytest.raises(ValueError, match=message):
        run.preflight(
            config_of("llama3_8b_full", **changes), topology="v5e:2x2", **options
        )


@pytest.mark.fast
def test_variants_without_data_do_not_run(quiet, tmp_path):
    config = config_of("llama3_8b_lora", mesh__model="1")
    with pytest.raises(ValueError, match="it is for mtl-jax preflight"):
        run.run(config, workdir=tmp_path, progress=quiet)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
SMALL = {
    "width": 256,
    "depth": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 128,
    "mlp_dim": 384,
    "vocab_size": 4096,
}


def small(variant):
    config = config_of(f"llama3_8b_{variant}")
    with config.unlocked():
        config.model.options.update(SMALL)
    config.training.batch_size, config.packing.row_length = 4, 256
    config.mesh = {"data": 2, "model": 2}
    return config


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
def test_an_adapter_step_compiles_with_every_part_split():
    report = run.preflight(small("lora"), topology="v5e:2x2")
    assert report.passed and report.while_loops == 0
    parts = {p.name: p for p in report.placements}
    assert set(parts) == {"parameters", "frozen", "optimizer", "batch"}
    for part in parts.values():
        assert part.replicated <= 0.01 * part.whole
        assert part.on_device <= part.whole / 2 + part.replicated
    # Nothing as large as the head or a stack of kernels moves in a loop.
    inside = [c.nbytes for c in report.collectives if c.in_loop]
    assert inside and max(inside) < 2 * 256 * 2048 // 2
    assert report.flops > 0


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
def test_decoding_compiles_as_one_program_with_its_cache_split():
    config = small("decode")
    config.decode = {
        "batch_size": 4,
        "prompt_tokens": 512,
        "max_new_tokens": 512,
        "stop": (7,),
    }
    report = run.preflight(config, topology="v5e:2x2")
    assert report.passed and report.while_loops == 1
    cache = next(p for p in report.placements if p.name == "cache")
    assert cache.whole == 2 * 3 * 4 * 1024 * 2 * 128 * 2 + 4 * 4
    assert cache.on_device <= cache.whole / 4 + 8 and not cache.replicated
    # The compiler keeps keys and values as they were asked to lie.
    shapes = " ".join(text for _, text in report.buffers)
    assert "bf16[3,2,1024,1,128]" in shapes
    assert report.hbm_temporaries < 8 * cache.on_device
    with pytest.raises(ValueError, match="which do not divide into 2 parts"):
        run.preflight(
            config_of("llama3_8b_decode", decode__batch_size="3"), topology="v5e:4x4"
        )


@pytest.mark.fast
def test_four_bits_are_not_decoded():
    config = config_of("llama3_8b_decode")
    config.model.nf4 = ("kernel$",)
    with pytest.raises(ValueError, match="a model in 4 bits is not decoded"):
        run.preflight(config, topology="v5e:4x4")
