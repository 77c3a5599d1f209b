"""What a run shows: progress while it works, tables and an HTML page at the end."""

from mtl_jax.report import plots
from mtl_jax.report.document import Report, read_report
from mtl_jax.report.environment import environment
from mtl_jax.report.html import to_html
from mtl_jax.report.plots import Bars, Heatmap, Histogram, Lines, render
from mtl_jax.report.progress import Progress, Task, format_duration
from mtl_jax.report.table import Table, format_bytes

__all__ = [
    "Bars",
    "Heatmap",
    "Histogram",
    "Lines",
    "Progress",
    "Report",
    "Table",
    "Task",
    "environment",
    "format_bytes",
    "format_duration",
    "plots",
    "read_report",
    "render",
    "to_html",
]
