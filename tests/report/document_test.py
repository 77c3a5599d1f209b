import html.parser
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from mtl_jax import report

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def made():
    found = report.Report(
        f"Title {EVIL}",
        f"First.\n\nSecond {EVIL}",
        config={"lr": float("inf"), "name": EVIL, "path": pathlib.Path("x")},
        environment={"jax": EVIL},
    )
    found.add_text(EVIL, title=EVIL)
    found.add_table(
        report.Table(title=EVIL, columns=(EVIL,), rows=((EVIL,), (0.5,)), caption=EVIL)
    )
    lines = report.Lines(x=[0, 1], series={EVIL: [1, 2]}, x_label=EVIL)
    found.add_figure(EVIL, lines, caption=EVIL)
    found.add_figure("png", report.render(lines, format="png"))
    return found


class Page(html.parser.HTMLParser):
    void = {"meta", "img", "link", "br", "hr"}

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)


def test_page_is_whole_safe_and_alone(made, tmp_path):
    page = made.write(tmp_path / "report")
    parser = Page()
    parser.feed(page.read_text())
    assert parser.open == []
    assert "script" not in parser.tags and "link" not in parser.tags
    assert {"table", "svg", "img", "nav"} <= set(parser.tags)
    assert all(s.startswith(("#", "data:image/png;base64,")) for s in parser.sources)
    anchors = {s[1:] for s in parser.sources if re.fullmatch(r"#\d+-section", s)}
    assert anchors and all(f'id="{name}"' in page.read_text() for name in anchors)


def test_json_draws_the_same_page(made, tmp_path):
    page = made.write(tmp_path)
    before = page.read_text()
    again = report.read_report(tmp_path)
    assert again.to_json() == json.loads((tmp_path / "results.json").read_text())
    assert again.write(tmp_path / "other").read_text() == before


def test_found_below_the_workdir(made, tmp_path):
    made.write(tmp_path / "report")
    assert report.read_report(tmp_path).title == made.title


def test_failed_write_keeps_the_old_files(made, tmp_path):
    page = made.write(tmp_path)
    before = page.read_text()
    made.sections.append({"kind": "figure", "title": "x", "figure": {"type": "pie"}})
    with pytest.raises(ValueError, match="pie"):
        made.write(tmp_path)
    assert page.read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "results.json"}


def test_unwritable_directory(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        made.write(tmp_path / "file" / "report")


def test_config_may_be_a_config_dict():
    config = ConfigDict({"a": {"b": 1, "c": (1, float("nan"))}})
    found = report.Report("t", config=config, environment={})
    assert found.to_json()["config"] == {"a": {"b": 1, "c": [1, "nan"]}}


def test_print_shows_the_tables(made, capsys):
    made.print()
    assert EVIL in capsys.readouterr().out
    assert [table.title for table in made.tables] == [EVIL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "wants a mapping with schema 1"),
        ({"sections": [{"kind": "film"}]}, "section 0 has kind 'film'"),
        ({"sections": [{}]}, "no field 'kind'"),
        ({"sections": [{"kind": "table", "table": {}}]}, "no field"),
    ],
)
def test_refuses_other_data(made, change, message):
    with pytest.raises(ValueError, match=message):
        report.Report.from_json({**made.to_json(), **change})


def test_refuses_bytes_that_are_no_png(made):
    with pytest.raises(ValueError, match="PNG bytes"):
        made.add_figure("x", b"GIF89a")


def test_environment_names_no_machine():
    import platform

    found = report.environment()
    assert set(found) == {"mtl_jax", "jax", "python", "machine", "devices", "time"}
    assert platform.node() not in " ".join(found.values())
    assert found["devices"].startswith("8 x")
