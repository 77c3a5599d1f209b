"""What is refused before anything is read, and how it is said."""

import numpy as np
import pytest

from mtl_jax.checkpoints import engine, rules
from mtl_jax.checkpoints.source import ArrayView, TensorSpec

pytestmark = pytest.mark.fast
ARRAY = np.ones((2, 3), np.float32)


def job(rule="ties", experts=2, base=True, dtype=np.float32, models=(), **options):
    view = ArrayView(ARRAY)
    return rules.Job(
        name="w",
        spec=TensorSpec((2, 3), np.dtype(dtype)),
        rule=rule,
        base=view if base else None,
        experts=(view,) * experts,
        options=options,
        models=models,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "tise"}, "no rule 'tise'; did you mean 'ties'"),
        ({}, "ties: 'w': option 'weight' is missing"),
        ({"weight": 1, "densty": 1}, "no option 'densty'; did you mean 'density'"),
        ({"weight": 1, "density": 1.5}, "option 'density' is 1.5, wanted 0 to 1"),
        ({"weight": (1, 2, 3)}, "option 'weight' has 3 values, wanted 2"),
        ({"weight": "a lot"}, "option 'weight' is 'a lot', wanted a number"),
        ({"weight": True}, "option 'weight' is True, wanted a number"),
        ({"weight": np.nan}, "option 'weight' is nan, wanted a finite number"),
        ({"weight": None}, "option 'weight' is None, wanted a number"),
        (
            {"weight": 1, "normalize": 1},
            "option 'normalize' is 1, wanted true or false",
        ),
        ({"weight": 1, "rescale": "l2"}, "option 'rescale' is 'l2', wanted one of"),
        ({"weight": 1, "rescale": 1}, "option 'rescale' is 1, wanted one of"),
        ({"weight": 1, "scope": "leaf"}, "'scope' is 'leaf', wanted one of"),
        ({"weight": 1, "base": False}, "there is no base, which this rule needs"),
        (
            {"rule": "linear", "weight": 1},
            "there is a base, which this rule has no use",
        ),
        (
            {"rule": "slerp", "t": 0.5},
            "there are 2 models beside the base, wanted 1 to 1",
        ),
        (
            {"rule": "model_stock", "experts": 1},
            "there are 1 models .* wanted 2 or more",
        ),
        ({"rule": "karcher", "base": False, "max_iter": 1.5}, "wanted an integer"),
        ({"rule": "della", "weight": 1, "density": 0.1}, "wanted\\s+0 < density - eps"),
        ({"rule": "linear", "base": False, "weight": (1, -1)}, "a sum other than 0"),
        ({"weight": 1, "models": ("a",)}, "1 names for 2 models"),
        ({"weight": 1, "dtype": np.int32}, "written as int32, wanted floating point"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rules.check(job(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"weight": 1, "rescale": True},
        {"weight": [0, -2.5], "density": (0.1, 1)},
        {"rule": "della", "weight": 1, "density": 1.0},
        {"rule": "linear", "base": False, "weight": (1, -1), "normalize": False},
        {"rule": "passthrough", "base": False, "experts": 1},
    ],
)
def test_allowed(given):
    rules.check(job(**given))


def test_options_are_filled_in():
    found = rules.resolve(job(weight=[0.5, 1]))
    assert found == {
        "weight": (0.5, 1),
        "density": (1.0, 1.0),
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
        "scope": "tensor",
    }


def views(*arrays):
    return tuple(ArrayView(np.asarray(a)) for a in arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((ARRAY, ARRAY[:1]), r"b has shape \(1, 3\), wanted \(2, 3\)"),
        ((ARRAY, ARRAY.astype(complex)), "b is complex128, wanted a real dtype"),
        ((ARRAY, ARRAY.astype(int)), "b is int64, wanted floating point"),
        ((ARRAY.astype(int), ARRAY.astype(bool)), "b is bool, a int64"),
        (
            (ARRAY.astype(int), ARRAY.astype(int)),
            "to be written as float32, but a is int64",
        ),
    ],
)
def test_tensors_that_do_not_fit(arrays, message):
    one = rules.Job(
        name="w",
        spec=TensorSpec((2, 3), np.dtype(np.float32)),
        rule="linear",
        base=None,
        experts=views(*arrays),
        options={"weight": 1},
        models=("a", "b"),
    )
    with pytest.raises(ValueError, match=f"linear: 'w': {message}"):
        rules.check(one)


def test_every_rule_has_its_handler_and_a_summary():
    assert set(engine._HANDLERS) == set(rules.RULES)
    for name, rule in rules.RULES.items():
        assert rule.name == name and rule.summary
        assert rule.takes_base or not rule.needs_base


def test_a_name_is_written_once():
    class Sink:
        done = ()

    with pytest.raises(ValueError, match="there are 2 jobs for 'w'"):
        engine.run([job(weight=1), job(weight=1)], Sink())
