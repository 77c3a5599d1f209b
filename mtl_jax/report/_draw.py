"""How each kind of figure is drawn. Matplotlib is imported on first use."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.figure

    from mtl_jax.report import plots

# Colours that keep their contrast on white and on dark pages.
_PALETTE = (
    "#3b7dd8",
    "#e08a1e",
    "#2a9d6f",
    "#c2528b",
    "#7a6fd0",
    "#d1495b",
    "#3a9fb0",
    "#8c8c8c",
)
_HATCHES = ("", "///", "...", "xxx")
_MARKERS = "osD^v<>P"
# Stands for the colour of the page's text; `finish` puts `currentColor` there.
_INK = "#010203"


@contextlib.contextmanager
def style(format: str, salt: str) -> Iterator[None]:
    """The house style, without touching matplotlib's global state."""
    import matplotlib

    ink = _INK if format == "svg" else "#1f2328"
    settings = {
        "axes.axisbelow": True,
        "axes.edgecolor": ink,
        "axes.facecolor": "none" if format == "svg" else "white",
        "axes.grid": False,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": ink,
        "figure.constrained_layout.use": True,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "grid.alpha": 0.25,
        "grid.color": "#808080",
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.color": ink,
        "text.parse_math": False,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with matplotlib.rc_context(settings):
        yield


def finish(data: bytes, format: str) -> bytes:
    """An SVG without its XML prologue, its ink the text colour of the page."""
    if format != "svg":
        return data
    text = data.decode("utf-8")
    text = text[text.index("<svg") :]
    return text.replace(_INK, "currentColor").encode("utf-8")


def _new(width: float, height: float) -> tuple["matplotlib.figure.Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _looks() -> Iterator[tuple[str, str]]:
    """Colour and hatch of each series; colours repeat with another hatch."""
    for hatch in itertools.cycle(_HATCHES):
        for colour in _PALETTE:
            yield colour, hatch


def _legend(figure: "matplotlib.figure.Figure", axes: Any, count: int) -> None:
    if count:
        longest = max(len(t) for t in axes.get_legend_handles_labels()[1])
        width = figure.get_figwidth()
        columns = max(1, min(count, int(width * 11 / (longest + 6))))
        figure.legend(loc="outside upper center", ncols=columns, fontsize=9)


def _plain_log(axis: Any) -> None:
    """Plain numbers on a logarithmic axis (no mathematical text)."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(spec: "plots.Bars") -> "matplotlib.figure.Figure":
    """Groups side by side, one bar per series in each."""
    groups, count = len(spec.labels), len(spec.series)
    width = min(14.0, max(6.0, 0.8 + groups * (0.35 + 0.16 * count)))
    figure, axes = _new(width, 3.6)
    bar = 0.82 / count
    for index, ((name, values), (colour, hatch)) in enumerate(
        zip(spec.series.items(), _looks(), strict=False)
    ):
        centres = [g + (index - (count - 1) / 2) * bar for g in range(groups)]
        axes.bar(
            centres,
            [float(v) for v in values],
            bar * 0.92,
            label=name,
            color=colour,
            hatch=hatch,
            edgecolor="white" if hatch else colour,
            linewidth=0,
            yerr=[float(e) for e in spec.errors[name]] if name in spec.errors else None,
            error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": "#808080"},
        )
    for name, height in spec.lines.items():
        axes.axhline(height, linestyle="--", linewidth=1, color="#808080")
        axes.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8.5,
        )
    crowded = max((len(label) for label in spec.labels), default=0) * groups > width * 9
    axes.set_xticks(
        range(groups),
        list(spec.labels),
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(spec.y_label)
    axes.grid(visible=True, axis="y")
    if spec.y_range:
        axes.set_ylim(*spec.y_range)
    _legend(figure, axes, count if count > 1 else 0)
    return figure


def lines(spec: "plots.Lines") -> "matplotlib.figure.Figure":
    """Curves, a ring around the chosen point of each."""
    figure, axes = _new(7.0, 3.8)
    x = [float(value) for value in spec.x]
    for index, ((name, values), (colour, _)) in enumerate(
        zip(spec.series.items(), _looks(), strict=False)
    ):
        y = [float(value) for value in values]
        axes.plot(
            x,
            y,
            label=name,
            color=colour,
            linewidth=1.6,
            marker=_MARKERS[index % len(_MARKERS)] if len(x) <= 40 else None,
            markersize=3.5,
            linestyle="-" if index < len(_PALETTE) else "--",
        )
        if name in spec.bands:
            half = [float(value) for value in spec.bands[name]]
            low = [a - b for a, b in zip(y, half, strict=True)]
            high = [a + b for a, b in zip(y, half, strict=True)]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if name in spec.chosen:
            at = x.index(float(spec.chosen[name]))
            axes.plot(
                x[at],
                y[at],
                marker="o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=colour,
                markeredgewidth=1.8,
                linestyle="none",
            )
    if spec.log_x:
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    if spec.log_y:
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.set_xlabel(spec.x_label)
    axes.set_ylabel(spec.y_label)
    axes.grid(visible=True)
    _legend(figure, axes, len(spec.series) if len(spec.series) > 1 else 0)
    return figure


def _cell_colour(rgba: tuple[float, ...]) -> str:
    red, green, blue = rgba[:3]
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return "#111111" if luminance > 0.55 else "#ffffff"


def heatmap(spec: "plots.Heatmap") -> "matplotlib.figure.Figure":
    """A matrix with the number in each cell and a colour bar."""
    n_rows, n_columns = len(spec.rows), len(spec.columns)
    longest = max((len(label) for label in spec.rows), default=0)
    side = min(11.0, max(3.6, 0.62 * n_columns))
    figure, axes = _new(
        side + 1.3 + 0.07 * longest, min(11.0, max(2.6, 0.5 * n_rows + 1.1))
    )
    values = [[float(value) for value in row] for row in spec.values]
    finite = [v for row in values for v in row if math.isfinite(v)] or [0.0]
    low, high = spec.value_range or (min(finite), max(finite))
    if low < 0 < high:
        low, high = -max(-low, high), max(-low, high)
    image = axes.imshow(
        values,
        cmap="RdBu_r" if low < 0 else "Blues",
        vmin=low,
        vmax=high if high > low else low + 1,
        aspect="auto",
    )
    if spec.format:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = _cell_colour(image.cmap(image.norm(value)))
                text = format(value, spec.format) if math.isfinite(value) else "nan"
                axes.text(
                    j, i, text, ha="center", va="center", color=colour, fontsize=8
                )
    axes.set_xticks(
        range(n_columns),
        list(spec.columns),
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(n_rows), list(spec.rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=spec.label, fraction=0.05)
    bar.outline.set_visible(False)
    return figure


def histogram(spec: "plots.Histogram") -> "matplotlib.figure.Figure":
    """Filled outlines over common edges."""
    figure, axes = _new(7.0, 3.6)
    edges = [float(edge) for edge in spec.edges]
    for (name, values), (colour, _) in zip(spec.series.items(), _looks(), strict=False):
        counts = [float(value) for value in values]
        alone = len(spec.series) == 1
        axes.stairs(
            counts,
            edges,
            label=name,
            color=colour,
            fill=True,
            alpha=0.85 if alone else 0.3,
        )
        if not alone:
            axes.stairs(counts, edges, color=colour, linewidth=1.4)
    if spec.log_y:
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.set_xlabel(spec.x_label)
    axes.set_ylabel(spec.y_label)
    axes.grid(visible=True, axis="y")
    _legend(figure, axes, len(spec.series) if len(spec.series) > 1 else 0)
    return figure
