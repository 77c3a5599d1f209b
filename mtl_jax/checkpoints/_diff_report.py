"""A `Diff` as tables, figures and JSON."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mtl_jax import report
from mtl_jax.checkpoints._layers import numbered
from mtl_jax.checkpoints.diff import Comparison, Diff, TensorDiff

__all__ = [
    "COLUMNS",
    "check_column",
    "ranked",
    "summary",
    "table",
    "to_json",
    "to_report",
]

# Column -> (value, format, whether a large value is what one looks for).
_SUMS: dict[str, tuple[Callable[[Comparison], Any], str, bool]] = {
    "relative": (lambda s: s.relative, ".3g", True),
    "cosine": (lambda s: s.cosine, ".5f", False),
    "signs": (lambda s: s.signs, ".1%", False),
    "max": (lambda s: s.largest, ".3g", True),
    "changed": (lambda s: s.share_changed, ".1%", True),
    "norm_a": (lambda s: math.sqrt(s.aa), ".4g", True),
    "norm_b": (lambda s: math.sqrt(s.bb), ".4g", True),
    "norm_diff": (lambda s: math.sqrt(s.dd), ".4g", True),
    "change_a": (lambda s: math.sqrt(s.xx), ".4g", True),
    "change_b": (lambda s: math.sqrt(s.yy), ".4g", True),
    "broken_a": (lambda s: s.broken_a, ",d", True),
    "broken_b": (lambda s: s.broken_b, ",d", True),
    "size": (lambda s: s.size, ",d", True),
}
COLUMNS = ("name", *_SUMS)
_TITLES = {
    "relative": "|B-A| / |A|",
    "signs": "same sign",
    "max": "max |B-A|",
    "norm_a": "|A|",
    "norm_b": "|B|",
    "norm_diff": "|B-A|",
    "change_a": "|A-base|",
    "change_b": "|B-base|",
    "broken_a": "NaN, inf in A",
    "broken_b": "NaN, inf in B",
    "size": "entries",
}
_MAX_BARS, _MAX_COLUMNS, _MAX_ROWS = 24, 40, 100


def check_column(column: str) -> None:
    """Refuses what is none of `COLUMNS`.

    Raises:
      ValueError: naming those there are.
    """
    if column not in COLUMNS:
        raise ValueError(
            f"diff: no column {column!r} to sort by; there are {', '.join(COLUMNS)}"
        )


def ranked(found: Diff, column: str = "relative") -> list[TensorDiff]:
    """Tensors, what deserves a look first; those without a value last.

    Args:
      found: from `diff`.
      column: one of `COLUMNS`; "name" sorts by name.

    Raises:
      ValueError: no such column.
    """
    check_column(column)
    if column == "name":
        return sorted(found.tensors, key=lambda each: each.name)
    value, _, descending = _SUMS[column]

    def key(each: TensorDiff) -> tuple[bool, float]:
        number = value(each.sums)
        if number is None:
            return True, 0.0
        return False, -number if descending else number

    return sorted(found.tensors, key=key)


def _shown(found: Diff) -> list[str]:
    """Columns that say something about this pair."""
    total = found.total
    absent = set() if found.with_base else {"change_a", "change_b"}
    absent |= {c for c in ("broken_a", "broken_b") if not _SUMS[c][0](total)}
    return [name for name in _SUMS if name not in absent]


def _table(
    title: str, first: str, rows: Iterable[tuple[str, Comparison]], found: Diff
) -> report.Table:
    shown = _shown(found)
    titles = [_TITLES.get(name, name) for name in shown]
    return report.Table(
        title=title,
        columns=(first, *titles),
        rows=tuple(
            (label, *(_SUMS[name][0](sums) for name in shown)) for label, sums in rows
        ),
        formats={
            _TITLES.get(name, name): spec
            for name in shown
            if (spec := _SUMS[name][1]) != ",d"
        },
    )


def table(
    found: Diff, *, column: str = "relative", limit: int | None = None
) -> report.Table:
    """One row per tensor, see `ranked`; at most `limit` of them."""
    tensors = ranked(found, column)
    count = len(tensors) if limit is None else min(limit, len(tensors))
    by = "by name" if column == "name" else f"by {_TITLES.get(column, column)}"
    more = "" if count == len(tensors) else f"the first {count} of {len(tensors)}, "
    rows = [(each.name, each.sums) for each in tensors[:count]]
    rows += [("all", found.total)]
    return _table(f"Tensors, {more}{by}", "tensor", rows, found)


def summary(found: Diff, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """What cannot be compared, and what the numbers are of; a line each."""
    equal = sum(not each.sums.changed for each in found.tensors)
    lines = [
        f"{len(found.tensors)} tensors compared, {equal} of them equal in all entries."
    ]
    for name, only in zip(names, (found.only_a, found.only_b), strict=True):
        if only:
            lines.append(f"Only in {name}: {_listed(only)}.")
    if found.reshaped:
        pairs = [f"{n} {a} and {b}" for n, (a, b) in found.reshaped.items()]
        lines.append(f"Of another shape: {_listed(pairs)}.")
    if found.no_base:
        lines.append(
            f"Not in the base, or of another shape there, so that the weights are "
            f"compared by direction: {_listed(found.no_base)}."
        )
    total = found.total
    if total.broken_a or total.broken_b:
        lines.append(
            f"NaN or infinite: {total.broken_a} entries of {names[0]}, "
            f"{total.broken_b} of {names[1]}; the other numbers leave them out."
        )
    if found.with_base:
        lines.append("Cosines and signs are of the changes from the base.")
    return lines


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _kind(name: str) -> str:
    where = numbered(name, trees=True)
    return f"{where.stack}.*.{where.kind}" if where.layer is not None else name


def _layer(name: str) -> tuple[str, int] | None:
    where = numbered(name, trees=True)
    return None if where.layer is None else (where.stack, where.layer)


def _cell(stack: str, name: str) -> tuple[int, str] | None:
    where = numbered(name, trees=True)
    if where.layer is None or where.stack != stack:
        return None
    return where.layer, where.kind


def _label(layer: tuple[str, int]) -> str:
    return f"{layer[0]}.{layer[1]}" if layer[0] else str(layer[1])


def to_json(found: Diff) -> dict[str, Any]:
    """Plain data: every tensor with every column, groups, and what is missing."""

    def sums(each: Comparison) -> dict[str, Any]:
        row = {name: value(each) for name, (value, _, _) in _SUMS.items()}
        row |= {k: getattr(each, k) for k in ("nan_a", "nan_b", "inf_a", "inf_b")}
        if not found.with_base:
            del row["change_a"], row["change_b"]
        return {k: "inf" if v == math.inf else v for k, v in row.items()}

    def groups(key: Callable[[str], Any]) -> dict[str, Any]:
        return {name: sums(each) for name, each in found.groups(key).items()}

    return {
        "total": sums(found.total),
        "tensors": {
            each.name: {
                "shape": list(each.shape),
                "dtypes": list(each.dtypes),
                **sums(each.sums),
            }
            for each in found.tensors
        },
        "kinds": groups(_kind),
        "layers": groups(lambda n: _label(at) if (at := _layer(n)) else None),
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "reshaped": {k: [list(a), list(b)] for k, (a, b) in found.reshaped.items()},
        "no_base": list(found.no_base),
        "with_base": found.with_base,
    }


def to_report(
    found: Diff, *, a: str, b: str, base: str | None = None, column: str = "relative"
) -> report.Report:
    """The page: layers by modules, kinds of modules, cosines, and every tensor."""
    about = [f"A is {a}. B is {b}."] + ([f"The base is {base}."] if base else [])
    page = report.Report(
        "Two checkpoints compared",
        "\n\n".join([" ".join(about), *summary(found)]),
        config={"a": a, "b": b, "base": base},
    )
    for title, figure in _heatmaps(found):
        page.add_figure(title, figure, "Relative change |B-A| / |A|.")
    kinds = sorted(
        found.groups(_kind).items(), key=lambda item: item[1].relative, reverse=True
    )
    if kinds:
        most = kinds[:_MAX_BARS]
        page.add_figure(
            "Relative change by kind of module",
            report.Bars(
                labels=[name for name, _ in most],
                series={"relative": [_finite(sums.relative) for _, sums in most]},
                y_label="|B-A| / |A|",
            ),
        )
    cosines = [c for each in found.tensors if (c := each.sums.cosine) is not None]
    if cosines:
        page.add_figure("Cosines of tensors", _histogram(cosines))
    layers = found.groups(_layer)
    page.add_table(_table("Kinds of modules", "module", kinds, found))
    if layers:
        rows = [(_label(layer), sums) for layer, sums in layers.items()]
        page.add_table(_table("Layers", "layer", rows, found))
    page.add_table(table(found, column=column))
    return page


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _histogram(cosines: list[float]) -> report.Histogram:
    low = min(cosines)
    edges = np.linspace(-1.0 if low < 0 else math.floor(low * 20) / 20 - 0.05, 1.0, 41)
    counts, _ = np.histogram(cosines, edges)
    return report.Histogram(
        edges=edges.tolist(),
        series={"tensors": counts.tolist()},
        x_label="cosine",
        y_label="tensors",
    )


def _heatmaps(found: Diff) -> list[tuple[str, report.Heatmap]]:
    """Layers by modules, one figure per stack of layers."""
    figures = []
    for stack in dict.fromkeys(stack for stack, _ in found.groups(_layer)):
        cells = found.groups(functools.partial(_cell, stack))
        rows = sorted({layer for layer, _ in cells})[:_MAX_ROWS]
        columns = list(dict.fromkeys(kind for _, kind in cells))[:_MAX_COLUMNS]
        figures.append(
            (
                f"Layers of {stack}".removesuffix(" of "),
                report.Heatmap(
                    rows=[str(row) for row in rows],
                    columns=[kind.removesuffix(".weight") for kind in columns],
                    values=[
                        [
                            _finite(cells[row, kind].relative)
                            if (row, kind) in cells
                            else math.nan
                            for kind in columns
                        ]
                        for row in rows
                    ],
                    format=".2g" if len(rows) * len(columns) <= 400 else "",
                    label="|B-A| / |A|",
                ),
            )
        )
    return figures
