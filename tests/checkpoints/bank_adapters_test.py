import json

import numpy as np
import pytest

from mtl_jax.checkpoints.compress import compress
from mtl_jax.checkpoints.extract import extract
from mtl_jax.checkpoints.source import open_source
from mtl_jax.io import safetensors

PREFIX = "base_model.model."
SHAPES = {"h.0.query": (24, 20), "h.0.up": (24, 20)}  # Equal: compiled once.
TABLE = (24, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "base"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        f"{module}.weight": rng.normal(size=shape).astype(np.float32)
        for module, shape in {**SHAPES, "embed": TABLE, "score": (3, 20)}.items()
    }
    safetensors.save(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def adapter(folder, seed, rank=4, *, extra=None, **config):
    """A folder as the PEFT library writes it; returns the tensors."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in SHAPES.items():
        for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"{PREFIX}{module}.lora_{factor}.weight"
            tensors[name] = rng.normal(size=shape).astype(np.float32)
    for factor, shape in (("A", (rank, TABLE[0])), ("B", (TABLE[1], rank))):
        name = f"{PREFIX}embed.lora_embedding_{factor}"
        tensors[name] = rng.normal(size=shape).astype(np.float32)
    tensors |= extra or {}
    folder.mkdir(parents=True)
    safetensors.save(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def product(tensors, module):
    a, b = (tensors[f"{PREFIX}{module}.lora_{f}.weight"] for f in "AB")
    return b.astype(np.float64) @ a


def test_a_full_basis_gives_adapters_back_as_they_were(base, tmp_path):
    own = {f"{PREFIX}score.modules_to_save.weight": np.ones((3, 20), np.float32)}
    saved = {"modules_to_save": ["score"], "use_rslora": True}
    given = {
        "a": adapter(tmp_path / "a", 1),
        "b": adapter(tmp_path / "b", 2, rank=2),  # Padded in the bank, cut after it.
        "c": adapter(tmp_path / "c", 3, extra=own, **saved),
    }
    done = compress(
        base, [tmp_path / n for n in given], tmp_path / "bank", method="rmm", basis=4
    )
    assert done.bank.kind == "adapters"
    assert max(task.error for task in done.bank.tasks) < 1e-5
    for name, tensors in given.items():
        extract(tmp_path / "bank", name, tmp_path / "out" / name)
        out = tmp_path / "out" / name
        assert json.loads((out / "adapter_config.json").read_text()) == json.loads(
            (tmp_path / name / "adapter_config.json").read_text()
        )
        found = open_source(out)
        assert set(found) == set(tensors)
        for key, values in tensors.items():
            assert found[key].spec == (values.shape, values.dtype)
            np.testing.assert_allclose(found[key].whole(), values, atol=1e-5)
        # And so does what they make of their base.
        wanted = open_source(f"{base}+{tmp_path / name}")
        for key, view in open_source(f"{base}+{out}").items():
            np.testing.assert_allclose(view.whole(), wanted[key].whole(), atol=1e-3)


def test_errors_are_those_of_the_products(base, tmp_path):
    names = "abcdef"
    given = {name: adapter(tmp_path / name, i) for i, name in enumerate(names)}
    done = compress(
        base,
        [tmp_path / name for name in names],
        tmp_path / "bank",
        method="rmm",
        basis=1,
    )
    for task in done.bank.tasks:
        extract(tmp_path / "bank", task.name, tmp_path / "out" / task.name)
        found = {
            key: view.whole()
            for key, view in open_source(tmp_path / "out" / task.name).items()
        }
        lost = total = 0.0
        for tensors, sign in ((given[task.name], 1), (found, -1)):
            a, b = (tensors[f"{PREFIX}embed.lora_embedding_{f}"] for f in "AB")
            parts = {module: product(tensors, module) for module in SHAPES}
            parts["embed"] = b.astype(np.float64) @ a
            if sign == 1:
                wanted = parts
        for module, each in wanted.items():
            lost += ((parts[module] - each) ** 2).sum()
            total += (each**2).sum()
        np.testing.assert_allclose(task.error, np.sqrt(lost / total), rtol=1e-4)
        assert 0.2 < task.error < 1
    assert done.nbytes < 0.75 * done.experts_nbytes
    total = sum(x.nbytes for x in given["a"].values()) * len(names)
    assert done.experts_nbytes == total


def test_equal_adapters_are_stored_once(base, tmp_path):
    tensors = adapter(tmp_path / "a", 1)
    names = ["x", "y", "z"]
    done = compress(
        base,
        [tmp_path / "a"] * 3,
        tmp_path / "bank",
        method="rmm",
        basis=0,
        names=names,
    )
    assert done.nbytes == sum(x.nbytes for x in tensors.values())
    assert max(task.error for task in done.bank.tasks) < 1e-6


def test_what_does_not_go_together_is_refused(base, tmp_path):
    adapter(tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"give adapters as BASE\+ADAPTER, or use rmm"):
        compress(base, [tmp_path / "a"], tmp_path / "bank", method="tall")
    with pytest.raises(ValueError, match="a is an adapter and others are not"):
        compress(base, [tmp_path / "a", base], tmp_path / "bank", method="rmm")
    adapter(tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(ValueError, match="DoRA is not supported"):
        compress(base, [tmp_path / "dora"], tmp_path / "bank", method="rmm")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    adapter(tmp_path / "a", 1)
    tensors = {"h.0.query.weight": np.ones((24, 21), np.float32)}
    (tmp_path / "other").mkdir()
    safetensors.save(tmp_path / "other/model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ValueError, match="h.0.up.weight|h.0.query"):
        compress(tmp_path / "other", [tmp_path / "a"], tmp_path / "bank", method="rmm")


def test_broken_factors_are_refused_by_name(base, tmp_path):
    name = f"{PREFIX}h.0.up.lora_B.weight"
    adapter(tmp_path / "a", 1, extra={name: np.full((24, 4), np.inf, np.float32)})
    with pytest.raises(ValueError, match=r"h\.0\.up\.lora_B\.weight' of a holds NaN"):
        compress(base, [tmp_path / "a"], tmp_path / "bank", method="rmm")


def test_an_expert_may_be_a_base_with_an_adapter(base, tmp_path):
    for i, name in enumerate("ab"):
        adapter(tmp_path / name, i)
    experts = [f"{base}+{tmp_path / name}" for name in "ab"]
    done = compress(base, experts, tmp_path / "bank", names=["a", "b"], scale=1.0)
    assert done.bank.kind == "checkpoints"
    extract(tmp_path / "bank", "a", tmp_path / "out")
    found, wanted = open_source(tmp_path / "out"), open_source(experts[0])
    np.testing.assert_allclose(
        found["score.weight"].whole(), wanted["score.weight"].whole()
    )
    lost = found["h.0.up.weight"].whole() - wanted["h.0.up.weight"].whole()
    change = (
        wanted["h.0.up.weight"].whole() - open_source(base)["h.0.up.weight"].whole()
    )
    assert np.linalg.norm(lost) < 0.8 * np.linalg.norm(change)


def test_an_adapter_folder_is_not_replaced_unasked(base, tmp_path):
    adapter(tmp_path / "a", 1)
    compress(base, [tmp_path / "a"], tmp_path / "bank", method="rmm")
    extract(tmp_path / "bank", "a", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        extract(tmp_path / "bank", "a", tmp_path / "out")
    extract(tmp_path / "bank", "a", tmp_path / "out", overwrite=True)
