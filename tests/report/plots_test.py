import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mtl_jax.report import plots

LABELS = ["trec", "sst2", "<b>&"]
FIGURES = {
    "bars": plots.Bars(
        labels=LABELS,
        series={f"m{i}": [0.1 * i, 0.5, float("nan")] for i in range(10)},
        errors={f"m{i}": [0.01, 0.02, 0.0] for i in range(10)},
        lines={"chance": 0.5},
        y_range=(0, 1),
    ),
    "lines": plots.Lines(
        x=[0.1, 1.0, 10.0],
        series={"$a_b": np.array([1.0, 3.0, 2.0]), "c": [1.0, 2.0, 4.0]},
        bands={"c": [0.1, 0.1, 0.1]},
        chosen={"$a_b": 1.0},
        log_x=True,
        log_y=True,
    ),
    "heatmap": plots.Heatmap(
        rows=LABELS, columns=LABELS[:2], values=[[1, -0.5], [0, 1], [float("nan"), 0.2]]
    ),
    "constant": plots.Heatmap(rows=["a"], columns=["b"], values=[[1.0]]),
    "histogram": plots.Histogram(edges=[0, 1, 2], series={"a": [5, 1], "b": [1, 2]}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_well_formed_and_reproducible(name):
    svg = plots.render(FIGURES[name], title="A <title>", salt="one")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert b"currentColor" in svg and b"#010203" not in svg
    assert "A <title>" in "".join(root.itertext())
    assert plots.render(FIGURES[name], title="A <title>", salt="one") == svg


def test_salt_separates_identifiers():
    def referenced(salt):
        root = ElementTree.fromstring(plots.render(FIGURES["lines"], salt=salt))
        return {node.get("id") for node in root.iter() if node.tag.endswith("clipPath")}

    assert referenced("one") and not referenced("one") & referenced("two")


def test_png():
    assert plots.render(FIGURES["lines"], format="png").startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FIGURES)
def test_json_round_trip_draws_the_same(name):
    text = json.dumps(plots.figure_to_json(FIGURES[name]), allow_nan=False)
    again = plots.figure_from_json(json.loads(text))
    assert plots.render(again, salt="s") == plots.render(FIGURES[name], salt="s")


def test_labels_are_drawn():
    text = "".join(ElementTree.fromstring(plots.render(FIGURES["bars"])).itertext())
    assert all(label in text for label in LABELS) and "chance" in text
    assert all(name in text for name in FIGURES["bars"].series)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plots.Bars(labels=["a"], series={}), "at least one series"),
        (lambda: plots.Bars(labels=["a"], series={"x": [1, 2]}), "2 values, wanted 1"),
        (
            lambda: plots.Lines(x=[1.0], series={"a": [1]}, chosen={"a": 2.0}),
            r"chosen\['a'\] = 2.0 must name",
        ),
        (
            lambda: plots.Heatmap(rows=["a"], columns=["b"], values=[[1, 2]]),
            "must be 1 rows of 1 numbers",
        ),
        (
            lambda: plots.Histogram(edges=[0, 1], series={"a": [1, 2]}),
            "wanted 1 as in edges - 1",
        ),
        (lambda: plots.render(FIGURES["lines"], format="pdf"), "'svg' or 'png'"),
        (lambda: plots.figure_from_json({"type": "pie"}), "found 'pie'"),
        (lambda: plots.figure_from_json({"type": "bars", "x": 1}), "bars: "),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
