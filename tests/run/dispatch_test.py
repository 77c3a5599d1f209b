import pytest
from ml_collections import ConfigDict

from mtl_jax import configs, run

CONFIG = "experiments/configs/tall_masks.py"


@pytest.mark.fast
def test_unknown_suites_and_systems_are_named(quiet, tmp_path):
    config = configs.load_config(f"{CONFIG}:tiny", {"suite.name": "imagenet"})
    with pytest.raises(ValueError, match=r"suite 'imagenet' does not exist; known:"):
        run.run(config, workdir=tmp_path, progress=quiet)
    config = configs.load_config(f"{CONFIG}:tiny", {"system": "t0"})
    with pytest.raises(ValueError, match="'t0' is planned"):
        run.run(config, workdir=tmp_path, progress=quiet)


@pytest.mark.fast
def test_paper_variant_says_what_it_needs(quiet, tmp_path):
    config = configs.load_config(f"{CONFIG}:paper", {})
    with pytest.raises(ValueError, match="needs pretrained weights"):
        run.run(config, workdir=tmp_path, progress=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_preflight_is_for_towers_whose_shapes_are_known():
    config = configs.load_config(f"{CONFIG}:tiny", {})
    with pytest.raises(ValueError, match="use the variant :paper"):
        run.preflight(config, topology="v5e:2x2")


@pytest.mark.tpu
@pytest.mark.slow
def test_paper_step_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    config = configs.load_config(
        f"{CONFIG}:paper",
        {
            "suite.options.base.model": "clip-vit-b/32",
            "experts.batch_size": "64",
        },
    )
    found = run.preflight(config, topology="v5e:2x2")
    assert found.fits and found.num_devices == 4 and found.num_params > 85e6


@pytest.mark.fast
def test_configs_that_are_not_whole(quiet, tmp_path):
    with pytest.raises(ValueError, match="config: lacks suite, experts, modes"):
        run.run(ConfigDict({"system": "tall-masks"}), workdir=tmp_path, progress=quiet)


@pytest.mark.fast
def test_options_of_another_suite(quiet, tmp_path):
    config = configs.load_config(f"{CONFIG}:tiny", {"suite.name": "small_vit"})
    with config.unlocked():
        config.suite.options = {"names": ("digits",), "base": {"hidden": 1}}
    with pytest.raises(ValueError, match="suite 'small_vit': .*hidden"):
        run.run(config, workdir=tmp_path, progress=quiet)
