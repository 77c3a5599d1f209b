import numpy as np
import pytest
from ml_collections import ConfigDict

from mtl_jax import report, zoo
from mtl_jax.run import study as study_lib
from mtl_jax.transforms import merging


@pytest.fixture
def study(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    return study_lib.Study(
        tiny_zoo, evaluator, ConfigDict(), report.Report("a study"), quiet
    )


def test_experts_are_their_own_reference(study):
    study.run(zoo.PostHoc(rows=(zoo.individual(),)))
    found = study.results["fine-tuned"]
    np.testing.assert_allclose(found.normalised, 1.0)
    assert found.chosen == (1.0, 1.0, 1.0)


def test_the_scale_is_the_best_on_validation_rows(study):
    row = zoo.SharedModel(
        name="sum",
        delta=lambda taus, chosen: merging.task_arithmetic(taus),
        scales=(0.1, 0.5, 1.0, 4.0),
    )
    study.run(zoo.PostHoc(rows=(row,)))
    found = study.results["sum"]
    assert found.grid == (0.0, 0.1, 0.5, 1.0, 4.0)
    assert found.curve[found.grid.index(found.chosen[0])] == max(found.curve)
    model = study.move(row.delta(study.taus["standard"], {}), found.chosen[0])
    np.testing.assert_allclose(found.accuracy, study.measure(model, "test"))


def test_rows_see_what_was_chosen_before(study):
    seen = {}

    def delta(taus, chosen):
        seen.update(chosen)
        return merging.average(taus)

    per_task = zoo.TaskModels(
        name="knobs",
        prepare=lambda taus, chosen: taus,
        delta=lambda taus, task, knob: merging.task_arithmetic(
            zoo.task_delta(taus, slice(task, task + 1)), weights=np.array([knob])
        ),
        knobs=(0.0, 1.0),
    )
    rows = (per_task, zoo.SharedModel(name="after", delta=delta))
    study.run(zoo.PostHoc(rows=rows))
    assert len(seen["knobs"]) == 3 and set(seen["knobs"]) <= {0.0, 1.0}


def test_cosines_are_those_of_whole_vectors(study):
    taus = study.taus["standard"]
    import jax

    flat = np.concatenate(
        [np.asarray(x, np.float64).reshape(3, -1) for x in jax.tree.leaves(taus)], 1
    )
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(study_lib.cosine_matrix(taus), flat @ flat.T, atol=1e-5)


def test_report_shows_results_and_claims(study, tmp_path, capsys):
    study.run(zoo.PostHoc(rows=(zoo.zero_shot(), zoo.individual())))
    study.claim("water is dry", "it is not", holds=False)
    study_lib.write(study, tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "zero-shot" in page and "water is dry" in page
    assert "fine-tuned" in capsys.readouterr().out
