import pytest

from mtl_jax import configs, run

CONFIG = "experiments/configs/dynamic_logits_fusion.py"


@pytest.mark.fast
def test_names_are_looked_up(quiet, tmp_path):
    for path, key, message in (
        ("dynamic_logits_fusion", "models.name", "models 'x' do not exist; known: str"),
        (
            "self_positioning",
            "material.name",
            "material 'x' does not exist; known: inv",
        ),
        (
            "self_positioning",
            "study_kind",
            "study_kind 'x' does not exist; known: post",
        ),
    ):
        config = configs.load_config(f"experiments/configs/{path}.py:tiny", {key: "x"})
        with pytest.raises(ValueError, match=message):
            run.run(config, workdir=tmp_path, progress=quiet)


@pytest.mark.fast
def test_outlines_are_compiled_and_models_are_run(quiet, tmp_path):
    paper = configs.load_config(
        f"{CONFIG}:paper", {"mesh.data": "1", "mesh.model": "1"}
    )
    with pytest.raises(ValueError, match="no weights: mtl-jax preflight only"):
        run.run(paper, workdir=tmp_path, progress=quiet)
    with pytest.raises(ValueError, match="no row 'joint', known: large, small, small "):
        run.preflight(paper, topology="v5e:2x2", method="joint")
    with pytest.raises(ValueError, match="'strings' are meant for a CPU; use the var"):
        run.preflight(configs.load_config(f"{CONFIG}:tiny", {}), topology="v5e:2x2")


SMALL = {
    "width": 256,
    "depth": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "mlp_dim": 384,
    "vocab_size": 512,
}


@pytest.mark.tpu
@pytest.mark.slow
def test_fused_models_decode_as_one_program():
    pytest.importorskip("libtpu")
    config = configs.load_config(f"{CONFIG}:paper", {"models.experts": "2"})
    with config.unlocked():
        config.models.large = {**config.models.large.to_dict(), **SMALL, "depth": 2}
        config.models.small = {**config.models.small.to_dict(), **SMALL}
        config.models.decode.update(batch_size=4, prompt_tokens=128, max_new_tokens=128)
    mesh = {"data": 2, "model": 2}
    found = run.preflight(config, topology="v5e:2x2", mesh=mesh)
    assert found.passed and found.while_loops == 1
    parts = {p.name: p for p in found.placements}
    layer = 4 * 256 * 256 + 3 * 256 * 384 + 2 * 256
    ends = 2 * 512 * 256 + 256
    wanted = 4 * (ends + layer) + layer
    assert found.num_params == wanted and parts["parameters"].whole == 2 * wanted
    # Every model has keys and values of its own.
    width = 2 * 4 * 256 * 256 * 2
    assert parts["cache"].whole == 5 * width + 4 * 4 * 4
