"""Which of aTLAS's rows see labels, and which experts they start from."""

import pytest

from mtl_jax import configs
from mtl_jax.systems import atlas

pytestmark = pytest.mark.fast
CONFIG = "experiments/configs/atlas.py"


def test_adaptation_at_test_time_sees_no_labels():
    rows = {
        row.name: row
        for row in atlas.build(configs.load_config(f"{CONFIG}:world")).rows
    }
    assert not rows["test-time (UFM)"].labels
    for name in ("isotropic", "leaf-wise", "x 4", "1-shot", "leaf-wise (linear)"):
        assert rows[name].labels
    assert rows["leaf-wise (linear)"].linear
    assert rows["leaf-wise (linear)"].experts == "linear"


def test_linear_rows_want_linear_experts():
    names = {
        row.name for row in atlas.build(configs.load_config(f"{CONFIG}:demo")).rows
    }
    assert "leaf-wise (linear)" not in names and "test-time (UFM)" not in names
