"""Experiment configs: a Python file, a strict variant, and typed overrides.

A config file defines `VARIANTS`, a tuple of names, and `get_config(variant)`, which
returns an `ml_collections.ConfigDict` of plain data.
"""

import ast
import difflib
import pathlib
import runpy
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

__all__ = ["load_config", "split_spec", "variants"]

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def split_spec(spec: str) -> tuple[pathlib.Path, str | None]:
    """Path and variant of "path.py:variant"; None when no variant is named.

    >>> split_spec("experiments/configs/tall_masks.py:demo")[1]
    'demo'
    """
    path, colon, variant = spec.rpartition(":")
    if not colon or variant.endswith(".py"):
        return pathlib.Path(spec), None
    return pathlib.Path(path), variant


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if not path.name:
        raise ValueError("config: wants PATH.py or PATH.py:VARIANT; found no path")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"config {path}: no such file; {folder} is not a directory")
    there = sorted(p.name for p in folder.glob("*.py"))
    wanted = path.with_suffix(".py").name.replace("-", "_")
    near = difflib.get_close_matches(wanted, there, n=5, cutoff=0.4) or there[:10]
    hint = f"near it: {', '.join(near)}" if near else "the directory has no configs"
    raise ValueError(f"config {path}: no such file; {hint}")


def _execute(path: pathlib.Path) -> dict[str, Any]:
    path = _find(path)
    try:
        scope = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:  # Whatever the user's file raises.
        raise ValueError(f"config {path}: {_described(error)}") from error
    named = scope.get("VARIANTS")
    if not callable(scope.get("get_config")) or not named:
        raise ValueError(f"config {path}: wants VARIANTS and get_config(variant)")
    return scope


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def variants(path: str | pathlib.Path) -> tuple[str, ...]:
    """Names of the variants that a config file offers."""
    return tuple(_execute(pathlib.Path(path))["VARIANTS"])


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _sequence(text: str) -> list[Any]:
    value = _literal(text)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        return [_literal(part.strip()) for part in value.split(",") if part.strip()]
    return [value]


def _coerce(key: str, old: Any, text: Any) -> Any:
    """The value of `text` as the type of the value that it replaces."""
    if not isinstance(text, str):
        return text
    try:
        if isinstance(old, bool):
            return _BOOLS[text.lower()]
        if isinstance(old, int):
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError(text)
            return int(number)
        if isinstance(old, float):
            return float(text)
        if isinstance(old, list | tuple):
            return type(old)(_sequence(text))
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            f"--config.{key}: wants {type(old).__name__}, as {old!r}; found {text!r}"
        ) from None
    return text if isinstance(old, str) else _literal(text)


def _override(config: ConfigDict, key: str, text: Any) -> None:
    *groups, last = key.split(".")
    parent, node = config, config
    for part in (*groups, last):
        if not isinstance(node, ConfigDict) or part not in node:
            every = list(_leaves(config))
            near = difflib.get_close_matches(key, every, n=5, cutoff=0.5)
            ends = [name.split(".")[-1] for name in every]
            alike = difflib.get_close_matches(last, ends, n=5, cutoff=0.7)
            near += [n for n, e in zip(every, ends, strict=True) if e in alike]
            near = list(dict.fromkeys(near))[:5]
            hint = ", ".join(near or every[:10])
            raise ValueError(f"--config.{key}: no such key; near it: {hint}")
        parent, node = node, node[part]
    if isinstance(node, ConfigDict):
        inside = ", ".join(f"{key}.{name}" for name in _leaves(node))
        raise ValueError(f"--config.{key}: a group; set one of {inside}")
    try:
        parent[last] = _coerce(key, node, text)
    except TypeError as error:
        raise ValueError(
            f"--config.{key}: wants {type(node).__name__}, as {node!r}; found {text!r}"
        ) from error


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The locked config of an experiment.

    Args:
      spec: "path.py:variant"; without a variant, "demo", or the only one there is.
      overrides: dotted key -> value; a string is read as the type of the value
        that it replaces ("1e-4", "true", "trec,sst2").

    Returns:
      An `ml_collections.ConfigDict`, locked.

    Raises:
      ValueError: no such file, variant or key (the message lists those nearby), or
        a value of another type.
    """
    path, variant = split_spec(spec)
    scope = _execute(path)
    names = tuple(scope["VARIANTS"])
    if variant is None:
        variant = names[0] if len(names) == 1 else "demo"
    if variant not in names:
        raise ValueError(
            f"config {path}: no variant {variant!r}; it has {', '.join(names)}"
        )
    try:
        config = scope["get_config"](variant)
    except Exception as error:
        where = f"config {path}: get_config({variant!r})"
        raise ValueError(f"{where}: {_described(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config {path}: get_config must return a ConfigDict; "
            f"found {type(config).__name__}"
        )
    config.lock()
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    return config
