"""Mistakes at the command line: one line, exit code 2, nothing left behind."""

import json
import os
import pathlib
import shutil

import pytest

from mtl_jax import cli, io

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "experiments/configs/tall_masks.py")
TINY = f"{CONFIG}:tiny"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working directory and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def refusal(capsys, *argv):
    """The line on stderr of a command that ends with code 2 and prints nothing."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    found = capsys.readouterr()
    assert code == 2, found.err
    assert not found.out and "Traceback" not in found.err
    lines = [x for x in found.err.splitlines() if x.startswith("mtl-jax")]
    assert len(lines) == 1 and found.err.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([""], "wants PATH.py"),
        ([":"], "wants PATH.py"),
        (["nowhere/tall_masks.py"], "nowhere is not a directory"),
        ([CONFIG.replace("tall_masks", "tal_masks")], "near it: tall_masks.py"),
        ([f"{CONFIG}:tinny"], "no variant 'tinny'"),
        ([f"{CONFIG}:"], "no variant ''"),
        ([TINY, "stray"], "unknown argument 'stray'"),
        ([TINY, "--config.studdy.scales=1"], "near it: study.scales"),
        ([TINY, "--config.experts.steps"], "with an equals sign"),
        ([TINY, "--config.experts.steps=1.5"], "wants int"),
        ([TINY, "--config.experts=1"], "a group"),
        ([TINY, "--config.remember=maybe"], "wants bool"),
        ([TINY, "--config.system=tall-msks"], "close: tall-masks"),
        ([TINY, "--config.suite.name=wrld"], "known: clip, minilm"),
        ([TINY, "--config.suite.name=small_vit"], "options lack 'names'"),
        ([TINY, "--config.suite.name=clip"], "options lack 'base'"),
        ([TINY, "--config.suite.options.tasks=0"], "world: wants"),
        ([TINY, "--config.suite.options.sizes=64,32"], "three sizes"),
        ([TINY, "--config.study.scales="], "row 'task arithmetic': scales wants"),
        ([TINY, "--config.study.scales=nan,1"], "finite numbers"),
        ([TINY, "--workdir", "file"], "workdir file: cannot write there"),
        ([TINY, "--workdir", "file/x"], "cannot write there (Not a directory)"),
        ([TINY, "--workdir", "/proc/x"], "workdir /proc/x: cannot write there"),
        ([TINY, "--workdir", "foo://x"], "no such kind of file system"),
        ([f"{CONFIG}:paper"], "needs pretrained weights"),
    ],
)
def test_run(home, capsys, argv, message):
    (home / "file").write_text("x")
    assert message in refusal(capsys, "run", *argv)
    assert not (home / "runs").exists()
    assert not list(home.glob("cache/zoo/standard-*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([TINY, "--topology", "v5e:2x2"], "use the variant :paper"),
        ([f"{CONFIG}:paper", "--topology", "v5e:0x0"], "wanted a form such as"),
        ([f"{CONFIG}:paper", "--topology", "v5e:4x4x4"], "wanted a form such as"),
        (
            [f"{CONFIG}:paper", "--topology", "v5e:2x2", "--mesh", "data=x"],
            "--mesh: wants AXIS=N",
        ),
        ([f"{CONFIG}:paper"], "required: --topology"),
    ],
)
def test_preflight(home, capsys, argv, message):
    assert message in refusal(capsys, "preflight", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list", "--family", "mergin"], "family must be one of"),
        (["list", "--status", "wrking"], "status must be one of working, planned"),
        (["show", "tall-msk"], "close: tall-masks"),
        (["show"], "required: SYSTEM"),
        (["report", "nowhere"], "no directory nowhere"),
        (["report", "."], "no results.json"),
        ([], "required: COMMAND"),
        (["rn"], "invalid choice: 'rn'"),
    ],
)
def test_readers(home, capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\0"])
def test_damaged_results(home, capsys, text):
    (home / "results.json").write_text(text)
    refusal(capsys, "report", ".")
    assert not (home / "index.html").exists()


def test_no_network_and_an_empty_cache(home, capsys, monkeypatch):
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    line = refusal(capsys, "run", f"{CONFIG}:demo")
    assert "MTL_JAX_OFFLINE is set; put " in line
    assert not (home / "runs").exists()


def test_a_wheel_with_other_bytes(home, capsys):
    from mtl_jax.data import packages

    folder = home / "cache" / "packages"
    folder.mkdir(parents=True)
    (folder / packages.MINILM.filename).write_bytes(b"not a wheel")
    assert "has SHA-256" in refusal(capsys, "run", f"{CONFIG}:demo")
    assert not (home / "cache" / "files").exists()


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A cache with experts of the tiny variant."""
    home = tmp_path_factory.mktemp("experts")
    before = {k: os.environ.get(k) for k in ("MTL_JAX_CACHE",)}
    os.environ["MTL_JAX_CACHE"] = str(home / "cache")
    # The study fails at its first row, after the experts are written.
    try:
        code = cli.main(
            [
                *("run", TINY, "--workdir", str(home / "w")),
                *("--config.modes=linear",),
            ]
        )
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    assert code == 2
    return home / "cache"


@pytest.mark.parametrize("fault", ["truncated", "empty", "garbage", "other leaf"])
def test_damaged_experts_are_named(home, expert, capsys, fault):
    shutil.copytree(expert, home / "cache")
    path = sorted((home / "cache" / "zoo").glob("linear-task0-*"))[0]
    raw = path.read_bytes()
    if fault == "other leaf":
        io.save_tree(path, {"x": io.load_tree(path)[0]["layers_0"]["bias"]})
    else:
        bad = {"truncated": raw[:-5], "empty": b"", "garbage": b"\xff" * 64}[fault]
        path.write_bytes(bad)
    line = refusal(capsys, "run", TINY, "--config.modes=linear")
    assert path.name in line
    assert not (home / "runs").exists()


def test_rows_without_their_experts(home, expert, capsys):
    shutil.copytree(expert, home / "cache")
    line = refusal(capsys, "run", TINY, "--config.modes=linear")
    assert "wants 'standard' experts; modes has linear" in line


def test_json_is_printed_whole_or_not_at_all(capsys):
    assert cli.main(["list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 82
