"""A table as a value: one content, shown on a terminal, in Markdown, HTML and JSON."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table

__all__ = ["Table", "format_bytes"]

Cell = str | int | float | bool | None


def format_bytes(size: float) -> str:
    """A byte count with a binary unit.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _plain(value: Any) -> Cell:
    """A Python scalar from a Python, NumPy or JAX scalar."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, numbers.Number) or getattr(value, "shape", None) == ():
        return value.item() if hasattr(value, "item") else float(value)  # type: ignore[union-attr]
    raise ValueError(
        "Table: a cell must be a string, a number, a bool or None; "
        f"found {type(value).__name__}"
    )


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Columns, rows, and how to print them.

    Attributes:
      title: heading.
      columns: names, one per cell of a row.
      rows: cells: strings, numbers (NumPy and JAX scalars become Python numbers),
        bools or None (printed as a dash).
      formats: column -> format spec such as ".3f" or ".1%", or "bytes". Floats
        without one are printed with ".4g".
      best: column -> "max" or "min": the best finite number of it is emphasised.
      caption: sentence below the table.

    >>> t = Table(title="Accuracy", columns=("method", "mean"),
    ...           rows=(("sum", 0.5), ("ties", 0.75)), formats={"mean": ".1%"})
    >>> print(t.to_markdown())
    **Accuracy**
    <BLANKLINE>
    | method | mean |
    |:---|---:|
    | sum | 50.0% |
    | ties | 75.0% |
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    best: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caption: str = ""

    def __post_init__(self):
        columns = tuple(self.columns)
        rows = tuple(tuple(_plain(cell) for cell in row) for row in self.rows)
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"Table {self.title!r}: row {index} wants {len(columns)} cells, "
                    f"found {len(row)}"
                )
        for name in (*self.formats, *self.best):
            if name not in columns:
                raise ValueError(
                    f"Table {self.title!r}: no column {name!r}; "
                    f"columns are {', '.join(columns)}"
                )
        for name, sense in self.best.items():
            if sense not in ("max", "min"):
                raise ValueError(
                    f"Table {self.title!r}: best[{name!r}] must be 'max' or 'min'; "
                    f"found {sense!r}"
                )
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", rows)

    def _text(self, column: str, value: Cell) -> str:
        if value is None:
            return "–"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value
        spec = self.formats.get(column)
        if not math.isfinite(value):
            return str(float(value))
        if spec == "bytes":
            return format_bytes(value)
        return format(value, spec or (".4g" if isinstance(value, float) else ",d"))

    def cells(self) -> list[list[dict[str, Any]]]:
        """Rows of {"text", "number", "best"}, ready for a renderer."""
        winners = {}
        for name, sense in self.best.items():
            j = self.columns.index(name)
            values = [
                row[j]
                for row in self.rows
                if _is_number(row[j]) and math.isfinite(row[j])  # type: ignore[arg-type]
            ]
            if values:
                winners[name] = max(values) if sense == "max" else min(values)  # type: ignore[type-var]
        return [
            [
                {
                    "text": self._text(name, cell),
                    "number": _is_number(cell),
                    "best": _is_number(cell)
                    and name in winners
                    and cell == winners[name],
                }
                for name, cell in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def numeric_columns(self) -> list[bool]:
        """Which columns hold numbers (or nothing), and are aligned to the right."""
        return [
            any(_is_number(row[j]) for row in self.rows)
            and all(row[j] is None or _is_number(row[j]) for row in self.rows)
            for j in range(len(self.columns))
        ]

    def to_rich(self) -> "rich.table.Table":
        """The table for a `rich` console."""
        import rich.box
        import rich.table
        import rich.text

        table = rich.table.Table(
            title=rich.text.Text(self.title, style="bold"),
            caption=rich.text.Text(self.caption) if self.caption else None,
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for name, number in zip(self.columns, self.numeric_columns(), strict=True):
            table.add_column(
                rich.text.Text(name), justify="right" if number else "left"
            )
        for row in self.cells():
            table.add_row(
                *(
                    rich.text.Text(cell["text"], style="bold" if cell["best"] else "")
                    for cell in row
                )
            )
        return table

    def to_markdown(self) -> str:
        """The table in Markdown; the best of a column in bold."""

        def escape(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        def line(cells: list[str]) -> str:
            return f"| {' | '.join(cells)} |"

        rule = [("---:" if number else ":---") for number in self.numeric_columns()]
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [line([escape(name) for name in self.columns]), f"|{'|'.join(rule)}|"]
        for row in self.cells():
            texts = [escape(cell["text"]) for cell in row]
            lines.append(
                line(
                    [
                        f"**{text}**" if cell["best"] else text
                        for text, cell in zip(texts, row, strict=True)
                    ]
                )
            )
        if self.caption:
            lines += ["", self.caption]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The table as an HTML fragment, every text escaped."""
        import html

        numeric = self.numeric_columns()
        head = "".join(
            f'<th scope="col"{" class=number" if number else ""}>'
            f"{html.escape(name)}</th>"
            for name, number in zip(self.columns, numeric, strict=True)
        )
        body = []
        for row in self.cells():
            cells = []
            for cell, number in zip(row, numeric, strict=True):
                classes = " ".join(["number"] * number + ["best"] * bool(cell["best"]))
                attribute = f' class="{classes}"' if classes else ""
                cells.append(f"<td{attribute}>{html.escape(cell['text'])}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}"
            "</tbody></table>"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; non-finite floats become {"float": "nan"}."""

        def encode(cell: Cell) -> Any:
            if isinstance(cell, float) and not math.isfinite(cell):
                return {"float": str(cell)}
            return cell

        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [[encode(cell) for cell in row] for row in self.rows],
            "formats": dict(self.formats),
            "best": dict(self.best),
            "caption": self.caption,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Table":
        """The inverse of `to_json`."""

        def decode(cell: Any) -> Cell:
            return float(cell["float"]) if isinstance(cell, dict) else cell

        return cls(
            title=data["title"],
            columns=tuple(data["columns"]),
            rows=tuple(tuple(decode(cell) for cell in row) for row in data["rows"]),
            formats=data.get("formats", {}),
            best=data.get("best", {}),
            caption=data.get("caption", ""),
        )
