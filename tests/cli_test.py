import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

from mtl_jax import catalog, cli, configs, host, report

pytestmark = pytest.mark.fast

CONFIG = """
from ml_collections import ConfigDict
VARIANTS = ("demo",)
def get_config(variant):
    return ConfigDict({"seed": 0})
"""


class Preflight:
    passed = False

    def to_text(self):
        return "does not fit\n"


@pytest.fixture
def runner(monkeypatch):
    """Stands for `mtl_jax.run`; records what it was called with."""
    module = types.ModuleType("mtl_jax.run")
    module.calls = []

    def run(config, *, workdir, progress):
        module.calls.append((config, workdir))
        progress(1, 1, {})

    def preflight(config, *, topology, mesh=None, method=None):
        module.calls.append((config, topology, mesh, method))
        return Preflight()

    module.run, module.preflight = run, preflight
    monkeypatch.setitem(sys.modules, "mtl_jax.run", module)
    monkeypatch.setattr("mtl_jax.run", module, raising=False)
    return module


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


def one_line(captured):
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_list_formats(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(entry.name in out for entry in catalog.entries())
    assert cli.main(["list", "--family", "merging", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [
        e.name for e in catalog.select(family="merging")
    ]
    assert cli.main(["list", "--uses", "no.such"]) == 0
    assert "no system" in capsys.readouterr().out


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda e: e.name)
def test_show(capsys, entry):
    assert cli.main(["show", entry.name]) == 0
    out = capsys.readouterr().out
    assert entry.spec.reference.strip() in out and entry.status in out
    assert ("mtl-jax run" in out) == (entry.status == "working")


def test_run_passes_config_and_default_workdir(config, runner, capsys):
    assert cli.main(["run", config, "--config.seed=3"]) == 0
    ((found, workdir),) = runner.calls
    assert found.seed == 3 and workdir == "runs/small-demo"
    assert pathlib.Path(workdir).is_dir()


def test_only_run_keeps_compiled_programs(config, runner, monkeypatch):
    calls = []
    monkeypatch.setattr(host, "keep_compiled_programs", lambda: calls.append(1))
    cli.main(["preflight", config, "--topology", "v5e:1x1"])
    assert calls == []
    cli.main(["run", config])
    assert calls == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "tall-mask"], "tall-masks"),
        (["list", "--family", "mergin"], "must be one of"),
        (["list", "--nonsense"], "unknown argument '--nonsense'"),
        (["run", "nowhere.py:demo"], "no such file"),
        (["run", "small.py:dmo"], "no variant 'dmo'; it has demo"),
        (["run", "small.py", "--config.sed=1"], "near it: seed"),
        (["run", "small.py", "--config.seed"], "with an equals sign"),
        (["run", "small.py", "--workdir", "small.py/x"], "cannot write there"),
        (["report", "nowhere"], "no directory nowhere"),
        (["report", "."], "no results.json"),
        (["preflight", "small.py", "--topology", "v5e:1x1", "--mesh", "a"], "AXIS=N"),
    ],
)
def test_user_error_is_one_line(config, runner, capsys, arguments, message):
    before = sorted(pathlib.Path.cwd().iterdir())
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in one_line(captured) and captured.out == ""
    assert f" {arguments[0]}: {arguments[0]}: " not in captured.err
    assert "Traceback" not in captured.err
    assert runner.calls == []
    assert sorted(pathlib.Path.cwd().iterdir()) == before


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["preflight", "x.py"]])
def test_wrong_command_line_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert one_line(capsys.readouterr()).startswith("mtl-jax")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("ties: density\nmust be in (0, 1]"), 2, "ties: density must be"),
        (ConnectionError("could not fetch x"), 2, "could not fetch x"),
        (
            ModuleNotFoundError("No module named 'grain'", name="grain"),
            2,
            "pip install 'mtl_jax[demo]'",
        ),
        (
            ModuleNotFoundError("No module named 'libtpu'", name="libtpu"),
            2,
            "pip install 'mtl_jax[tpu]'",
        ),
        (
            ModuleNotFoundError("No module named 'rich.console'", name="rich.console"),
            2,
            "this needs the package rich; ",
        ),
        (TypeError("bug"), 1, "internal error: TypeError: bug (see --debug)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_leaves_nothing(
    config, runner, capsys, monkeypatch, error, code, message
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(runner, "run", fail)
    assert cli.main(["run", config, "--workdir", "deep/er"]) == code
    assert message in one_line(capsys.readouterr())
    assert not pathlib.Path("deep").exists()


def test_failure_keeps_what_was_written(config, runner, monkeypatch, capsys):
    def fail(config, *, workdir, progress):
        (pathlib.Path(workdir) / "checkpoint").write_text("x")
        raise ValueError("stopped")

    monkeypatch.setattr(runner, "run", fail)
    assert cli.main(["run", config, "--workdir", "w"]) == 2
    assert pathlib.Path("w/checkpoint").exists()


def test_debug_shows_the_traceback(config, runner, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("inside")

    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(ValueError, match="inside"):
        cli.main(["run", config, "--debug"])


def test_preflight_exit_code_says_whether_it_fits(config, runner, capsys):
    command = ["preflight", config, "--topology", "v5e:1x1"]
    assert cli.main([*command, "--mesh", "data=-1,model=2"]) == 1
    assert capsys.readouterr().out == "does not fit\n"
    assert runner.calls[0][1:] == ("v5e:1x1", {"data": -1, "model": 2}, None)
    cli.main([*command, "--method", "PCGrad"])
    assert runner.calls[1][1:] == ("v5e:1x1", None, "PCGrad")


def test_report_redraws_the_page(tmp_path, capsys):
    made = report.Report("Title", environment={})
    made.add_table(report.Table(title="T", columns=("a",), rows=((1,),)))
    page = made.write(tmp_path / "report")
    page.unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(page) in out and page.exists() and "T" in out


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 9}'])
def test_report_of_a_damaged_file(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    assert cli.main(["report", str(tmp_path)]) == 2
    one_line(capsys.readouterr())
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("command", ["run", "preflight"])
def test_every_override_that_help_shows_exists(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"--config\.([a-z_.]+)=(\S+)", text)
    assert shown
    tiny = pathlib.Path(__file__).parents[1] / "experiments/configs/tall_masks.py"
    loaded = configs.load_config(f"{tiny}:tiny", dict(shown))
    for key, value in shown:
        node = loaded
        for part in key.split("."):
            node = node[part]
        assert node == float(value)


@pytest.mark.parametrize(
    "command", ["run", "generate", "list", "show", "report", "preflight"]
)
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"mtl-jax {command}" in capsys.readouterr().out.split("examples:")[1]


def test_runs_as_a_module():
    command = [sys.executable, "-m", "mtl_jax", "show", "ties"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mtl-jax show: ")
