import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax.train.preflight_report import (
    PreflightReport,
    largest_buffers,
    placement,
)

pytestmark = pytest.mark.fast

REPORT = {
    "topology": "v5e:1x1",
    "device_kind": "TPU",
    "num_devices": 1,
    "mesh": {"data": 1},
    "batch_size": 8,
    "num_params": 3,
    "fits": False,
}


def test_lower_bounds_and_unknown_sizes_show_in_the_text():
    report = PreflightReport(
        **REPORT, flops=10, while_loops=1, error="RESOURCE_EXHAUSTED"
    )
    text = report.to_text()
    assert "at least 10" in text and "unknown needed of unknown" in text
    assert dataclasses.replace(report, while_loops=0).to_text().count("at least") == 0
    fitting = dataclasses.replace(report, fits=True)
    assert fitting.passed
    assert not dataclasses.replace(fitting, kernels={"k": "FAILED: no"}).passed


@pytest.fixture
def shaped():
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)

    def make(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, P(*spec))
        )

    return make


def test_bytes_of_a_group_by_how_it_is_split(shaped):
    arrays = {
        "a": shaped((8, 4), "data", "model"),
        "b": shaped((3, 8), None, "model", dtype=jnp.bfloat16),
        "c": shaped((16,), ("data", "model")),
        "d": shaped((2, 2), "model", None),
        "e": shaped((5,)),
    }
    found = placement("state", arrays)
    assert found.whole == 128 + 48 + 64 + 16 + 20
    assert found.on_device == 128 // 8 + 48 // 2 + 64 // 8 + 16 // 2 + 20
    assert found.replicated == 20
    assert found.axes == (
        ("(data,model)", 128),
        ("(data+model)", 64),
        ("(-,model)", 48),
        ("(model)", 16),
    )
    report = REPORT | {"placements": (found,), "fits": True}
    text = PreflightReport(**report).to_text()
    assert "state        0.27 KiB, of which a device holds 0.07 KiB: 46.4%" in text
    plain = PreflightReport(**report).to_dict()
    assert json.loads(json.dumps(plain))["placements"][0]["replicated"] == 20


def test_nothing_is_split_where_one_device_has_all(shaped):
    one = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
    )
    alone = jax.ShapeDtypeStruct(
        (4,), "float32", sharding=NamedSharding(one, P("data"))
    )
    assert placement("x", [alone]) == ("x", 16, 16, 16, ())
    assert placement("x", None) == ("x", 0, 0, 0, ())


USAGE = """\
Memory Space: default (color=0)
Total bytes: 337141248 (321.52MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   16.00MiB( 21%);   16.00MiB;      2965504;                5; 5×bf16[512,16384]
   76.56MiB(100%);     8.0KiB;      2932736;                9; f32[2,1024], 2×f32[]
  100.00MiB(100%);    1.50GiB;     26083328;                6; bf16[512,16384], f32[2]
   76.58MiB(100%);       512B;     71598080;                1; (f32[2,128], f32[2,128])
"""


def test_the_largest_buffers_come_first():
    found = largest_buffers(USAGE)
    assert [size for size, _ in found] == [3 * 2**29, 2**24, 2**13, 512]
    assert found[1][1] == "5×bf16[512,16384]"
    assert found[3][1] == "(f32[2,128], f32[2,128])"
    assert largest_buffers(USAGE, 1) == found[:1]
    assert largest_buffers("") == ()
    many = ", ".join(f"f32[{n}]" for n in range(30))
    report = REPORT | {"buffers": ((2**20, many),), "fits": True}
    text = PreflightReport(**report).to_text()
    assert "1.00 MiB  f32[0], f32[1]," in text and "f32[29]" not in text
