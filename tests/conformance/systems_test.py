"""Every working system, by table: builds, runs at :tiny, repeats from the cache."""

import importlib
import json
import pathlib

import pytest

from mtl_jax import catalog, configs, run

ROOT = pathlib.Path(__file__).parents[2]
WORKING = [entry for entry in catalog.entries() if entry.status == "working"]
IDS = [entry.name for entry in WORKING]


@pytest.mark.fast
@pytest.mark.parametrize("entry", WORKING, ids=IDS)
def test_every_variant_builds(entry):
    path = ROOT / entry.config
    names = configs.variants(path)
    assert {"tiny", "demo", "paper"} <= set(names)
    for name in names:
        config = configs.load_config(f"{path}:{name}", {})
        assert config.system == entry.name
        system = importlib.import_module(entry.module).build(config)
        assert len(system.rows) >= 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Nothing made by an earlier run of the suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("entry", WORKING, ids=IDS)
def test_tiny_runs_and_repeats(entry, tmp_path, quiet):
    config = configs.load_config(f"{ROOT / entry.config}:tiny", {})
    first = run.run(config, workdir=tmp_path, progress=quiet)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    titles = [table.title for table in first.tables]
    kind = config.get("study_kind", entry.spec.kind)
    first_title = "Test accuracy" if kind == "posthoc" else "Test metrics"
    assert titles[0] == first_title
    assert "What the papers claim, and what was measured here" in titles
    assert results["config"]["system"] == entry.name
    accuracy = first.tables[0]
    second = run.run(config, workdir=tmp_path, progress=quiet)
    assert second.tables[0].rows == accuracy.rows
