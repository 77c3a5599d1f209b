import json
import math

import pytest

from mtl_jax import report
from mtl_jax.checkpoints import _diff_report as R
from mtl_jax.checkpoints.diff import Comparison, Diff, TensorDiff

pytestmark = pytest.mark.fast


def tensor(name, **sums):
    return TensorDiff(
        name=name,
        shape=(2,),
        dtypes=("float32", "bfloat16"),
        sums=Comparison(**{"size": 2, "aa": 4.0, "bb": 4.0, **sums}),
    )


@pytest.fixture
def found():
    """Two layers of two modules, a head; the worst is not the first."""
    moved = {"xx": 4.0, "yy": 4.0}
    return Diff(
        tensors=(
            tensor("head.weight", **moved, xy=4.0, same=2),
            tensor("h.0.up.weight", dd=1.0, **moved, xy=2.0, changed=1, largest=1.0),
            tensor("h.1.up.weight", dd=4.0, **moved, xy=-4.0, opposite=2, changed=2),
            tensor("h.0.down.weight", dd=0.25, **moved, xy=3.0, same=1, changed=1),
            tensor("h.1.down.weight", aa=0.0, dd=4.0, yy=4.0, changed=2),
        ),
        only_a=tuple(f"old.{i}" for i in range(10)),
        only_b=("new",),
        reshaped={"embed": ((5, 2), (6, 2))},
    )


@pytest.mark.parametrize(
    ("column", "first", "last"),
    [
        ("relative", "h.1.down.weight", "head.weight"),
        ("cosine", "h.1.up.weight", "h.1.down.weight"),  # No cosine: last.
        ("signs", "h.1.up.weight", "h.1.down.weight"),
        ("max", "h.0.up.weight", "h.1.down.weight"),
        ("name", "h.0.down.weight", "head.weight"),
    ],
)
def test_ranked_puts_first_what_deserves_a_look(found, column, first, last):
    names = [each.name for each in R.ranked(found, column)]
    assert (names[0], names[-1]) == (first, last)
    assert sorted(names) == sorted(each.name for each in found.tensors)


def test_unknown_column_is_refused(found):
    with pytest.raises(ValueError, match="no column 'norm' to sort by; there are name"):
        R.ranked(found, "norm")


def test_table_has_the_worst_and_a_total(found):
    table = R.table(found, limit=2)
    assert [row[0] for row in table.rows] == ["h.1.down.weight", "h.1.up.weight", "all"]
    assert "the first 2 of 5" in table.title
    total = dict(zip(table.columns, table.rows[-1], strict=True))
    assert total["entries"] == 10 and total["|B-A|"] == pytest.approx(math.sqrt(9.25))
    assert total["|B-A| / |A|"] == pytest.approx(math.sqrt(9.25 / 16))
    assert "|A-base|" not in table.columns and "NaN, inf in A" not in table.columns
    assert "the first" not in R.table(found).title


def test_columns_appear_where_they_say_something(found):
    broken = Diff(
        tensors=(tensor("x", nan_a=1),),
        only_a=(),
        only_b=(),
        reshaped={},
        with_base=True,
    )
    columns = R.table(broken).columns
    assert {"NaN, inf in A", "|A-base|", "|B-base|"} <= set(columns)
    assert "NaN, inf in B" not in columns
    assert any("1 entries of A" in line for line in R.summary(broken))


def test_summary_lists_what_cannot_be_compared(found):
    text = "\n".join(R.summary(found, ("one", "two")))
    assert "5 tensors compared, 1 of them equal" in text
    assert "Only in one: old.0, " in text and "old.7, and 2 more" in text
    assert "Only in two: new." in text and "embed (5, 2) and (6, 2)" in text


def test_json_has_every_tensor_and_group(found):
    data = json.loads(json.dumps(R.to_json(found), allow_nan=False))
    assert list(data["tensors"]) == [each.name for each in found.tensors]
    row = data["tensors"]["h.1.down.weight"]
    assert row["relative"] == "inf" and row["cosine"] is None
    assert row["dtypes"] == ["float32", "bfloat16"] and row["changed"] == 1
    assert set(data["kinds"]) == {"head.weight", "h.*.up.weight", "h.*.down.weight"}
    assert data["kinds"]["h.*.up.weight"]["norm_diff"] == pytest.approx(math.sqrt(5))
    assert list(data["layers"]) == ["h.0", "h.1"]
    assert data["reshaped"] == {"embed": [[5, 2], [6, 2]]}
    assert "change_a" not in row


def test_report_has_figures_and_all_tensors(found, tmp_path):
    page = R.to_report(found, a="one", b="two", base="three")
    figures = {
        s["title"]: report.plots.figure_from_json(s["figure"])
        for s in page.to_json()["sections"]
        if s["kind"] == "figure"
    }
    heat = figures["Layers of h"]
    assert heat.rows == ["0", "1"] and heat.columns == ["up", "down"]
    assert heat.values[0] == [0.5, 0.25] and heat.values[1][0] == 1
    assert math.isnan(heat.values[1][1])  # Infinite.
    counts = figures["Cosines of tensors"].series["tensors"]
    assert sum(counts) == 4 and counts[0] == 1 and counts[-1] == 1
    assert figures["Relative change by kind of module"].labels[-1] == "head.weight"
    titles = [table.title for table in page.tables]
    assert titles[:2] == ["Kinds of modules", "Layers"]
    assert len(page.tables[2].rows) == 6
    html = page.write(tmp_path).read_text()
    assert "one" in html and "three" in html and html.count("<svg") == 3


def test_report_of_nothing_in_common(tmp_path):
    nothing = Diff(tensors=(), only_a=("x",), only_b=("y",), reshaped={})
    page = R.to_report(nothing, a="one", b="two")
    assert "Only in A: x." in page.write(tmp_path).read_text()


def test_cosines_near_one_get_fine_bins():
    figure = R._histogram([0.97, 0.98, 1.0])
    assert figure.edges[0] == pytest.approx(0.9) and figure.edges[-1] == 1
    assert sum(figure.series["tensors"]) == 3
