import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mtl_jax import report, tree, zoo
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


def test_scales_and_knobs_are_chosen_on_validation_rows_only(study, monkeypatch):
    """An evaluator whose validation and test rows want different settings."""
    asked = []

    def accuracy(trained, task, split, *, linear=False, digest=None):
        del linear, digest
        asked.append(split)
        size = float(jax.tree.leaves(trained)[0].mean())
        best = {"validation": 0.5, "test": 1.0}[split]
        return 0.9 - abs(size - best) / 10

    monkeypatch.setattr(study.evaluator, "accuracy", accuracy)
    monkeypatch.setattr(study, "move", lambda delta, scale=1.0: {"w": delta * scale})
    shared = zoo.SharedModel(
        name="shared", delta=lambda taus, chosen: jnp.ones(1), scales=(0.25, 0.5, 1.0)
    )
    knobs = zoo.TaskModels(
        name="knobs",
        prepare=lambda taus, chosen: None,
        delta=lambda state, task, knob: jnp.full(1, knob),
        knobs=(1.0, 0.5),
    )
    study.run(zoo.PostHoc(rows=(shared, knobs)))
    assert study.results["shared"].chosen == (0.5,)
    assert study.results["knobs"].chosen == (0.5, 0.5, 0.5)
    np.testing.assert_allclose(study.results["shared"].accuracy, 0.85)
    assert set(asked) == {"validation", "test"}


def test_the_tested_model_is_the_chosen_one(study):
    row = zoo.SharedModel(
        name="sum",
        delta=lambda taus, chosen: merging.task_arithmetic(taus),
        scales=(0.1, 0.5, 1.0, 4.0),
    )
    study.run(zoo.PostHoc(rows=(row,)))
    found = study.results["sum"]
    assert found.grid == (0.0, 0.1, 0.5, 1.0, 4.0)
    model = study.move(row.delta(study.taus["standard"], {}), found.chosen[0])
    np.testing.assert_allclose(found.accuracy, study.measure(model, "test"))


def test_tangent_rows_are_measured_against_tangent_experts(study):
    row = zoo.individual("post-hoc", linear=True)
    study.run(zoo.PostHoc(rows=(zoo.individual(), row)))
    np.testing.assert_allclose(study.results["post-hoc"].normalised, 1.0)
    plain, tangent = study.results["fine-tuned"].bits, study.results["post-hoc"].bits
    assert tangent == plain + 32 * tree.size(study.zoo.base)


def test_rows_see_what_was_chosen_before(study):
    seen = {}

    def delta(taus, chosen):
        seen.update(chosen)
        return merging.average(taus)

    per_task = zoo.TaskModels(
        name="knobs",
        prepare=lambda taus, chosen: taus,
        delta=lambda taus, task, knob: merging.task_arithmetic(
            jax.tree.map(lambda x: x[task : task + 1], taus), weights=np.array([knob])
        ),
        knobs=(0.0, 1.0),
    )
    rows = (per_task, zoo.SharedModel(name="after", delta=delta))
    study.run(zoo.PostHoc(rows=rows))
    assert len(seen["knobs"]) == 3 and set(seen["knobs"]) <= {0.0, 1.0}


def test_cosines_are_those_of_whole_vectors(study):
    taus = study.taus["standard"]
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


def test_rows_of_experts_that_were_not_trained(study):
    row = zoo.individual("absent", experts="linear")
    study.taus.pop("linear", None)
    with pytest.raises(ValueError, match="row 'absent' wants 'linear' experts"):
        study.run(zoo.PostHoc(rows=(row,)))
    assert not study.results


def test_learned_rows_are_measured_as_what_they_are(study):
    """A whole delta, one per task, and features: the same experts three ways."""
    seen = []

    def whole(taus, chosen, material):
        seen.append((set(chosen), material.count))
        return zoo.Fit(delta=merging.average(taus), details={"steps": 7})

    def each(taus, chosen, material):
        return zoo.Fit(task_delta=lambda task: zoo.task_delta(taus, task))

    def used(taus, chosen, material):
        def features(params, inputs, task):
            delta = jax.tree.map(lambda x: x[task], params["taus"])
            trained = tree.add_scaled(params["base"], delta)
            return material.features(trained, inputs, material.args)

        params = {"taus": taus, "base": material.zoo.base}
        return zoo.Fit(features=features, params=params)

    rows = (
        zoo.individual(),
        zoo.SharedModel(name="average", delta=lambda taus, _: merging.average(taus)),
        zoo.LearnedModel(name="whole", fit=whole),
        zoo.LearnedModel(name="each", fit=each),
        zoo.LearnedModel(name="used", fit=used),
        zoo.LearnedModel(name="tuned", fit=whole, scales=(0.5, 3.0)),
    )
    study.run(zoo.PostHoc(rows=rows))
    found = study.results
    np.testing.assert_array_equal(found["whole"].accuracy, found["average"].accuracy)
    np.testing.assert_array_equal(found["each"].accuracy, found["fine-tuned"].accuracy)
    np.testing.assert_array_equal(found["used"].accuracy, found["fine-tuned"].accuracy)
    base, frozen = tree.size(study.zoo.base), tree.size(study.zoo.frozen)
    assert found["used"].bits == 32 * (4 * base + frozen)  # What features take.
    assert found["whole"].bits == 32 * (base + frozen)
    assert found["whole"].details == {"steps": 7} and not found["average"].details
    assert found["tuned"].grid == (0.0, 0.5, 3.0)
    assert seen[0] == ({"fine-tuned", "average"}, 3)


def test_learned_rows_get_labels_only_where_they_say_so(study):
    def fit(taus, chosen, material):
        material.labelled("train", 0)
        return zoo.Fit(delta=merging.average(taus))

    study.run(zoo.PostHoc(rows=(zoo.LearnedModel(name="a", fit=fit, labels=True),)))
    with pytest.raises(ValueError, match="labels=False"):
        study.run(zoo.PostHoc(rows=(zoo.LearnedModel(name="b", fit=fit),)))


def test_a_grid_of_scales_wants_one_delta(study):
    row = zoo.LearnedModel(
        name="each",
        fit=lambda taus, chosen, material: zoo.Fit(
            task_delta=lambda task: zoo.task_delta(taus, task)
        ),
        scales=(0.5, 1.0),
    )
    with pytest.raises(ValueError, match="'each' has a grid of scales"):
        study.run(zoo.PostHoc(rows=(row,)))
