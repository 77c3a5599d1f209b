"""A report as data: tables, figures and text that outlive the run that made them.

`results.json` holds everything shown:

    {"schema": 1, "title": str, "intro": str,
     "sections": [
       {"kind": "text", "title": str, "text": str},
       {"kind": "table", "table": Table.to_json()},
       {"kind": "figure", "title": str, "caption": str,
        "figure": figure_to_json(figure)},             # or "png": base64
     ],
     "config": {...}, "environment": {str: str}}

so `index.html` can be drawn again, in a later style, without running anything.
"""

import base64
import json
import math
from collections.abc import Mapping
from typing import IO, Any

from etils import epath

from mtl_jax.report.environment import environment as current_environment
from mtl_jax.report.plots import Figure, figure_from_json, figure_to_json
from mtl_jax.report.table import Table

__all__ = ["Report", "read_report"]

_SCHEMA = 1


def _plain(value: Any) -> Any:
    """What JSON can hold; other objects as text, non-finite floats too."""
    if hasattr(value, "to_dict"):  # A ConfigDict is not a Mapping.
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _write_atomically(path: epath.Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.partial"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Report:
    """Collects sections, then writes `results.json` and `index.html`.

    >>> report = Report("Merging two experts", "A small example.")
    >>> report.add_table(Table(title="Accuracy", columns=("task", "sum"),
    ...                        rows=(("trec", 0.91),)))
    >>> [section["kind"] for section in report.to_json()["sections"]]
    ['table']
    """

    def __init__(
        self,
        title: str,
        intro: str = "",
        *,
        config: Mapping[str, Any] | Any = None,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts an empty report.

        Args:
          title: heading of the page.
          intro: paragraphs below it, separated by blank lines.
          config: the resolved configuration of the run (a mapping or a ConfigDict),
            shown at the end.
          environment: what it was measured on; None records the present one.
        """
        self.title = title
        self.intro = intro
        self.config = {} if config is None else _plain(config)
        self.environment = (
            current_environment() if environment is None else dict(environment)
        )
        self.sections: list[dict[str, Any]] = []

    def add_text(self, text: str, title: str = "") -> None:
        """Adds paragraphs, separated by blank lines."""
        self.sections.append({"kind": "text", "title": title, "text": text})

    def add_table(self, table: Table) -> None:
        """Adds a table."""
        self.sections.append({"kind": "table", "table": table.to_json()})

    def add_figure(self, title: str, figure: Figure | bytes, caption: str = "") -> None:
        """Adds a figure, as data (drawn in the style of the page) or as PNG bytes.

        Raises:
          ValueError: bytes that are not a PNG file.
        """
        section: dict[str, Any] = {"kind": "figure", "title": title, "caption": caption}
        if isinstance(figure, bytes):
            if not figure.startswith(b"\x89PNG"):
                raise ValueError(
                    f"Report.add_figure: {title!r} must be a figure or PNG bytes"
                )
            section["png"] = base64.b64encode(figure).decode("ascii")
        else:
            section["figure"] = figure_to_json(figure)
        self.sections.append(section)

    @property
    def tables(self) -> list[Table]:
        """The tables, in order."""
        return [
            Table.from_json(section["table"])
            for section in self.sections
            if section["kind"] == "table"
        ]

    def to_json(self) -> dict[str, Any]:
        """The contents of `results.json`."""
        return {
            "schema": _SCHEMA,
            "title": self.title,
            "intro": self.intro,
            "sections": self.sections,
            "config": self.config,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_json`.

        Raises:
          ValueError: another schema, or a section that cannot be shown.
        """
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            raise ValueError(f"Report.from_json: wants a mapping with schema {_SCHEMA}")
        try:
            report = cls(
                data["title"],
                data.get("intro", ""),
                config=data.get("config", {}),
                environment=data.get("environment", {}),
            )
            for number, section in enumerate(data["sections"]):
                kind = section["kind"]
                if kind not in ("text", "table", "figure"):
                    raise ValueError(
                        f"Report.from_json: section {number} has kind {kind!r}; "
                        "wants text, table or figure"
                    )
                if kind == "table":
                    Table.from_json(section["table"])
                elif "figure" in section:
                    figure_from_json(section["figure"])
                report.sections.append(dict(section))
        except KeyError as error:
            raise ValueError(f"Report.from_json: no field {error}") from error
        return report

    def print(self, stream: IO[str] | None = None) -> None:
        """Prints the tables, for a terminal or as plain text."""
        import rich.console

        console = rich.console.Console(file=stream)
        if not console.is_terminal:
            # A pipe has no width of its own; never break a row for it.
            console = rich.console.Console(file=stream, width=200)
        for table in self.tables:
            console.print(table.to_rich())

    def write(self, directory: epath.PathLike) -> epath.Path:
        """Writes both files; each appears whole or not at all.

        Args:
          directory: made if absent; may be a cloud path.

        Returns:
          The path of `index.html`.
        """
        from mtl_jax.report.html import to_html

        data = self.to_json()
        page = to_html(data)  # Before anything is written: it may fail.
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)
        _write_atomically(folder / "results.json", text + "\n")
        _write_atomically(folder / "index.html", page)
        return folder / "index.html"


def read_report(directory: epath.PathLike) -> Report:
    """The report of a run, from `results.json` in its directory or in `report/`.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    folder = epath.Path(directory)
    candidates = (folder / "report" / "results.json", folder / "results.json")
    for path in candidates:
        if path.exists():
            break
    else:
        raise ValueError(f"read_report: no results.json in {folder} or {folder}/report")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"read_report: {path} is not JSON: {error}") from error
    try:
        return Report.from_json(data)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"read_report: {path} is malformed: {error}") from error
