import pytest
from ml_collections import ConfigDict

from mtl_jax import configs, multitask, run
from mtl_jax.run import dispatch
from mtl_jax.systems import flat_regions_mtl

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


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (None, "MGDA, flat/0.05"),
        ("PCGrad", "PCGrad/PCGrad"),
        ("PCGrad, flat", "PCGrad, flat/0.05"),
        ("PCGrad, flat/0.5", "PCGrad, flat/0.5"),
        ("0.5 1.5", "tuned weights/0.5 1.5"),
    ],
)
def test_methods_of_a_comparison_by_name(name, wanted):
    row, _, candidate = wanted.rpartition("/")
    rows = contest_rows()
    (found,) = (
        method
        for each in rows
        if each.name == row
        for method in each.candidates
        if method.name == candidate
    )
    assert dispatch.find_method(rows, name) is found


@pytest.mark.fast
def test_methods_that_no_comparison_has():
    with pytest.raises(ValueError, match=r"no method 'mgda', known: equal weights, .*"):
        dispatch.find_method(contest_rows(), "mgda")
    with pytest.raises(ValueError, match=r"4 rows have a candidate '0.5', known: .*"):
        dispatch.find_method(contest_rows(), "0.5")
    config = configs.load_config(f"{CONFIG}:paper", {})
    with pytest.raises(ValueError, match="fine-tuning an expert, found method 'TIES'"):
        run.preflight(config, topology="v5e:2x2", method="TIES")


def contest_rows():
    config = configs.load_config("experiments/configs/flat_regions_mtl.py:demo", {})
    return (*multitask.baselines(2, 4), *flat_regions_mtl.build(config).rows)


@pytest.mark.tpu
@pytest.mark.slow
def test_the_step_of_a_named_method_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    config = configs.load_config("experiments/configs/flat_regions_mtl.py:tiny", {})
    plain, surgery = (
        run.preflight(config, topology="v5e:2x2", method=name)
        for name in ("equal weights", "MGDA")
    )
    assert plain.fits and surgery.fits and surgery.flops > plain.flops
