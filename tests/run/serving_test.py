import pytest

from mtl_jax import configs, run

pytestmark = pytest.mark.fast


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
    with pytest.raises(ValueError, match="preflight of 'servable' does not exist"):
        config = configs.load_config(
            "experiments/configs/dynamic_logits_fusion.py:paper"
        )
        run.preflight(config, topology="v5e:2x2")
