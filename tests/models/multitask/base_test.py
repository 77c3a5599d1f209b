"""What every architecture owes, whatever its inside."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models, tree
from mtl_jax.models import multitask

OUTPUTS = {"a": 2, "b": 1}


def mlp(*widths):
    return lambda: models.Mlp(widths, activation="tanh", activate_final=True)


def conv(channels):
    return lambda: models.ConvStage(channels, activation="tanh")


def architectures(one, two, outputs=OUTPUTS):
    """Every architecture over stages that two makers give."""
    return {
        "hard_sharing": multitask.HardSharing(outputs, backbone=one),
        "cross_stitch": multitask.CrossStitch(outputs, stages=(one, two)),
        "mmoe": multitask.MMoE(outputs, stem=one, expert=two, num_experts=2),
        "dselect_k": multitask.DSelectK(
            outputs, expert=one, num_experts=3, per_example=True
        ),
        "cgc_own": multitask.CGC(outputs, expert=one, shared_experts=0, task_experts=2),
        "ple": multitask.PLE(outputs, levels=(one, two, two)),
        "ple_shared": multitask.PLE(
            outputs, levels=(one, two, two), shared_experts=2, task_experts=0
        ),
        "mtan": multitask.MTAN(outputs, stages=(one, two)),
        "ltb": multitask.LTB(outputs, stages=(one, two)),
    }


VECTORS = architectures(mlp(3), mlp(4))
MAPS = architectures(conv(4), conv(6))
NO_SHARING = {"cgc_own"}


def small(module, *inputs):
    """Uneven parameters, small enough for gates to stay open."""
    like = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(-0.4, 0.4, leaf.shape), leaf.dtype), like
    )


def evaluate(module, params, x):
    """All that the tests look at, in one program."""
    extra, rngs = {}, {}
    if isinstance(module, multitask.LTB):
        # Only samples send gradients to every node.
        extra, rngs = {"sample": True}, {"branch": jax.random.key(2)}

    def call(params, *args, **more):
        return module.apply({"params": params}, *args, **more)

    def losses(outputs):
        return jnp.stack([jnp.sum(jnp.cos(y)) for y in outputs.values()])

    z = call(params, x[0], method="encode", rngs=rngs, **extra)
    found = {
        "z": z,
        "outputs": call(params, x[0], rngs=rngs, **extra),
        "decoded": call(params, z, method="decode"),
        "only": call(params, z, ("b",), method="decode"),
        "jacobian": jax.jacrev(lambda p: losses(call(p, x[0], rngs=rngs, **extra)))(
            params
        ),
        "by_task": call(params, x, method="by_task"),
        "second": call(params, x[1]),
    }
    if "shared" in z:
        found["saliency"] = jax.jacrev(
            lambda s: losses(call(params, {**z, "shared": s}, method="decode"))
        )(z["shared"])
    return found


@pytest.fixture(scope="module")
def x():
    """[T, B, D]."""
    return jax.random.normal(jax.random.key(1), (2, 3, 6))


@pytest.fixture(scope="module")
def ready(x):
    """name -> (module, everything evaluated), once."""
    made = {}

    def get(name):
        if name not in made:
            module = VECTORS[name]
            params = small(module, x[0])
            run = jax.jit(lambda params, x: evaluate(module, params, x))
            made[name] = module, run(params, x)
        return made[name]

    return get


@pytest.mark.parametrize("name", VECTORS)
def test_calls_decode_what_they_encode(name, ready):
    module, found = ready(name)
    outputs = found["outputs"]
    assert module.task_names == tuple(OUTPUTS)
    assert {key: y.shape for key, y in outputs.items()} == {
        key: (3, size) for key, size in OUTPUTS.items()
    }
    assert all(y.dtype == jnp.float32 for y in outputs.values())
    assert ("shared" in found["z"]) == (name not in NO_SHARING)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(found["z"])} == {3}
    for key in OUTPUTS:
        np.testing.assert_allclose(found["decoded"][key], outputs[key], rtol=1e-6)
    assert list(found["only"]) == ["b"]
    np.testing.assert_allclose(found["only"]["b"], outputs["b"], rtol=1e-6)


@pytest.mark.parametrize("name", VECTORS)
def test_shared_paths_are_what_several_tasks_use(name, ready):
    """A leaf gets gradients of two tasks or more exactly where a regex finds it."""
    module, found = ready(name)
    jacobian = found["jacobian"]
    for path, leaf in zip(tree.paths(jacobian), jax.tree.leaves(jacobian), strict=True):
        users = np.sum(np.abs(leaf).reshape(len(OUTPUTS), -1).max(1) > 1e-9)
        shared = any(re.search(regex, path) for regex in module.shared_paths)
        assert users == (2 if shared else 1), path


@pytest.mark.parametrize(
    "module",
    [
        *VECTORS.values(),
        multitask.CGC(OUTPUTS, expert=mlp(3)),
        multitask.MMoE(OUTPUTS, expert=mlp(3)),
        multitask.PLE(OUTPUTS, levels=(mlp(3), mlp(3)), stem=mlp(4)),
        multitask.PLE(OUTPUTS, levels=(mlp(3), mlp(3)), shared_experts=0),
    ],
)
def test_every_shared_path_finds_a_leaf(module, x):
    """`Trainable(shared=...)` refuses one that finds nothing."""
    like = jax.eval_shape(module.init, jax.random.key(0), x[0])["params"]
    for regex in module.shared_paths:
        assert any(re.search(regex, path) for path in tree.paths(like)), regex


@pytest.mark.parametrize("name", sorted(set(VECTORS) - NO_SHARING))
def test_every_task_has_a_gradient_at_the_shared_representation(name, ready):
    _, found = ready(name)
    saliency = found["saliency"]
    assert saliency.shape == (len(OUTPUTS), *found["z"]["shared"].shape)
    # Every example of every task.
    assert np.all(np.abs(saliency).reshape(len(OUTPUTS), 3, -1).max(-1) > 0)


@pytest.mark.parametrize("name", VECTORS)
def test_by_task_is_each_task_on_its_own_rows(name, ready):
    _, found = ready(name)
    assert found["by_task"]["a"].shape == (3, 2)
    want = found["second"]["b"]
    np.testing.assert_allclose(found["by_task"]["b"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_images_work_too(name):
    module = MAPS[name]
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    outputs, variables = jax.eval_shape(
        module.init_with_output, jax.random.key(0), images
    )
    assert {key: y.shape for key, y in outputs.items()} == {
        key: (2, size) for key, size in OUTPUTS.items()
    }
    rules = models.sharding_rules(models.SmallConv(), module)
    for path in tree.paths(variables["params"]):
        assert any(re.search(regex, path) for regex, _ in rules), path


@pytest.mark.parametrize("name", VECTORS)
def test_one_task_is_enough(name, x):
    module = architectures(mlp(5), mlp(4), {"only": 2})[name]
    outputs = jax.eval_shape(module.init_with_output, jax.random.key(0), x[0])[0]
    assert outputs["only"].shape == (3, 2)


@pytest.mark.parametrize("name", ["cross_stitch", "mmoe", "ple", "mtan", "ltb"])
def test_bfloat16_inside_float32_out(name, x):
    def low(width):
        return lambda: models.Mlp((width,), dtype=jnp.bfloat16)

    module = architectures(low(5), low(4))[name]
    outputs = jax.eval_shape(
        module.init_with_output, jax.random.key(0), x[0].astype(jnp.bfloat16)
    )[0]
    assert all(y.dtype == jnp.float32 for y in outputs.values())


def test_mistakes_are_named(x):
    module = VECTORS["hard_sharing"]
    params = small(module, x[0])
    with pytest.raises(ValueError, match="HardSharing: no task 'd', known: a, b"):
        module.apply({"params": params}, {"shared": x}, ("d",), method="decode")
    with pytest.raises(ValueError, match=r"by_task: wanted \[2, B, ...\], found \(3"):
        module.apply({"params": params}, x[0], method="by_task")
    with pytest.raises(ValueError, match="HardSharing: outputs must name a task"):
        multitask.HardSharing({}, backbone=mlp(2)).init(jax.random.key(0), x)


def test_heads_may_have_hidden_layers_and_flatten(fill):
    head = multitask.TaskHead(2, hidden=(3,), activation="tanh")
    features = jax.random.normal(jax.random.key(0), (4, 2, 2))
    params = jax.tree.map(np.asarray, fill(head, features))
    h = np.tanh(
        np.asarray(features).reshape(4, 4) @ params["hidden_0"]["kernel"]
        + params["hidden_0"]["bias"]
    )
    want = h @ params["output"]["kernel"] + params["output"]["bias"]
    found = head.apply({"params": params}, features)
    np.testing.assert_allclose(found, want, atol=1e-5)
