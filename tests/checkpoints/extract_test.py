import json
import shutil

import numpy as np
import pytest

from mtl_jax.checkpoints import _bank_methods
from mtl_jax.checkpoints.compress import compress
from mtl_jax.checkpoints.extract import extract, read_bank
from mtl_jax.checkpoints.source import open_source
from mtl_jax.checkpoints.writer import CheckpointWriter
from mtl_jax.io import safetensors


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bank_methods, "_SIZES", (1024,))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_llama):
    """A folder with base, experts math and code, and a bank; the experts' tensors."""
    folder = tmp_path_factory.mktemp("made")
    base = save_llama(folder / "base", 0)
    experts = {
        name: save_llama(folder / name, seed, near=base, note=name)
        for seed, name in enumerate(("math", "code"), 1)
    }
    compress(folder / "base", [folder / n for n in experts], folder / "bank", scale=0.4)
    return folder, experts


def test_a_task_gets_back_its_files(made, tmp_path):
    folder, experts = made
    done = extract(folder / "bank", "code", tmp_path / "out", shard_bytes=4000)
    assert done.tensors == len(experts["code"])
    assert done.nbytes == sum(x.nbytes for x in experts["code"].values())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (
            folder / "code" / name
        ).read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["note"] == "code"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    found = open_source(tmp_path / "out")
    assert {n: v.spec.dtype for n, v in found.items()} == {
        n: x.dtype for n, x in experts["code"].items()
    }
    # Nearer to the expert than the base is.
    base = open_source(folder / "base")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        wanted = experts["code"][name].astype(np.float64)
        lost = np.linalg.norm(found[name].whole() - wanted)
        assert lost < 0.9 * np.linalg.norm(base[name].whole() - wanted)


def test_unknown_task_lists_those_there_are(made, tmp_path):
    folder, _ = made
    with pytest.raises(ValueError, match="no task 'maths' in the bank; it has math, c"):
        extract(folder / "bank", "maths", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_given(made, tmp_path):
    folder, _ = made
    for name in ("base", "bank"):
        shutil.copytree(folder / name, tmp_path / name)
    file = tmp_path / "bank" / "bank.json"
    file.write_text(file.read_text().replace(str(folder / "base"), "/nowhere/base"))
    with pytest.raises(FileNotFoundError, match="nowhere/base.*give the base's place"):
        extract(tmp_path / "bank", "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    extract(tmp_path / "bank", "math", tmp_path / "out", base=tmp_path / "base")
    extract(folder / "bank", "math", tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, "'model.layers.1.* in the bank, no such tensor there"),
        ({"dim": 8}, r"of \(24, 16\) in the bank, \(24, 8\) there"),
        ({"dtype": np.float32}, "names, shapes or dtypes of its tensors differ"),
    ],
)
def test_a_base_with_other_headers_is_refused(
    made, tmp_path, save_llama, options, message
):
    folder, _ = made
    save_llama(tmp_path / "base", 0, **options)
    with pytest.raises(ValueError, match=f"is not the base of the bank.*{message}"):
        extract(folder / "bank", "math", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_values_is_refused_again_and_again(made, tmp_path):
    folder, _ = made
    tensors = {n: v.whole() for n, v in open_source(folder / "base").items()}
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors[odd] = tensors[odd].copy()
    tensors[odd][3, 3] += 1
    (tmp_path / "base").mkdir()
    safetensors.save(tmp_path / "base/model.safetensors", tensors, {"format": "pt"})
    for _ in range(2):  # A resumed run finds no tensor that passed for whole.
        with pytest.raises(ValueError, match=f"{odd!r} of the base is not that which"):
            extract(folder / "bank", "math", tmp_path / "out", base=tmp_path / "base")
        with pytest.raises((FileNotFoundError, ValueError)):
            open_source(tmp_path / "out")


class Killed(BaseException):
    pass


def test_a_killed_run_resumes(made, tmp_path, monkeypatch):
    folder, experts = made
    extract(folder / "bank", "math", tmp_path / "whole")
    write, names = CheckpointWriter.write, []

    def write_a_little(self, name, *chunk):
        if len(names) == 4:
            self._spool.drain()
            raise Killed
        names.append(name)
        write(self, name, *chunk)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write_a_little)
        with pytest.raises(Killed):
            extract(folder / "bank", "math", tmp_path / "out")
    with pytest.raises((FileNotFoundError, ValueError)):
        open_source(tmp_path / "out")
    again = []
    monkeypatch.setattr(
        CheckpointWriter,
        "write",
        lambda self, name, *chunk: again.append(name) or write(self, name, *chunk),
    )
    extract(folder / "bank", "math", tmp_path / "out")
    assert set(again) == set(experts["math"]) - set(names)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_is_there_is_not_replaced_unasked(made, tmp_path):
    folder, _ = made
    extract(folder / "bank", "math", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a checkpoint"):
        extract(folder / "bank", "code", tmp_path / "out")
    extract(folder / "bank", "code", tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["note"] == "code"


def test_what_is_no_bank_is_refused(made, tmp_path):
    folder, _ = made
    with pytest.raises(FileNotFoundError, match="does not exist: there is no"):
        read_bank(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="is no bank: there is no"):
        read_bank(folder / "base")
    shutil.copytree(folder / "bank", tmp_path / "bank")
    description = json.loads((tmp_path / "bank/bank.json").read_text())

    def outside(files):
        first, *rest = description["tasks"]
        return {"tasks": [{**first, "files": files}, *rest]}

    for change, message in (
        ({"format": "zip"}, "of another format"),
        ({"format_version": 9}, "format version 9, this reads 1"),
        ({"tasks": [{"name": "x"}]}, "does not describe a bank"),
        ({"entries": 3}, "does not describe a bank"),
        (outside({"../x": "a"}), r"'\.\./x' is no name of a file"),
        (outside({"x": "/etc/a"}), "'/etc/a' is no name of a file"),
    ):
        text = json.dumps({**description, **change})
        (tmp_path / "bank/bank.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_bank(tmp_path / "bank")
    (tmp_path / "bank/bank.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_bank(tmp_path / "bank")


@pytest.mark.reference
def test_transformers_loads_what_was_restored(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, experts = made
    extract(folder / "bank", "math", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="float32"
    )
    found = {name: x.numpy() for name, x in model.state_dict().items()}
    wanted = open_source(tmp_path / "out")
    for name in experts["math"]:
        np.testing.assert_array_equal(
            found[name], wanted[name].whole().astype(np.float32)
        )
