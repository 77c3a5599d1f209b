"""Two processes of two devices train like one process of four."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).with_name("process_run.py")
ROOT = SCRIPT.parents[2]


def run(count, folder):
    """Runs `count` processes to the end and returns what each of them wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(i), str(count), str(port), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for i in range(count)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
    return [dict(np.load(folder / f"{i}.npz")) for i in range(count)]


def test_two_processes_equal_one(tmp_path):
    (one,) = run(1, tmp_path / "one")
    first, second = run(2, tmp_path / "two")
    assert set(one) == set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
        np.testing.assert_allclose(value, one[name], atol=1e-6, err_msg=name)
    for leaf in ("w", "v"):
        np.testing.assert_array_equal(
            first[f"straight/{leaf}"], first[f"resumed/{leaf}"]
        )
