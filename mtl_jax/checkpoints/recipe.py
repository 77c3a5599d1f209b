"""Recipes of merges: mergekit's YAML as it is, and a short form."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mtl_jax.checkpoints import _yaml
from mtl_jax.checkpoints._schema import (
    DTYPES,
    Conditional,
    Input,
    Model,
    Module,
    Parameters,
    Recipe,
    Scalar,
    Setting,
    Slice,
    TokenizerRequest,
    TokenSource,
)

__all__ = ["Model", "Recipe", "load_recipe", "parse_recipe"]

_KEYS = (
    "base",
    "base_model",
    "chat_template",
    "dtype",
    "merge_method",
    "method",
    "models",
    "modules",
    "options",
    "out_dtype",
    "parameters",
    "slices",
    "tokenizer",
    "tokenizer_source",
)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe file; see `parse_recipe`.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"merge: no such recipe: {file}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file ({error.reason})") from error
    return parse_recipe(text, name=str(file), folder=file.parent)


def parse_recipe(
    text: str, *, name: str = "recipe", folder: str | os.PathLike[str] = "."
) -> Recipe:
    """Reads a recipe.

    Keys are mergekit's: `merge_method`, `base_model`, one of `models`, `slices` and
    `modules`, `parameters` (everywhere), `dtype`, `out_dtype`, `tokenizer_source` or
    `tokenizer`, `chat_template`. The short form writes `method` and `base`, models as
    bare paths, and `options`, where a list has one value per model.

    Args:
      text: YAML.
      name: what messages call it.
      folder: where model paths are looked for when the working directory has none.

    Raises:
      ValueError: for what cannot be meant, naming line, key and the nearest known key.
    """
    return _Reader(text, name, pathlib.Path(folder)).recipe()


class _Reader:
    """Turns a document into a `Recipe`."""

    def __init__(self, text: str, name: str, folder: pathlib.Path):
        self._text = text
        self._name = name
        self._folder = folder
        self._notes: list[str] = []

    def recipe(self) -> Recipe:
        top = _yaml.parse(self._text, self._name)
        keys = top.mapping(_KEYS)
        method = _one(keys, "merge_method", "method", top)
        if method is None:
            top.fail("wants merge_method")
        base = _one(keys, "base_model", "base", top)
        parts = [key for key in ("models", "slices", "modules") if key in keys]
        if len(parts) != 1:
            found = ", ".join(parts) or "none"
            top.fail(f"wants exactly one of models, slices and modules; found {found}")
        if "tokenizer" in keys and "tokenizer_source" in keys:
            keys["tokenizer"].fail("tokenizer_source is given as well; wants one")
        parameters = self._parameters(keys.get("parameters"))
        modules = self._modules(keys)
        if "options" in keys:
            modules, parameters = _options(keys["options"], modules, parameters)
        return Recipe(
            name=self._name,
            text=self._text,
            method=method.text(),
            base=self._model(base) if base else None,
            modules=modules,
            parameters=parameters,
            dtype=_dtype(keys.get("dtype")),
            out_dtype=_dtype(keys.get("out_dtype")),
            tokenizer=self._tokenizer(keys),
            chat_template=(
                keys["chat_template"].text() if "chat_template" in keys else None
            ),
            notes=tuple(self._notes),
        )

    def _modules(self, keys: Mapping[str, _yaml.Cursor]) -> tuple[Module, ...]:
        if "models" in keys:
            return (Module(None, self._models(keys["models"]), (), {}),)
        if "slices" in keys:
            return (Module(None, (), self._slices(keys["slices"]), {}),)
        out = []
        for name, cursor in keys["modules"].mapping().items():
            inner = cursor.mapping(("models", "slices", "parameters"))
            if ("models" in inner) == ("slices" in inner):
                cursor.fail("wants exactly one of models and slices")
            out.append(
                Module(
                    name,
                    self._models(inner["models"]) if "models" in inner else (),
                    self._slices(inner["slices"]) if "slices" in inner else (),
                    self._parameters(inner.get("parameters")),
                )
            )
        if not out:
            keys["modules"].fail("wants at least one module")
        return tuple(out)

    def _models(self, cursor: _yaml.Cursor) -> tuple[Input, ...]:
        out: dict[Model, Input] = {}
        for item in cursor.items():
            if item.is_mapping:
                keys = item.mapping(("model", "parameters"))
                model = self._model(_need(keys, "model", item))
                entry = Input(
                    model, self._parameters(keys.get("parameters")), None, item.path
                )
            else:
                entry = Input(self._model(item), {}, None, item.path)
            if entry.model in out:
                item.fail(f"{entry.model} is listed twice")
            out[entry.model] = entry
        return tuple(out.values())

    def _slices(self, cursor: _yaml.Cursor) -> tuple[Slice, ...]:
        out = []
        for item in cursor.items():
            keys = item.mapping(
                ("base_model", "parameters", "residual_weight", "sources")
            )
            if "residual_weight" in keys:
                self._notes.append(
                    f"line {keys['residual_weight'].line}: residual_weight has no "
                    "effect, here as in mergekit"
                )
            sources = self._sources(_need(keys, "sources", item))
            base = keys.get("base_model")
            out.append(
                Slice(
                    sources,
                    self._model(base) if base else None,
                    self._parameters(keys.get("parameters")),
                    item.path,
                )
            )
        return tuple(out)

    def _sources(self, cursor: _yaml.Cursor) -> tuple[Input, ...]:
        out: dict[Model, Input] = {}
        for item in cursor.items():
            keys = item.mapping(("layer_range", "model", "parameters"))
            model = self._model(_need(keys, "model", item))
            span = _need(keys, "layer_range", item)
            ends = [end.whole() for end in span.items()]
            if len(ends) != 2 or ends[0] >= ends[1]:
                span.fail("wants [first, end) with first < end")
            if model in out:
                item.fail(f"{model} is a source of this slice already")
            out[model] = Input(
                model,
                self._parameters(keys.get("parameters")),
                (ends[0], ends[1]),
                item.path,
            )
        lengths = {e.layers[1] - e.layers[0] for e in out.values() if e.layers}
        if len(lengths) > 1:
            cursor.fail(
                "the sources of a slice must have equally many layers; found "
                + " and ".join(map(str, sorted(lengths)))
            )
        return tuple(out.values())

    def _parameters(self, cursor: _yaml.Cursor | None) -> Parameters:
        if cursor is None:
            return {}
        return {
            str(key): _setting(value)
            for key, value in cursor.mapping().items()
            if value.value is not None
        }

    def _model(self, cursor: _yaml.Cursor) -> Model:
        if cursor.is_mapping:
            keys = cursor.mapping(("model", "lora", "path"))
            if ("model" in keys) == ("path" in keys):
                cursor.fail("wants model or path")
            parts = [keys.get("model") or keys["path"]]
            parts += [keys["lora"]] if "lora" in keys else []
            inner = [self._model(part) for part in parts]
            return Model("+".join(m.path for m in inner), "+".join(map(str, inner)))
        text = cursor.text().strip()
        whole = self._local(text)
        if whole:
            return Model(whole, text)
        found = []
        for part in text.split("+"):
            path = self._local(part)
            if path is None:
                cursor.fail(_missing(part, self._folder))
            found.append(path)
        if len(found) > 2:
            cursor.fail(f"wants MODEL or MODEL+ADAPTER; found {text}")
        return Model("+".join(found), text)

    def _local(self, text: str) -> str | None:
        """The path of a folder or file that is there; None if it is not."""
        if "://" in text:
            return text
        name = os.path.expanduser(text)
        for path in (pathlib.Path(name), self._folder / name):
            if name and path.exists():
                return str(path)
        return None

    def _tokenizer(self, keys: Mapping[str, _yaml.Cursor]) -> TokenizerRequest | None:
        if "tokenizer_source" in keys:
            return TokenizerRequest(self._token_base(keys["tokenizer_source"]))
        if "tokenizer" not in keys:
            return None
        inner = keys["tokenizer"].mapping(("pad_to_multiple_of", "source", "tokens"))
        source = inner.get("source")
        tokens = inner["tokens"].mapping() if "tokens" in inner else {}
        pad = inner.get("pad_to_multiple_of")
        return TokenizerRequest(
            self._token_base(source) if source else "union",
            {str(token): self._token(value) for token, value in tokens.items()},
            pad.whole(1) if pad else None,
        )

    def _token_base(self, cursor: _yaml.Cursor) -> str | Model:
        if cursor.value in ("base", "union"):
            return cursor.value
        return self._model(cursor)

    def _token(self, cursor: _yaml.Cursor) -> TokenSource:
        keys = cursor.mapping(("force", "source"))
        force = keys["force"].flag() if "force" in keys else False
        source = keys.get("source")
        if source is None:
            return TokenSource("default", force)
        if not source.is_mapping or "kind" not in source.mapping():
            return TokenSource("model", force, self._model(source))
        inner = source.mapping(("kind", "model", "token", "token_id"))
        kind = inner["kind"].text()
        if kind == "zero" and len(inner) == 1:
            return TokenSource("zero", force)
        if kind != "model_token" or "model" not in inner:
            source.fail("wants {kind: zero} or {kind: model_token, model, token}")
        if ("token" in inner) == ("token_id" in inner):
            source.fail("wants exactly one of token and token_id")
        return TokenSource(
            kind,
            force,
            self._model(inner["model"]),
            inner["token"].text() if "token" in inner else None,
            inner["token_id"].whole() if "token_id" in inner else None,
        )


def _missing(text: str, folder: pathlib.Path) -> str:
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~")):
        return (
            f"no folder {text} here or in {folder}; only local folders are read: for a "
            f"model of the Hugging Face hub, first run `hf download {text} "
            f"--local-dir {parts[1]}`"
        )
    return f"no such folder or file: {text}, here or in {folder}"


def _one(
    keys: Mapping[str, _yaml.Cursor], name: str, short: str, top: _yaml.Cursor
) -> _yaml.Cursor | None:
    if name in keys and short in keys:
        top.fail(f"{name} and {short} say the same; wants one")
    return keys.get(name, keys.get(short))


def _need(
    keys: Mapping[str, _yaml.Cursor], name: str, parent: _yaml.Cursor
) -> _yaml.Cursor:
    if name not in keys:
        parent.fail(f"wants {name}")
    return keys[name]


def _dtype(cursor: _yaml.Cursor | None) -> str | None:
    if cursor is None:
        return None
    name = cursor.text().removeprefix("torch.")
    if name not in DTYPES:
        cursor.fail(f"unknown type {name!r}; {_yaml.nearest(name, DTYPES)}")
    return name


def _setting(cursor: _yaml.Cursor) -> Setting:
    """A value, a gradient over layers, or values by name of tensor."""
    if cursor.is_mapping:
        return (_conditional(cursor),)
    if not cursor.is_list:
        return cursor.scalar()
    items = list(cursor.items())
    if all(item.is_mapping for item in items):
        return tuple(map(_conditional, items))
    return _gradient(items)


def _gradient(items: Iterable[_yaml.Cursor]) -> tuple[Scalar, ...]:
    return tuple(item.scalar() for item in items)


def _conditional(cursor: _yaml.Cursor) -> Conditional:
    keys = cursor.mapping(("filter", "value"))
    value = _need(keys, "value", cursor)
    return Conditional(
        str(keys["filter"].scalar()) if "filter" in keys else None,
        _gradient(value.items()) if value.is_list else value.scalar(),
    )


def _options(
    cursor: _yaml.Cursor, modules: tuple[Module, ...], parameters: Parameters
) -> tuple[tuple[Module, ...], Parameters]:
    """Options of the short form: a list has one value per model."""
    if not modules[0].models or modules[0].name is not None:
        cursor.fail("options go with models; here they are parameters")
    inputs = list(modules[0].models)
    shared: dict[str, Any] = dict(parameters)
    for name, value in cursor.mapping().items():
        if name in shared:
            value.fail(f"parameters give {name}, too")
        if not value.is_list:
            shared[name] = value.scalar()
            continue
        values = _gradient(value.items())
        if len(values) != len(inputs):
            value.fail(
                f"wants one value per model, {len(inputs)}; found {len(values)} "
                "(gradients over layers go under parameters)"
            )
        inputs = [
            dataclasses.replace(entry, parameters={**entry.parameters, name: one})
            for entry, one in zip(inputs, values, strict=True)
        ]
    return (dataclasses.replace(modules[0], models=tuple(inputs)),), shared
