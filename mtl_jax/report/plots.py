"""Figures as data, drawn by matplotlib when they are needed.

A figure is a small frozen value; `render` turns it into SVG or PNG bytes. Reports
store the value, so that a figure can be drawn again from `results.json`.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.report import _draw

__all__ = [
    "Bars",
    "Figure",
    "Heatmap",
    "Histogram",
    "Lines",
    "figure_from_json",
    "figure_to_json",
    "render",
]

Series = Mapping[str, Sequence[float]]


def _check_series(kind: str, series: Series, wanted: int, other: str) -> None:
    if not series:
        raise ValueError(f"{kind}: wants at least one series")
    for name, values in series.items():
        if len(values) != wanted:
            raise ValueError(
                f"{kind}: series {name!r} has {len(values)} values, "
                f"wanted {wanted} as in {other}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """Grouped bars: one group per label, one bar per series.

    Attributes:
      labels: names of the groups, such as tasks.
      series: name -> one value per label; NaN leaves the bar out.
      errors: name -> half-length of an error bar per label.
      y_label: label of the value axis.
      lines: label -> height of a dashed reference line.
      y_range: limits of the value axis; None fits the data from zero.
    """

    labels: Sequence[str]
    series: Series
    errors: Series = dataclasses.field(default_factory=dict)
    y_label: str = ""
    lines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    y_range: tuple[float, float] | None = None

    def __post_init__(self):
        _check_series("Bars", self.series, len(self.labels), "labels")
        if self.errors:
            _check_series("Bars", self.errors, len(self.labels), "labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves over a common axis, with the chosen point of each marked.

    Attributes:
      x: values of the horizontal axis.
      series: name -> one value per x.
      bands: name -> half-width of a shaded band per x, such as a standard error.
      chosen: name -> the x that was chosen on this curve; must be one of `x`.
      x_label: label of the horizontal axis.
      y_label: label of the value axis.
      log_x: logarithmic horizontal axis.
      log_y: logarithmic value axis.
    """

    x: Sequence[float]
    series: Series
    bands: Series = dataclasses.field(default_factory=dict)
    chosen: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self):
        _check_series("Lines", self.series, len(self.x), "x")
        if self.bands:
            _check_series("Lines", self.bands, len(self.x), "x")
        for name, value in self.chosen.items():
            if name not in self.series or value not in list(self.x):
                raise ValueError(
                    f"Lines: chosen[{name!r}] = {value} must name a series and "
                    "one of the values of x"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heatmap:
    """A labelled matrix, such as cosines of task vectors or overlaps of masks.

    Attributes:
      rows: labels from top to bottom.
      columns: labels from left to right.
      values: one list per row.
      value_range: ends of the colour scale; one that spans zero is diverging.
        None fits the data.
      format: format spec of the number in each cell; "" leaves cells blank.
      label: label of the colour bar.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    value_range: tuple[float, float] | None = None
    format: str = ".2f"
    label: str = ""

    def __post_init__(self):
        shape = (len(self.rows), len(self.columns))
        if len(self.values) != shape[0] or any(
            len(row) != shape[1] for row in self.values
        ):
            raise ValueError(
                f"Heatmap: values must be {shape[0]} rows of {shape[1]} numbers, "
                "as rows and columns say"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges, one outline per series.

    Attributes:
      edges: N + 1 increasing numbers.
      series: name -> N counts or densities.
      x_label: label of the horizontal axis.
      y_label: label of the value axis.
      log_y: logarithmic value axis.
    """

    edges: Sequence[float]
    series: Series
    x_label: str = ""
    y_label: str = ""
    log_y: bool = False

    def __post_init__(self):
        _check_series("Histogram", self.series, len(self.edges) - 1, "edges - 1")


Figure = Bars | Lines | Heatmap | Histogram
_KINDS = {"bars": Bars, "lines": Lines, "heatmap": Heatmap, "histogram": Histogram}


def _plain(value: Any) -> Any:
    """Lists and Python numbers from sequences and arrays; NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def figure_to_json(figure: Figure) -> dict[str, Any]:
    """Plain data with the kind of the figure; NaN becomes null."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(figure, cls))
    fields = {
        field.name: _plain(getattr(figure, field.name))
        for field in dataclasses.fields(figure)
    }
    return {"type": kind, **fields}


def _numbers(value: Any) -> Any:
    """Null back to NaN inside lists and tables of numbers."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [float("nan") if item is None else _numbers(item) for item in value]
    return value


def figure_from_json(data: Mapping[str, Any]) -> Figure:
    """The inverse of `figure_to_json`.

    Raises:
      ValueError: an unknown kind of figure or unknown fields.
    """
    fields = dict(data)
    kind = fields.pop("type", None)
    if kind not in _KINDS:
        raise ValueError(
            f"figure_from_json: type must be one of {', '.join(_KINDS)}; found {kind!r}"
        )
    try:
        return _KINDS[kind](**{key: _numbers(item) for key, item in fields.items()})
    except TypeError as error:
        raise ValueError(f"figure_from_json: {kind}: {error}") from error


def render(
    figure: Figure, *, format: str = "svg", title: str = "", salt: str = "mtl_jax"
) -> bytes:
    """Draws a figure.

    Args:
      figure: what to draw.
      format: "svg" (text follows the colour and font of the page) or "png".
      title: heading inside the picture; reports put it outside.
      salt: makes identifiers inside an SVG distinct from those of other figures
        on the page. The same figure and salt give the same bytes.

    Returns:
      The bytes of the file.

    Raises:
      ValueError: an unknown format.
    """
    if format not in ("svg", "png"):
        raise ValueError(f"render: format must be 'svg' or 'png'; found {format!r}")
    draw = {
        Bars: _draw.bars,
        Lines: _draw.lines,
        Heatmap: _draw.heatmap,
        Histogram: _draw.histogram,
    }[type(figure)]
    buffer = io.BytesIO()
    with _draw.style(format, salt):
        canvas = draw(figure)
        if title:
            canvas.axes[0].set_title(title, loc="left", fontweight="bold")
        metadata = {"Date": None} if format == "svg" else {}
        canvas.savefig(
            buffer,
            format=format,
            dpi=150,
            transparent=format == "svg",
            metadata=metadata,
        )
    return _draw.finish(buffer.getvalue(), format)
