import json

import ml_dtypes
import numpy as np
import pytest

from mtl_jax.checkpoints import _bank_methods
from mtl_jax.checkpoints import compress as C
from mtl_jax.checkpoints.extract import extract, read_bank
from mtl_jax.checkpoints.source import open_source
from mtl_jax.checkpoints.writer import CheckpointWriter
from mtl_jax.io import safetensors
from mtl_jax.transforms import merging

BF16 = ml_dtypes.bfloat16
METHODS = {
    "tall": {"scale": 0.4},
    "bitdelta": {},
    "rmm": {"rank": 2, "basis": 2, "svd": "svd"},
}


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bank_methods, "_SIZES", (1024,))
        yield


def save(folder, tensors, **config):
    folder.mkdir(parents=True)
    safetensors.save(folder / "model.safetensors", tensors, {"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def base_tensors(rng):
    return {
        "embed.weight": rng.normal(size=(60, 20)).astype(np.float32),
        "h.0.up.weight": rng.normal(size=(24, 20)).astype(np.float32),
        "h.0.up.bias": rng.normal(size=(24,)).astype(np.float32),
        "scalar": np.float32(rng.normal()),
        "empty": np.zeros((0, 4), np.float32),
        "position_ids": np.arange(6),
        "wide": rng.normal(size=(3,)),  # float64
    }


def moved(base, rng, *, rank=2):
    """An expert whose matrices change by this rank."""
    out = {}
    for name, x in base.items():
        if x.dtype != np.float32:
            out[name] = x
        elif x.ndim == 2:
            left, right = (rng.normal(size=(side, rank)) for side in x.shape)
            out[name] = (x + 0.1 * left @ right.T).astype(x.dtype)
        else:
            out[name] = (x + 0.1 * rng.normal(size=x.shape)).astype(x.dtype)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base and three experts, and their tensors."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    tensors = {"base": base_tensors(rng)}
    tensors |= {name: moved(tensors["base"], rng) for name in "abc"}
    for name, each in tensors.items():
        save(folder / name, each, model_type="toy", name=name)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder, tensors


@pytest.fixture(scope="module")
def banks(models, tmp_path_factory):
    """Method -> (bank folder, what `compress` returned)."""
    folder, _ = models
    out = tmp_path_factory.mktemp("banks")
    experts = [folder / name for name in "abc"]
    return {
        method: (
            out / method,
            C.compress(
                folder / "base", experts, out / method, method=method, **options
            ),
        )
        for method, options in METHODS.items()
    }


def tree_of(tensors):
    """What the pure functions take: float32 leaves that are not empty."""
    return {k: v for k, v in tensors.items() if v.dtype == np.float32 and v.size}


def pure(method, tensors, task):
    """Restored by the functions of `mtl_jax.merging` on whole trees."""
    base = tree_of(tensors["base"])
    taus = merging.task_vectors(base, [tree_of(tensors[name]) for name in "abc"])
    if method == "tall":
        masks = merging.tall_masks(taus, scale=0.4)
        mask = {name: m[task] for name, m in masks.items()}
        delta = merging.restore_delta(merging.task_arithmetic(taus), mask)
    elif method == "bitdelta":
        delta = merging.bitdelta_restore(merging.bitdelta(taus), task, base)
    else:  # Full basis and rank.
        delta = {name: tau[task] for name, tau in taus.items()}
    return {name: base[name] + np.asarray(delta[name]) for name in base}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", range(3))
def test_extract_of_compress_is_the_pure_functions(
    models, banks, tmp_path, method, task
):
    _, tensors = models
    bank, done = banks[method]
    extract(bank, "abc"[task], tmp_path / "out")
    found = {name: v.whole() for name, v in open_source(tmp_path / "out").items()}
    expert = tensors["abc"[task]]
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape, x.dtype) for n, x in expert.items()
    }
    wanted = pure(method, tensors, task)
    for name, values in found.items():
        wanted.setdefault(name, expert[name])
        np.testing.assert_allclose(values, wanted[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_the_restored_checkpoints(models, banks, tmp_path, method):
    _, tensors = models
    bank, done = banks[method]
    for task in done.bank.tasks:
        extract(bank, task.name, tmp_path / task.name)
        found = open_source(tmp_path / task.name)
        lost = total = 0.0
        for name, entry in done.bank.entries.items():
            if entry.how == method:
                expert = tensors[task.name][name].astype(np.float64)
                lost += ((found[name].whole() - expert) ** 2).sum()
                total += ((tensors["base"][name] - expert) ** 2).sum()
        np.testing.assert_allclose(task.error, np.sqrt(lost / total), 1e-3, 1e-5)
        assert task.error < (1e-5 if method == "rmm" else 0.99)


def test_what_is_kept_how(banks):
    how = {
        method: {name: entry.how for name, entry in done.bank.entries.items()}
        for method, (_, done) in banks.items()
    }
    assert how["tall"] == {
        "embed.weight": "tall",
        "h.0.up.weight": "tall",
        "h.0.up.bias": "tall",
        "scalar": "tall",
        "empty": "own",
        "position_ids": "base",  # Integers equal to the base's take no room.
        "wide": "own",
    }
    assert how["bitdelta"]["h.0.up.bias"] == "own"
    assert how["rmm"]["embed.weight"] == "rmm"


@pytest.mark.parametrize("method", METHODS)
def test_the_bank_is_smaller_and_counted_right(models, banks, method):
    folder, tensors = models
    bank, done = banks[method]
    on_disk = sum(file.stat().st_size for file in bank.glob("*.safetensors"))
    header = on_disk - done.nbytes
    assert 0 < header < 4000
    assert done.experts_nbytes == sum(
        x.nbytes for name in "abc" for x in tensors[name].values()
    )
    assert done.nbytes < 0.6 * done.experts_nbytes


def test_the_description_says_what_is_in_the_bank(models, banks):
    folder, _ = models
    bank, done = banks["tall"]
    found, tensors = read_bank(bank)
    assert found == done.bank
    assert found.method == "tall" and found.options["scales"] == [0.4] * 3
    assert [task.name for task in found.tasks] == ["a", "b", "c"]
    assert found.tasks[1].source == str(folder / "b")
    assert found.base == str(folder / "base") and found.version
    assert set(tensors["tall.masks/h.0.up.weight"].spec.shape) == {3, 60}
    assert "relative error" in found.table().columns
    # Equal files once, and none by a name that makes the bank look like a model.
    files = {name for task in found.tasks for name in task.files.values()}
    assert len([name for name in files if name.endswith("tokenizer.json")]) == 1
    assert len([name for name in files if name.endswith("config.json")]) == 3
    assert not (bank / "config.json").exists()


def test_tensors_that_only_some_have_are_kept_as_they_are(models, tmp_path):
    folder, tensors = models
    own = {**tensors["a"], "head": np.ones((2, 3), np.float16)}
    del own["scalar"]
    own["h.0.up.bias"] = np.ones(25, np.float32)  # Of another shape.
    own["position_ids"] = np.arange(6) + 1
    save(tmp_path / "own", own)
    done = C.compress(
        folder / "base", [tmp_path / "own", folder / "b"], tmp_path / "bank"
    )
    how = {name: entry.how for name, entry in done.bank.entries.items()}
    for name in ("head", "scalar", "h.0.up.bias", "position_ids"):
        assert how[name] == "own"
    assert how["embed.weight"] == "tall"
    for task, wanted in (("own", own), ("b", tensors["b"])):
        extract(tmp_path / "bank", task, tmp_path / task / "out")
        found = open_source(tmp_path / task / "out")
        assert set(found) == set(wanted)
        for name in ("head", "scalar", "h.0.up.bias", "position_ids"):
            if name in wanted:
                np.testing.assert_array_equal(found[name].whole(), wanted[name])


def test_one_expert_and_equal_experts(models, tmp_path):
    folder, tensors = models
    C.compress(folder / "base", [folder / "a"], tmp_path / "one", scale=1.0)
    extract(tmp_path / "one", "a", tmp_path / "out")
    found = open_source(tmp_path / "out")
    for name, values in tensors["a"].items():
        np.testing.assert_allclose(found[name].whole(), values, atol=1e-6)
    twice = [folder / "a", folder / "a"]
    done = C.compress(
        folder / "base", twice, tmp_path / "two", names=["x", "y"], scale=0.4
    )
    assert [task.name for task in done.bank.tasks] == ["x", "y"]
    # The sum of equal changes is twice as far, wherever it is kept.
    assert done.bank.tasks[0].error == pytest.approx(1, abs=1e-6)


def test_bfloat16_models_give_bfloat16_back(models, tmp_path):
    _, tensors = models
    narrow = {
        name: {k: v.astype(BF16) for k, v in tree_of(each).items()}
        for name, each in tensors.items()
    }
    for name in ("base", "a", "b"):
        save(tmp_path / name, narrow[name])
    experts = [tmp_path / "a", tmp_path / "b"]
    done = C.compress(tmp_path / "base", experts, tmp_path / "bank")
    wide = C.compress(tmp_path / "base", experts, tmp_path / "wide", dtype="float32")
    assert done.nbytes < 0.7 * wide.nbytes
    extract(tmp_path / "bank", "b", tmp_path / "out")
    assert {str(v.spec.dtype) for v in open_source(tmp_path / "out").values()} == {
        "bfloat16"
    }


class Killed(BaseException):
    pass


def test_a_killed_run_resumes(models, tmp_path, monkeypatch):
    folder, _ = models
    arguments = folder / "base", [folder / name for name in "abc"]
    whole = C.compress(*arguments, tmp_path / "whole")
    write, count = CheckpointWriter.write, 0

    def write_a_little(self, *chunk):
        nonlocal count
        count += 1
        if count > 13:
            self._spool.drain()  # What was handed over is on the disk.
            raise Killed
        write(self, *chunk)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write_a_little)
        with pytest.raises(Killed):
            C.compress(*arguments, tmp_path / "bank")
    with pytest.raises(FileNotFoundError, match="is no bank"):
        read_bank(tmp_path / "bank")
    with pytest.raises(ValueError, match="another"):  # Of another plan.
        C.compress(*arguments, tmp_path / "bank", scale=0.3)
    read = []
    taken = _bank_methods.Tall.compress
    monkeypatch.setattr(
        _bank_methods.Tall,
        "compress",
        lambda self, base, *rest: read.append(base.spec) or taken(self, base, *rest),
    )
    again = C.compress(*arguments, tmp_path / "bank")
    assert 0 < len(read) < sum(e.how == "tall" for e in whole.bank.entries.values())
    assert again.bank == whole.bank
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "bank" / file.name).read_bytes() == file.read_bytes()
    assert {f.name for f in (tmp_path / "bank").iterdir()} == {
        f.name for f in (tmp_path / "whole").iterdir()
    }


def test_broken_values_are_refused_by_name(models, tmp_path):
    folder, tensors = models
    broken = {**tensors["a"], "h.0.up.bias": np.full(24, np.nan, np.float32)}
    save(tmp_path / "broken", broken)
    with pytest.raises(ValueError, match=r"'h\.0\.up\.bias' of broken holds NaN"):
        C.compress(folder / "base", [tmp_path / "broken"], tmp_path / "bank")
    with pytest.raises(FileNotFoundError):
        read_bank(tmp_path / "bank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zip"}, "no method 'zip'; there are tall, rmm, bitdelta"),
        ({"rank": 3}, "'rank' is no option of tall, which has scale, dtype"),
        ({"method": "rmm", "rank": 0}, "rank is 0, wanted an integer of at least 1"),
        ({"method": "rmm", "basis": -1}, "basis is -1, wanted an integer"),
        ({"method": "rmm", "svd": "qr"}, "svd is 'qr', wanted one of svd, gram"),
        ({"scale": [0.1, 0.2, 0.3]}, "one for each of 2 tasks"),
        ({"scale": -1.0}, "wanted one number of at least 0"),
        ({"dtype": "int8"}, "dtype is 'int8', wanted one of float32"),
        ({"dtype": "what"}, "dtype is 'what', wanted one of float32"),
        ({"names": ["x"]}, "1 names for 2 experts: x"),
        ({"names": ["x", "x"]}, "two experts are named 'x'"),
        ({"names": ["x", " "]}, "an expert is named ''"),
    ],
)
def test_wrong_options_are_refused(models, tmp_path, options, message):
    folder, _ = models
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        C.compress(
            folder / "base", [folder / "a", folder / "b"], tmp_path / "bank", **options
        )
    assert not (tmp_path / "bank").exists()


def test_a_base_of_another_kind_is_refused(models, tmp_path):
    folder, _ = models
    save(tmp_path / "other", {"x": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="a has no tensor of the base .*such as 'x'"):
        C.compress(tmp_path / "other", [folder / "a"], tmp_path / "bank")
    with pytest.raises(ValueError, match="no experts"):
        C.compress(folder / "base", [], tmp_path / "bank")
