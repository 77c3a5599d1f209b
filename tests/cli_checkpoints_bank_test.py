"""The commands diff, compress and extract, through the command line."""

import json

import numpy as np
import pytest

from mtl_jax import cli, host
from mtl_jax.checkpoints import _bank_methods
from mtl_jax.checkpoints.source import open_source
from mtl_jax.io import safetensors


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bank_methods, "_SIZES", (1024,))
        patch.setattr(host, "keep_compiled_programs", lambda: None)
        yield


def save(folder, tensors):
    folder.mkdir(parents=True)
    safetensors.save(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    base = {
        f"h.{i}.{kind}.weight": rng.normal(size=(20, 30)).astype(np.float32)
        for i in range(2)
        for kind in ("up", "down")
    }
    save(folder / "base", base)
    for number, name in enumerate("ab", 1):
        moved = {
            key: x + (0.1 * number * rng.normal(size=x.shape)).astype(np.float32)
            for key, x in base.items()
        }
        moved["h.1.up.weight"] = base["h.1.up.weight"] + 1
        save(folder / name, {**moved, f"head.{name}": np.ones(3, np.float32)})
    return folder


@pytest.fixture
def at(models, monkeypatch):
    monkeypatch.chdir(models)
    return models


def one_line(captured):
    (line,) = captured.err.strip().splitlines()
    return line


def test_diff_prints_the_worst_first_and_what_is_missing(at, capsys):
    assert cli.main(["diff", "base", "a", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert rows.index("h.1.up.weight") < rows.index("all")
    assert "the first 2 of 4" in out and "h.0" in out
    assert "Only in B: head.a." in out
    assert "4 tensors compared, 0 of them equal" in out


def test_diff_as_json_is_nothing_but_json(at, capsys):
    assert cli.main(["diff", "a", "b", "--base", "base", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["with_base"] and set(data["layers"]) == {"h.0", "h.1"}
    assert data["tensors"]["h.1.up.weight"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert abs(data["tensors"]["h.0.up.weight"]["cosine"]) < 0.2
    assert data["only_a"] == ["head.a"] and data["only_b"] == ["head.b"]


def test_diff_writes_a_report(at, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = ["diff", "a", "b", "--base", "base", "--out", str(out)]
    assert cli.main([*arguments, "--filter", r"\.up\."]) == 0
    assert str(out / "report" / "index.html") in capsys.readouterr().err
    assert (out / "report" / "index.html").read_text().count("<svg") == 3
    assert len(json.loads((out / "diff.json").read_text())["tensors"]) == 2
    assert cli.main(["report", str(out)]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "tall", "--scale", "0.3,0.5"],
        ["--method", "bitdelta"],
        ["--method", "rmm", "--rank", "4", "--basis", "1", "--align", "--svd", "svd"],
    ],
    ids=lambda o: o[1],
)
def test_compress_and_extract(at, tmp_path, capsys, options):
    bank, out = str(tmp_path / "bank"), str(tmp_path / "out")
    arguments = ["compress", "base", "a", "b", bank, "--names", "one,two"]
    assert cli.main([*arguments, *options]) == 0
    text = capsys.readouterr().out
    assert "one" in text and "relative error" in text and "beside the base" in text
    assert cli.main(["extract", bank, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "two" in listed and options[1] in listed and f"base: {at / 'base'}" in listed
    assert cli.main(["extract", bank, "two", out, "--shard-size", "3KB"]) == 0
    assert "5 tensors" in capsys.readouterr().out
    assert set(open_source(out)) == set(open_source("b"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4


def test_options_go_before_and_after_the_models(at, tmp_path, capsys):
    bank = str(tmp_path / "bank")
    arguments = ["compress", "--method", "tall", "base", "a", bank, "--overwrite"]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    assert "scales [0.4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "base", "nowhere"], "no such checkpoint: nowhere"),
        (["diff", "base", "a", "--sort", "size2"], "no column 'size2' to sort by"),
        (["diff", "base", "a", "--filter", "("], "'(' is no regular expression"),
        (["diff", "base", "a", "--filter", "zz"], "'zz' matches no tensor"),
        (["diff", "base", "a", "--limit", "-1"], "--limit is -1"),
        (["diff", "base", "a", "--bse", "b"], "unknown argument '--bse'"),
        (["compress", "base", "a", "nowhere", "out"], "no such checkpoint: nowhere"),
        (
            ["compress", "base", "a", "out", "--rank", "2"],
            "'rank' is no option of tall",
        ),
        (["compress", "base", "a", "out", "--scale", "x"], "wants numbers, found 'x'"),
        (["compress", "base", "a", "out", "--scale", "1,2"], "one for each of 1 tasks"),
        (["compress", "base", "a", "a", "out"], "two experts are named 'a'"),
        (["compress", "base", "a", "base"], "base is read from, choose another folder"),
        (["compress", "base", "a", "b"], "b holds a checkpoint"),
        (["compress", "base", "a", "a", "--overwrite"], "a is read from, choose"),
        (["extract", "base", "--list"], "base is no bank: there is no base/bank.json"),
        (["extract", "nowhere", "a", "out"], "nowhere does not exist"),
        (["extract", "base"], "wants BANK TASK OUT, or BANK --list"),
    ],
)
def test_user_error_is_one_line(at, capsys, arguments, message):
    before = sorted(at.rglob("*"))
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    line = one_line(captured)
    assert message in line and line.startswith(f"mtl-jax {arguments[0]}: ")
    assert captured.out == ""
    assert sorted(at.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "base"], "the following arguments are required"),
        (["compress", "base", "a", "out", "--method", "zip"], "invalid choice: 'zip'"),
        (["compress", "base", "a", "o", "--shard-size", "big"], "wants a size such as"),
        (["compress", "base", "a", "o", "--shard-size", "0"], "wants a size such as"),
        (["extract"], "the following arguments are required: BANK"),
    ],
)
def test_wrong_command_line_is_one_line(at, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_extract_from_another_base_is_one_line(at, tmp_path, capsys):
    bank = str(tmp_path / "bank")
    assert cli.main(["compress", "base", "a", "b", bank]) == 0
    capsys.readouterr()
    out = str(tmp_path / "out")
    assert cli.main(["extract", bank, "c", out]) == 2
    assert "no task 'c' in the bank; it has a, b" in one_line(capsys.readouterr())
    assert cli.main(["extract", bank, "a", out, "--base", "b"]) == 2
    line = one_line(capsys.readouterr())
    assert f"b is not the base of the bank, {at / 'base'}" in line
    assert not (tmp_path / "out").exists()
