import json

import pytest

from mtl_jax import configs, report, run

CONFIG = "experiments/configs/lm_demo.py"


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(quiet, tmp_path):
    pytest.importorskip("grain")
    config = configs.load_config(f"{CONFIG}:tiny", {})
    first = run.run(config, workdir=tmp_path, progress=quiet)
    table, claims, *_ = first.tables
    assert table.columns[:3] == ("adapter", "counting", "letters")
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["before", "counting", "letters", "all adapters, averaged"]
    before, after = (float(rows[n][0].split()[0]) for n in ("before", "counting"))
    assert after < 0.97 * before
    assert len(claims.rows) == 5
    adapters = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert len(adapters) == 4
    saved = json.loads((tmp_path / "report" / "results.json").read_text())
    assert saved["title"] == config.title
    # A second run trains nothing: it reads adapters, times and curves back.
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "adapters").iterdir()}
    second = run.run(config, workdir=tmp_path, progress=quiet)
    *same, samples = first.tables
    *again, sampled = second.tables
    assert again == same and sampled.rows == samples.rows
    assert all("tokens a second" in table.caption for table in (samples, sampled))
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert report.read_report(tmp_path).tables == second.tables


@pytest.mark.fast
def test_names_are_looked_up(quiet, tmp_path):
    for key, value, message in (
        ("experiment", "vision", "experiment 'vision' does not exist; known: language"),
        ("model.name", "gpt5", "model 'gpt5' does not exist; known: random, smollm2"),
        ("domains", "letters", "domains: wants two or more"),
    ):
        config = configs.load_config(f"{CONFIG}:tiny", {key: value})
        with pytest.raises(ValueError, match=message):
            run.run(config, workdir=tmp_path, progress=quiet)
