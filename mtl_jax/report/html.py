"""One self-contained HTML page from a report's data."""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtl_jax.report.plots import figure_from_json, render
from mtl_jax.report.table import Table

if TYPE_CHECKING:
    import jinja2

__all__ = ["to_html"]


@functools.cache
def _template() -> "jinja2.Template":
    import jinja2

    text = pathlib.Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).from_string(text)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _section(index: int, section: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one section."""
    import markupsafe

    if section["kind"] == "table":
        table = Table.from_json(section["table"])
        return {
            "kind": "table",
            "title": table.title,
            "caption": table.caption,
            "body": markupsafe.Markup(table.to_html()),
        }
    if section["kind"] == "text":
        return {
            "kind": "text",
            "title": section.get("title", ""),
            "caption": "",
            "paragraphs": _paragraphs(section["text"]),
        }
    shown = {
        "kind": "figure",
        "title": section["title"],
        "caption": section.get("caption", ""),
    }
    if "png" in section:
        return {**shown, "png": section["png"]}
    svg = render(figure_from_json(section["figure"]), salt=f"figure-{index}")
    return {**shown, "svg": markupsafe.Markup(svg.decode("utf-8"))}


def to_html(data: Mapping[str, Any]) -> str:
    """The page: tables, figures, configuration and environment in one file.

    Args:
      data: the contents of `results.json`, see `mtl_jax.report.document`.

    Returns:
      HTML without scripts or links to other files; every text is escaped.
    """
    return _template().render(
        title=data["title"],
        intro=_paragraphs(data.get("intro", "")),
        sections=[_section(i, section) for i, section in enumerate(data["sections"])],
        config=json.dumps(data["config"], indent=2, ensure_ascii=False)
        if data.get("config")
        else "",
        environment=data.get("environment", {}),
    )
