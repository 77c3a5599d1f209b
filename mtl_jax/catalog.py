"""The catalogue: every published method of the library, planned or working.

A system is *working* when `mtl_jax/systems/<name>.py` exists and defines `SPEC`;
its SPEC is read from the source text, so listing systems imports none of them.
"""

import argparse
import dataclasses
import difflib
import functools
import pathlib
import sys
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

from mtl_jax import _system_source

__all__ = [
    "FAMILIES",
    "KINDS",
    "Entry",
    "SystemSpec",
    "entries",
    "get",
    "markdown_table",
    "readme_with_table",
    "select",
]

FAMILIES = (
    "adapters",
    "architectures",
    "boosting",
    "data",
    "generation",
    "gradients",
    "icl",
    "instruction",
    "merging",
    "pruning",
    "retrieval",
    "rl",
    "routing",
    "sparse",
    "tangent",
)
KINDS = ("trainable", "posthoc", "servable")

_PACKAGE = pathlib.Path(__file__).parent
_BEGIN = "<!-- catalogue: begin (python -m mtl_jax.catalog --write-readme) -->"
_END = "<!-- catalogue: end -->"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """What a system says about itself, as `SPEC` in its module.

    Attributes:
      name: slug, lower case with hyphens; the module name has underscores.
      title: title of the paper.
      year: year of the paper.
      family: one of `FAMILIES`.
      kind: "trainable" (build returns a `multitask.Contest` of methods, each of which
        makes a `Trainable`), "posthoc" (edits trained parameters), or "servable" (acts
        at inference).
      reference: BibTeX entry.
      uses: primitives it is composed of, such as "merging.ties", each reached by
        the module's own imports.
      deviations: where it differs from the paper or fills a gap, one sentence each.
      summary: one sentence on what the method does.
    """

    name: str
    title: str
    year: int
    family: str
    kind: str
    reference: str
    uses: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    summary: str = ""

    def __post_init__(self):
        for field, allowed in (("family", FAMILIES), ("kind", KINDS)):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(
                    f"SystemSpec: {field} of {self.name!r} must be one of "
                    f"{', '.join(allowed)}; found {value!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the catalogue.

    Attributes:
      spec: the system's own SPEC if it works, else what is known from the paper.
      short: the name that the literature uses.
      status: "working" or "planned".
      venue: where it was published, if known.
      code: GitHub repository of the authors, if known.
    """

    spec: SystemSpec
    short: str
    status: str
    venue: str = ""
    code: str = ""

    @property
    def name(self) -> str:
        """The slug."""
        return self.spec.name

    @property
    def module(self) -> str:
        """Dotted name of the module that implements it."""
        return f"mtl_jax.systems.{self.name.replace('-', '_')}"

    @property
    def config(self) -> str:
        """Path of its experiment, from the root of the repository."""
        return f"experiments/configs/{self.name.replace('-', '_')}.py"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `mtl-jax list --json` prints it."""
        return {
            **dataclasses.asdict(self.spec),
            "short": self.short,
            "status": self.status,
            "venue": self.venue,
            "code": self.code,
            "module": self.module,
            "config": self.config,
        }


def _bibtex(name: str, row: dict[str, Any]) -> str:
    """A BibTeX entry from what is known; unknown fields are left out."""
    fields = {"title": f"{{{row['title']}}}"}
    if "authors" in row:
        fields["author"] = row["authors"]
    fields["year"] = str(row["year"])
    if "arxiv" in row:
        fields |= {"eprint": row["arxiv"], "archiveprefix": "arXiv"}
    if "venue" in row:
        fields["note"] = row["venue"]
    if "code" in row:
        fields["howpublished"] = f"\\url{{https://github.com/{row['code']}}}"
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@misc{{{name},\n{body}\n}}"


def _entry(name: str, row: dict[str, Any], systems: pathlib.Path) -> Entry:
    source = systems / f"{name.replace('-', '_')}.py"
    if source.exists():
        spec = SystemSpec(**_system_source.read_spec(source))
        status = "working"
    else:
        spec = SystemSpec(
            name=name,
            title=row["title"],
            year=row["year"],
            family=row["family"],
            kind=row["kind"],
            reference=_bibtex(name, row),
            summary=row["summary"],
        )
        status = "planned"
    return Entry(
        spec=spec,
        short=row["short"],
        status=status,
        venue=row.get("venue", ""),
        code=row.get("code", ""),
    )


@functools.cache
def _rows() -> dict[str, dict[str, Any]]:
    text = (_PACKAGE / "catalog_data" / "systems.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every system, in alphabetical order of its name.

    Raises:
      ValueError: a system module exists whose SPEC cannot be read from its source.
    """
    systems = _PACKAGE / "systems"
    return tuple(_entry(name, row, systems) for name, row in sorted(_rows().items()))


def get(name: str) -> Entry:
    """The entry of one system.

    Raises:
      ValueError: there is no such system; the message lists close names.

    >>> get("tall-masks").spec.year
    2024
    """
    by_name = {entry.name: entry for entry in entries()}
    if name not in by_name:
        wanted = name.lower().replace("_", "-")
        close = difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.5)
        inside = [known for known in by_name if wanted and wanted in known]
        close = list(dict.fromkeys(inside + close))[:5]
        hint = f"close: {', '.join(close)}" if close else "`mtl-jax list` shows them"
        raise ValueError(f"catalog.get: no system named {name!r}; {hint}")
    return by_name[name]


def _covers(declared: str, used: str) -> bool:
    return used == declared or used.startswith(declared + ".")


def select(
    *,
    family: str | None = None,
    uses: str | None = None,
    status: str | None = None,
) -> tuple[Entry, ...]:
    """Entries that meet every condition given.

    Args:
      family: keep this family.
      uses: keep systems composed of this primitive, or of one inside it:
        "merging" keeps every system that uses "merging.ties".
      status: "working" or "planned".

    Raises:
      ValueError: an unknown family or status.
    """
    for label, value, allowed in (
        ("family", family, FAMILIES),
        ("status", status, ("working", "planned")),
    ):
        if value is not None and value not in allowed:
            raise ValueError(
                f"catalog.select: {label} must be one of {', '.join(allowed)}; "
                f"found {value!r}"
            )
    return tuple(
        entry
        for entry in entries()
        if family in (None, entry.spec.family)
        and status in (None, entry.status)
        and (uses is None or any(_covers(uses, use) for use in entry.spec.uses))
    )


def markdown_table(rows: Iterable[Entry]) -> str:
    """The catalogue as a Markdown table, grouped by family."""
    lines = ["| Family | System | Paper | Status |", "|---|---|---|---|"]
    for entry in sorted(rows, key=lambda e: (e.spec.family, e.name)):
        title = entry.spec.title.replace("|", "\\|")
        lines.append(
            f"| {entry.spec.family} | `{entry.name}` | {title} "
            f"({entry.spec.year}) | {entry.status} |"
        )
    return "\n".join(lines)


def readme_with_table(text: str) -> str:
    """The README text with the catalogue between its markers replaced.

    Raises:
      ValueError: the markers are missing or out of order.
    """
    begin, end = text.find(_BEGIN), text.find(_END)
    if begin < 0 or end < begin:
        raise ValueError(
            f"readme_with_table: wants the lines {_BEGIN!r} and {_END!r}, in order"
        )
    total = len(entries())
    working = len(select(status="working"))
    count = f"{working} of {total} systems work today; the others are planned."
    head, tail = text[: begin + len(_BEGIN)], text[end:]
    return f"{head}\n{count}\n\n{markdown_table(entries())}\n{tail}"


def _main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Maintains the catalogue table.")
    parser.add_argument("--write-readme", action="store_true", required=True)
    parser.parse_args(argv)
    path = _PACKAGE.parent / "README.md"
    old = path.read_text(encoding="utf-8")
    new = readme_with_table(old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    sys.stdout.write(f"{path}: {'updated' if new != old else 'already current'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
