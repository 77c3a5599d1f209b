"""Rules over whole tensors: the pure function on the task vectors, base added."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import engine, rules
from mtl_jax.checkpoints.source import ArrayView, TensorSpec
from mtl_jax.transforms import merging

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = (12, 16)
# What each pure function is called with, for the options of the job.
CALLS = {
    "pcb": ({"density": 0.5}, {"density": 0.5, "scope": "leaf"}),
    "consensus": ({"mask_scale": 0.5, "min_tasks": 3}, {"scale": 0.5, "min_tasks": 3}),
    "trust_region": ({"density": 0.9}, {"density": 0.9, "scope": "leaf"}),
    "tsv_merge": ({}, {}),
    "iso_c": ({}, {}),
    "iso_cts": ({"common": 0.5}, {"common": 0.5}),
    "knots": ({"density": 0.5}, None),
    "svc": ({"alpha": 0.5}, {"alpha": 0.5, "layout": "out_in"}),
    "opcm": ({"alpha": 0.4}, {"alpha": 0.4}),
    "wudi": (
        {"solver": "exact", "layout": "in_out"},
        {"solver": "exact", "layout": "in_out"},
    ),
}


class Sink:
    done = ()

    def __init__(self):
        self.parts = {}

    def write(self, name, start, values):
        self.parts.setdefault(name, []).append((start, np.array(values)))

    def tensor(self, name):
        parts = sorted(self.parts[name], key=lambda part: part[0])
        return np.concatenate([values for _, values in parts])


def merge(rule, arrays, **options):
    jobs = [
        rules.Job(
            name=name,
            spec=TensorSpec(parts[0].shape, parts[0].dtype),
            rule=rule,
            base=ArrayView(parts[0]),
            experts=tuple(map(ArrayView, parts[1:])),
            options=options,
        )
        for name, parts in arrays.items()
    ]
    sink = Sink()
    engine.run(jobs, sink, chunk=64, threads=2)
    return {
        name: sink.tensor(name).reshape(parts[0].shape)
        for name, parts in arrays.items()
        if parts[0].size
    }


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"w": SHAPE, "v": (12, 16), "b": (16,), "one": (1,), "none": (0, 3)}
    return {
        name: [(rng.normal(size=shape)).astype(BF16) for _ in range(4)]
        for name, shape in shapes.items()
    }


def test_there_is_a_case_for_each():
    whole = {name for name, rule in rules.RULES.items() if rule.whole}
    assert whole == set(CALLS) | {"arcee_fusion"}


def stacked(parts):
    base, *rest = (np.asarray(p).astype(np.float32) for p in parts)
    return base, jnp.asarray(np.stack([x - base for x in rest]))


@pytest.mark.parametrize("rule", CALLS)
def test_is_the_pure_function(rule, tensors):
    options, call = CALLS[rule]
    found = merge(rule, tensors, weight=0.7, **options, **{"lambda": 0.5})
    assert set(found) == {"w", "v", "b", "one"}
    for name in ("w", "b"):
        base, taus = stacked(tensors[name])
        if call is None:
            call = {
                "rule": lambda *a, **k: merging.ties(
                    *a, density=0.5, scope="leaf", **k
                ),
                "layout": "out_in",
            }
        weights = jnp.full(3, 0.7)
        merged = getattr(merging, rule)({name: taus}, weights=weights, **call)[name]
        wanted = (base + np.float32(0.5) * np.asarray(merged)).astype(BF16)
        np.testing.assert_allclose(
            found[name].astype(np.float32), wanted.astype(np.float32), rtol=2**-7
        )


def test_arcee_fusion(tensors):
    pairs = {name: parts[:2] for name, parts in tensors.items()}
    found = merge("arcee_fusion", pairs, tukey_fence=1.0)
    base, taus = stacked(tensors["w"][:2])
    merged = merging.arcee_fusion(
        {"w": taus}, base={"w": jnp.asarray(base)}, spread=1.0
    )
    wanted = (base + np.asarray(merged["w"])).astype(BF16)
    assert (found["w"] == wanted).all()
    assert 0 < (wanted != tensors["w"][0]).mean() < 0.5


@pytest.mark.parametrize("rule", ["iso_c", "pcb"])
def test_values_that_are_not_finite_are_refused(rule, tensors):
    parts = [np.array(p) for p in tensors["w"]]
    parts[3][1, 2] = np.nan
    with pytest.raises(ValueError, match=f"{rule}: 'w': NaN or infinity in expert 2"):
        merge(rule, {"w": parts})
