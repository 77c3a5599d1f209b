"""YAML that knows its lines: every fault is told with its place in the file."""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import yaml

__all__ = ["Cursor", "nearest", "parse"]


def nearest(name: Any, known: Iterable[str]) -> str:
    """What to say about a name that is not known: the nearest one, or all.

    >>> nearest("tie", ["ties", "linear"])
    "did you mean 'ties'?"
    >>> nearest("xyz", ["ties", "linear"])
    'it must be one of linear, ties'
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"it must be one of {', '.join(known) or 'nothing'}"


class _Mapping(dict):
    """A mapping and the line of each key."""

    lines: dict[Any, int]


class _Sequence(list):
    """A sequence and the line of each item."""

    lines: list[int]


class _Loader(yaml.SafeLoader):
    """The safe loader, with lines, and without mappings that repeat a key."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Mapping:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool):
            raise ValueError(f"line {line}: a key must be a word; found {key!r}")
        if key in seen:
            raise ValueError(
                f"line {line}: {key!r} is given twice, first in line {seen[key]}"
            )
        seen[key] = line
    loader.flatten_mapping(node)
    out = _Mapping()
    out.lines = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        out[key] = loader.construct_object(value_node, deep=True)
        out.lines[key] = key_node.start_mark.line + 1
    return out


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> _Sequence:
    out = _Sequence(loader.construct_object(n, deep=True) for n in node.value)
    out.lines = [n.start_mark.line + 1 for n in node.value]
    return out


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)


class Cursor:
    """A value of a document and its place there.

    Attributes:
      value: what stands there.
      path: such as `models[1].parameters.weight`.
      line: counted from one.
    """

    def __init__(self, value: Any, file: str, path: str = "", line: int = 1):
        self.value = value
        self.path = path
        self.line = line
        self._file = file

    def fail(self, message: str) -> NoReturn:
        """Raises a ValueError that begins with the place."""
        at = f": {self.path}" if self.path else ""
        raise ValueError(f"{self._file}, line {self.line}{at}: {message}")

    def _wants(self, what: str) -> NoReturn:
        self.fail(f"wants {what}; found {self.value!r}")

    def mapping(self, known: Iterable[str] | None = None) -> "dict[str, Cursor]":
        """The entries of a mapping; keys outside `known` are refused.

        An entry without a value counts as absent.
        """
        if not isinstance(self.value, _Mapping):
            self._wants("a mapping")
        out = {}
        for key, value in self.value.items():
            path = f"{self.path}.{key}" if self.path else str(key)
            cursor = Cursor(value, self._file, path, self.value.lines[key])
            if known is not None and key not in known:
                cursor.fail(f"unknown key {key!r}; {nearest(key, known)}")
            if value is not None or known is None:
                out[key] = cursor
        return out

    def items(self) -> "Iterator[Cursor]":
        """The items of a sequence."""
        if not isinstance(self.value, _Sequence) or not self.value:
            self._wants("a list that is not empty")
        for i, (value, line) in enumerate(
            zip(self.value, self.value.lines, strict=True)
        ):
            yield Cursor(value, self._file, f"{self.path}[{i}]", line)

    @property
    def is_list(self) -> bool:
        """Whether a list stands here."""
        return isinstance(self.value, _Sequence)

    @property
    def is_mapping(self) -> bool:
        """Whether a mapping stands here."""
        return isinstance(self.value, _Mapping)

    def text(self) -> str:
        """A non-empty text."""
        if not isinstance(self.value, str) or not self.value.strip():
            self._wants("a text")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self._wants("true or false")
        return self.value

    def whole(self, least: int = 0) -> int:
        """A whole number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self._wants("a whole number")
        if self.value < least:
            self._wants(f"at least {least}")
        return self.value

    def scalar(self) -> bool | int | float | str:
        """A number, a flag or a word; `1e-4`, a text in YAML 1.1, is a number."""
        value = self.value
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return self.text()
        if not isinstance(value, bool | int | float):
            self._wants("a number, true, false or a word")
        if not math.isfinite(value):
            self._wants("a finite number")
        return value


def parse(text: str, file: str) -> Cursor:
    """Reads one YAML document.

    Args:
      text: the document.
      file: what messages call it.

    Raises:
      ValueError: for text that is not YAML, or a key given twice, with the line.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{file}{line}: not YAML: {said}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}, {error}") from None
    return Cursor(value, file)
