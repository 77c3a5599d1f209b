"""Merging on a mesh as a user runs it, and for a TPU that is not here."""

import pathlib

import pytest

from mtl_jax import configs, report, run
from mtl_jax.report.progress import Progress

CONFIG = pathlib.Path(__file__).parents[2] / "experiments/configs/mesh_merge.py"


def load(*overrides):
    return configs.load_config(f"{CONFIG}:tiny", dict(overrides))


def test_reports_what_was_merged(tmp_path):
    with Progress() as progress:
        run.run(load(), workdir=tmp_path, progress=progress)
    table = report.read_report(tmp_path / "report").tables[0]
    rule, models, parameters, devices, size, first, median, rate = table.rows[0]
    assert (rule, models, devices) == ("ties", 3, 8)
    assert size == 3 * 2 * parameters
    assert 0 < median < first
    assert rate == pytest.approx(size / median)


def test_an_unknown_rule_is_named(tmp_path):
    config = load(("merge.rule", "tie"))
    with pytest.raises(ValueError, match="'tie' does not exist; known: .*ties"):
        run.preflight(config, topology="v5e:2x4", mesh={"data": 4, "model": 2})


@pytest.mark.tpu
@pytest.mark.slow
def test_no_leaf_is_gathered_on_a_tpu():
    """Query and output kernels have one shape and are sharded the other way round."""
    pytest.importorskip("libtpu")
    config = load(("model.options.width", "512"), ("model.options.vocab_size", "1024"))
    found = run.preflight(config, topology="v5e:2x4", mesh={"data": 4, "model": 2})
    assert found.passed
    assert {c.kind for c in found.collectives} <= {"all-reduce"}
    # A leaf that is whole somewhere costs many times its part.
    assert found.hbm_temporaries < 2 * found.hbm_arguments
