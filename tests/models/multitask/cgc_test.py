import jax
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import multitask

OUTPUTS = {"a": 2, "b": 1}


def dense(width):
    return lambda: models.Mlp((width,), activation="tanh", activate_final=True)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 4))


def run(layer, h):
    return np.tanh(h @ layer["layers_0"]["kernel"] + layer["layers_0"]["bias"])


def gated(gate, h, experts):
    logits = h @ gate["logits"]["kernel"]
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return sum(weights[:, e : e + 1] * y for e, y in enumerate(experts))


def test_ple_runs_levels_in_order(x, fill):
    module = multitask.PLE(OUTPUTS, levels=(dense(3), dense(3)), shared_experts=2)
    params = fill(module, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    common = np.asarray(x, np.float64)
    own = dict.fromkeys(OUTPUTS, common)
    for number in range(2):
        level = p[f"stack_{number}"]
        shared = [run(level[f"shared_experts_{s}"], common) for s in range(2)]
        mine = {n: run(level[f"own_experts_{n}_0"], own[n]) for n in OUTPUTS}
        own = {
            n: gated(level[f"gates_{n}"], own[n], [*shared, mine[n]]) for n in OUTPUTS
        }
        if number == 0:
            common = gated(level["gate_all"], common, [*shared, *mine.values()])
    assert "gate_all" not in p["stack_1"]
    found = module.apply({"params": params}, x)
    for name in OUTPUTS:
        head = p[f"heads_{name}"]["output"]
        want = own[name] @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)


def test_cgc_is_one_level(x, fill):
    cgc = multitask.CGC(OUTPUTS, expert=dense(3))
    params = fill(cgc, x)
    ple = multitask.PLE(OUTPUTS, levels=(dense(3),))
    want = ple.apply({"params": params}, x)
    found = cgc.apply({"params": params}, x)
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], want[name])


def test_without_shared_experts_tasks_are_apart(x, fill):
    """One own expert each and nothing shared: a single-task network per task."""
    module = multitask.CGC(OUTPUTS, expert=dense(3), shared_experts=0)
    params = fill(module, x)
    found = module.apply({"params": params}, x)
    for name, size in OUTPUTS.items():
        alone = multitask.HardSharing({name: size}, backbone=dense(3))
        own = {
            "encoder": params["stack_0"][f"own_experts_{name}_0"],
            f"heads_{name}": params[f"heads_{name}"],
        }
        want = alone.apply({"params": own}, x)[name]
        np.testing.assert_allclose(found[name], want, rtol=1e-6)


def test_without_own_experts_it_is_mmoe(x, fill):
    module = multitask.CGC(OUTPUTS, expert=dense(3), shared_experts=2, task_experts=0)
    params = fill(module, x)
    level = params["stack_0"]
    mmoe = multitask.MMoE(OUTPUTS, expert=dense(3), num_experts=2)
    same = {
        **{f"experts_{e}": level[f"shared_experts_{e}"] for e in range(2)},
        **{f"gates_{name}": level[f"gates_{name}"] for name in OUTPUTS},
        **{f"heads_{name}": params[f"heads_{name}"] for name in OUTPUTS},
    }
    want = mmoe.apply({"params": same}, x)
    found = module.apply({"params": params}, x)
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.fast
def test_mistakes_are_named(x):
    def init(module):
        jax.eval_shape(module.init, jax.random.key(0), x)

    with pytest.raises(ValueError, match="shared=0 and own=0 give a task no expert"):
        init(multitask.CGC(OUTPUTS, expert=dense(3), shared_experts=0, task_experts=0))
    with pytest.raises(ValueError, match="PLE: levels must hold a maker"):
        init(multitask.PLE(OUTPUTS, levels=()))
    with pytest.raises(ValueError, match="CGC: give `expert`"):
        init(multitask.CGC(OUTPUTS, expert=dense(3), levels=(dense(3),)))
