import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax import train
from mtl_jax.train import preflight as preflight_lib
from mtl_jax.train.preflight import preflight

L, D, H = 3, 128, 256


def init(key):
    return {
        "blocks": {
            "up": 0.02 * jax.random.normal(key, (L, D, H)),
            "down": jnp.zeros((L, H, D)),
        },
        "head": jnp.zeros((D, 10)),
    }


def loss(params, batch, key):
    del key

    @jax.checkpoint
    def block(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x = jax.lax.scan(block, batch["x"], params["blocks"])[0]
    logits = x @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {}


TRAINABLE = train.Trainable(
    init=init,
    loss_fn=loss,
    tx=optax.adamw(1e-3),
    rules=(("blocks", P(None, "data")), (".*", P())),
)
NUM_PARAMS = 2 * L * D * H + D * 10


def batch(size):
    return {
        "x": jax.ShapeDtypeStruct((size, D), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def flops(size):
    """Forward 2 products a block, remat 1 more, backward 4; the head 3."""
    return 2 * size * D * (L * H * 7 + 10 * 3)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_a_small_step_fits(topology):
    report = preflight(TRAINABLE, batch(64), topology=topology)
    devices = {"v5e:1x1": 1, "v5e:2x2": 4}[topology]
    assert report.fits and report.passed and report.error is None
    assert report.num_devices == devices
    assert report.mesh == {"data": devices, "model": 1}
    assert report.num_params == NUM_PARAMS
    assert (report.flops, report.while_loops) == (flops(64), 0)
    # Parameters and two moments of blocks are split, those of the head are not.
    state = 3 * 4 * (2 * L * D * H // devices + D * 10)
    assert state <= report.hbm_arguments <= 1.2 * state + 2**18
    assert report.hbm_aliased >= 0.9 * state
    assert report.hbm_needed < report.hbm_available == 16 * 2**30
    if devices == 1:
        assert report.collectives == ()
    else:
        shapes = {c.shape for c in report.collectives if c.kind == "all-gather"}
        assert (L, D, H) not in shapes and (L, H, D) not in shapes
        assert any(c.in_loop for c in report.collectives)
    parameters, optimizer, inputs = report.placements
    assert [p.name for p in report.placements] == ["parameters", "optimizer", "batch"]
    assert parameters.whole == 4 * NUM_PARAMS and inputs.on_device < inputs.whole + 1
    head, blocks = 4 * D * 10, 4 * 2 * L * D * H
    if devices > 1:
        assert parameters.replicated == head
        assert parameters.axes == (("(-,data)", blocks),)
        assert optimizer.axes == (("(-,data)", 2 * blocks),)
        assert parameters.on_device == blocks // devices + head
    assert report.buffers and report.buffers[0][0] <= report.hbm_needed
    text = report.to_text()
    assert "verdict      FITS" in text and f"{NUM_PARAMS:,} parameters" in text
    assert json.loads(json.dumps(report.to_dict()))["flops"] == flops(64)


@pytest.mark.tpu
@needs_libtpu
def test_any_function_can_be_inspected():
    mesh = preflight_lib.target_mesh("v5e:2x2", {"data": 2, "model": 2})
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64, D), P("data")), ((D, H), P(None, "model")))
    )

    def product(x, w):
        assert jax.sharding.get_abstract_mesh().shape == {"data": 2, "model": 2}
        return jnp.sum(x @ w)

    report = preflight_lib.inspect(
        jax.jit(product),
        (x, w),
        topology="v5e:2x2",
        mesh=mesh,
        batch_size=64,
        parts={"parameters": w, "nothing": None},
    )
    assert report.fits and report.num_params == D * H
    assert report.flops == 2 * 64 * D * H
    assert [p.axes for p in report.placements] == [(("(-,model)", 4 * D * H),)]
    assert {c.kind for c in report.collectives} == {"all-reduce"}


@pytest.mark.tpu
@needs_libtpu
def test_without_the_text_of_the_compiler_the_program_is_asked(monkeypatch):
    monkeypatch.setattr(preflight_lib, "_written", lambda *_: "")
    report = preflight(TRAINABLE, batch(64), topology="v5e:2x2")
    assert report.collectives and report.buffers == ()


@pytest.mark.tpu
@needs_libtpu
def test_a_step_that_does_not_fit_is_reported_with_both_numbers():
    report = preflight(TRAINABLE, batch(2**24), topology="v5e:1x1")
    assert not report.fits and not report.passed
    assert "RESOURCE_EXHAUSTED" in report.error
    assert report.hbm_needed > report.hbm_available
    assert report.hbm_available < 16 * 2**30
    assert report.flops == flops(2**24)
    assert "DOES NOT FIT" in report.to_text()


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v9:2x2"}, "found topology 'v9:2x2', wanted a form such as"),
        ({"topology": "v5e:3x5"}, "found topology 'v5e:3x5', wanted a form such as"),
        ({"topology": "v5e:2x2", "mesh": {"model": 3}}, "a multiple of 3 devices"),
    ],
)
def test_bad_topologies_and_meshes(options, message):
    with pytest.raises(ValueError, match=message):
        preflight(TRAINABLE, batch(64), **options)


@pytest.mark.tpu
@needs_libtpu
def test_twice_is_the_same_and_leaves_the_compile_cache_alone(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(name, value)
        first, second = (
            dataclasses.replace(
                preflight(TRAINABLE, batch(32), topology="v5e:1x1"), compile_seconds=0.0
            )
            for _ in range(2)
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert first == second
    assert not [path for path in tmp_path.iterdir() if "step" in path.name]


@pytest.mark.tpu
@needs_libtpu
def test_batch_must_divide():
    with pytest.raises(ValueError, match="'label' has 6 examples"):
        preflight(TRAINABLE, batch(6), topology="v5e:2x2")


@pytest.mark.fast
@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "v5e:4x", "4x4", ""])
def test_malformed_topologies_need_no_compiler(topology, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wanted a form such as v5e:4x4"):
        preflight(TRAINABLE, batch(64), topology=topology)


@pytest.mark.fast
def test_missing_compiler_is_said_plainly(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        preflight(TRAINABLE, batch(64))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("temporaries (28.50G) exceeds available HBM (15.75G)", (28.5, 15.75)),
        ("memory space hbm. Used 40.25G of 15.75G hbm. Exceeded", (40.25, 15.75)),
        ("temporaries (512.00M) exceeds available HBM (256.0M)", (0.5, 0.25)),
    ],
)
def test_memory_numbers_of_the_compiler(text, numbers):
    assert preflight_lib._needed(text) == tuple(int(n * 2**30) for n in numbers)
    assert preflight_lib._needed("something else") == (None, None)


@pytest.mark.fast
@pytest.mark.parametrize(
    "topology", ["v5e:0x0", "v5e:2x0", "v5p:2x2x0", "v5e:4x4x4", "v4:2x2"]
)
def test_sizes_that_crash_the_compiler_are_refused(topology):
    with pytest.raises(ValueError, match="wanted a form such as"):
        preflight_lib._devices(topology)
