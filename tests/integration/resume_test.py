"""A run that is killed and started again ends like one that was not, bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).with_name("resumable_run.py")
ROOT = SCRIPT.parents[2]


def start(workdir, *arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(workdir), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )


def finish(process, go_on=""):
    out, err = process.communicate(go_on, timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    code, out, err = finish(start(tmp_path_factory.mktemp("whole")))
    assert code == 0, err
    assert out.startswith("done ")
    return out


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_killed_and_resumed(tmp_path, uninterrupted, number, expected):
    process = start(tmp_path, "12")
    assert process.stdout.readline() == "at 12\n"
    process.send_signal(number)
    code, out, err = finish(process, "\n")
    assert code == expected, err
    assert "done" not in out and "Traceback" not in err
    steps = sorted(
        int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()
    )
    if number != signal.SIGKILL:
        name = signal.Signals(number).name
        said = f"{name}: saved after step {steps[-1]}; the same command resumes"
        assert [line for line in err.splitlines() if "saved" in line] == [said]
        assert 12 <= steps[-1] < 20
    code, out, err = finish(start(tmp_path))
    assert code == 0, err
    assert out == uninterrupted
