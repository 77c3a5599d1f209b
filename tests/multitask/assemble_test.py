import jax
import numpy as np
import pytest

from mtl_jax import multitask
from mtl_jax.multitask import presets

MLP = {"model": "mlp", "features": (8,), "activate_final": True}
OUTPUTS = {"a": 1, "b": 3}
OPTIONS = {
    "cgc": {"expert": MLP},
    "cross_stitch": {"stages": (MLP, MLP)},
    "dselect_k": {"expert": MLP},
    "hard_sharing": {"backbone": MLP},
    "ltb": {"stages": (MLP, MLP)},
    "mmoe": {"expert": MLP, "num_experts": 2},
    "mtan": {"stages": (MLP, MLP)},
    "ple": {"levels": (MLP, MLP)},
}


@pytest.mark.parametrize("name", multitask.ARCHITECTURES)
def test_every_architecture_from_plain_data(name):
    model = multitask.build(name, OUTPUTS, **OPTIONS[name])
    rngs = {"params": jax.random.key(0), "branch": jax.random.key(1)}
    out, variables = model.init_with_output(rngs, np.ones((4, 5), np.float32))
    assert {task: x.shape for task, x in out.items()} == {"a": (4, 1), "b": (4, 3)}
    assert model.shared_paths and variables["params"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hardsharing", {}, r"no architecture 'hardsharing' \(did you mean 'hard_sh"),
        ("mmoe", {"experts": MLP}, "'mmoe' has no option experts, known: expert"),
        ("mmoe", {"expert": {"features": (8,)}}, "expert lacks 'model', found"),
        ("mmoe", {"expert": {"model": "mpl"}}, "no model 'mpl'"),
        ("ple", {"levels": ({"model": "mlp", "depth": 2},)}, "has no option 'depth'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(name, options, message):
    with pytest.raises(ValueError, match=f"build: .*{message}"):
        multitask.build(name, OUTPUTS, **options)


@pytest.mark.fast
def test_assembling_what_does_not_exist(quiet):
    model = {"architecture": "hard_sharing", "backbone": MLP}
    with pytest.raises(ValueError, match="unknown multi-task problem 'moon'"):
        multitask.assemble("moon", model, progress=quiet)


def test_a_problem_from_a_preset(quiet):
    problem, model, training = presets.tiny()
    found = multitask.assemble(**problem, model=model, progress=quiet)
    assert found.task_names == ("left", "right") and not found.own_rows
    assert {k: len(v["left"]) for k, v in found.splits.items()} == {
        "train": 64,
        "validation": 32,
        "test": 32,
    }
    params = found.init(jax.random.key(0))
    assert found.start(0) is None and "encoder" in params
    batch = {name: x[:4] for name, x in found.splits["train"].items()}
    losses, _ = found.loss_fn(params, batch, jax.random.key(0))
    assert losses.shape == (2,) and multitask.Settings(**training).steps == 6
    other = multitask.assemble(
        **problem, model={**model, "backbone": MLP | {"flatten": True}}, progress=quiet
    )
    assert other.digest() != found.digest()


@pytest.mark.fast
def test_dropout_that_would_never_be_on_is_refused():
    for part in ({"model": "vit-b/16", "dropout": 0.1}, {"model": "small-conv"}):
        model = {"architecture": "hard_sharing", "backbone": part}
        if "dropout" in part:
            with pytest.raises(ValueError, match="'celeba': dropout is never on"):
                multitask.outline("celeba", model)
        else:
            assert len(multitask.outline("celeba", model).targets) == 40
