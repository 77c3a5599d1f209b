import html.parser
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from mtl_jax.report import Table, format_bytes

pytestmark = pytest.mark.fast


def make(**changes):
    fields = {
        "title": "Accuracy",
        "columns": ("method", "acc", "bytes", "ok"),
        "rows": (
            ("sum", 0.25, 2048, True),
            ("ties | x", np.float32(0.75), np.int64(3 * 2**20), False),
            ("nan", float("nan"), None, None),
        ),
        "formats": {"acc": ".1%", "bytes": "bytes"},
        "best": {"acc": "max", "bytes": "min"},
    }
    return Table(**{**fields, **changes})


def test_text_of_cells():
    texts = [[cell["text"] for cell in row] for row in make().cells()]
    assert texts == [
        ["sum", "25.0%", "2.0 KiB", "yes"],
        ["ties | x", "75.0%", "3.0 MiB", "no"],
        ["nan", "nan", "–", "–"],
    ]


def test_best_ignores_nan_and_none():
    best = [[cell["best"] for cell in row] for row in make().cells()]
    assert best == [
        [False, False, True, False],
        [False, True, False, False],
        [False] * 4,
    ]


def test_markdown_escapes_pipes():
    lines = make(caption="c").to_markdown().splitlines()
    assert lines[2:4] == ["| method | acc | bytes | ok |", "|:---|---:|---:|:---|"]
    assert lines[5] == "| ties \\| x | **75.0%** | 3.0 MiB | no |"
    assert lines[-1] == "c"


class Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.tags = [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_html_escapes_everything():
    evil = "<script>&\"'"
    parser = Cells()
    parser.feed(
        make(columns=(evil, "b"), rows=((evil, 1),), formats={}, best={}).to_html()
    )
    assert "script" not in parser.tags
    assert parser.texts == [evil, "b", evil, "1"]


def test_rich_shows_every_cell_and_no_markup():
    stream = io.StringIO()
    table = make(rows=(("[red]x[/red]", 0.5, 1, None),))
    rich.console.Console(file=stream, width=120).print(table.to_rich())
    assert "[red]x[/red]" in stream.getvalue() and "50.0%" in stream.getvalue()


def test_json_round_trip():
    table = make()
    text = json.dumps(table.to_json(), allow_nan=False)
    again = Table.from_json(json.loads(text))
    assert again.cells() == table.cells()
    assert again.to_html() == table.to_html()


def test_accepts_scalars_of_arrays():
    (row,) = Table(
        title="", columns=("a", "b"), rows=((jnp.float32(0.5), np.bool_(True)),)
    ).rows
    assert row == (0.5, True) and [type(cell) for cell in row] == [float, bool]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ((1, 2),)}, "row 0 wants 4 cells, found 2"),
        ({"formats": {"acd": ".1f"}}, "no column 'acd'"),
        ({"best": {"acc": "top"}}, "must be 'max' or 'min'"),
        ({"rows": (("a", [1], 2, 3),)}, "found list"),
        ({"rows": (("a", np.zeros(2), 2, 3),)}, "found ndarray"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**30, "1.0 GiB"), (5 * 2**40, "5.0 TiB")],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text
