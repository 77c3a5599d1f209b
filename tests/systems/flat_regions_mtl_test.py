"""What results of flat regions are remembered by."""

import pytest

from mtl_jax import configs
from mtl_jax.systems import flat_regions_mtl

pytestmark = pytest.mark.fast
CONFIG = "experiments/configs/flat_regions_mtl.py:demo"


def test_rows_are_told_apart_by_aggregator_and_radius():
    contest = flat_regions_mtl.build(configs.load_config(CONFIG))
    methods = [method for row in contest.rows for method in row.candidates]
    assert len({repr(sorted(m.about.items())) for m in methods}) == len(methods)
    (row,) = (row for row in contest.rows if row.name == "CAGrad, flat")
    assert row.candidates[1].about == {"flat": "cagrad", "rho": 0.5}
    assert [method.name for method in row.candidates] == ["0.05", "0.5"]


def test_what_a_measure_is_called_is_all_that_tells_it_apart():
    """A radius in the config would change the measure and not its name."""
    config = configs.load_config(CONFIG)
    assert set(flat_regions_mtl.build(config).measures) == {"sharpness"}
    with pytest.raises(ValueError, match="sharpness_radius"):
        configs.load_config(CONFIG, {"study.sharpness_radius": 0.5})
