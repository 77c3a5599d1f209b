"""What the documents show works as they show it."""

import doctest
import pathlib
import re
import subprocess

import pytest

from mtl_jax import catalog, cli_checkpoints

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments/launch/README.md",
]
COMMANDS = (
    *("run", "list", "show", "report", "preflight", "generate"),
    *cli_checkpoints.COMMANDS,
)


def test_readme_examples_run():
    found = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert found.attempted >= 6 and found.failed == 0


@pytest.mark.fast
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target
    for command in re.findall(r"mtl-jax (\w+)", text):
        assert command in COMMANDS
    working = {e.config for e in catalog.select(status="working")}
    for config in re.findall(r"experiments/configs/\w+\.py", text):
        assert config in working or not working


@pytest.mark.fast
@pytest.mark.parametrize("script", ["experiments/launch/tpu.sh", ".ci/run"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["run", "x.py"], {"TPU": "t", "ZONE": "z"}, "wants --workdir gs://"),
        ([], {"TPU": "t", "ZONE": "z"}, "usage"),
        (["run", "x.py", "--workdir", "gs://b"], {"ZONE": "z"}, "name of the TPU"),
    ],
)
def test_launcher_refuses(arguments, variables, message):
    script = str(ROOT / "experiments/launch/tpu.sh")
    done = subprocess.run(
        ["bash", script, *arguments],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and message in done.stderr
