"""Vocabularies of checkpoints: read, compared, and joined."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.checkpoints._schema import Model, TokenizerRequest

__all__ = [
    "OutputVocabulary",
    "Vocabulary",
    "check_same",
    "join",
    "read_vocabulary",
    "tokenizer_files",
]

_JSON = "tokenizer.json"
_FILES = (
    _JSON,
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens of one model.

    Attributes:
      model: whose.
      ids: token -> id.
      rows: how many rows its embeddings have; tokens beyond are not usable.
      files: the tokenizer's files by name.
      added: `added_tokens` of tokenizer.json, by token.
    """

    model: Model
    ids: Mapping[str, int]
    rows: int
    files: Mapping[str, Any]
    added: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def usable(self, token: str) -> int | None:
        """Row of a token; None if the model has none."""
        row = self.ids.get(token)
        return row if row is not None and row < self.rows else None


class OutputVocabulary(NamedTuple):
    """Tokens of the output: ids, number of rows, and the tokenizer's files."""

    ids: Mapping[str, int]
    rows: int
    files: Mapping[str, Any]


def tokenizer_files(path: str) -> dict[str, pathlib.Path]:
    """The files of a tokenizer in a folder; of BASE+ADAPTER, those of the base."""
    folder = pathlib.Path(path)
    if not folder.exists():
        folder = pathlib.Path(path.partition("+")[0])
    return {name: folder / name for name in _FILES if (folder / name).is_file()}


def _json(path: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_vocabulary(
    model: Model, side_files: Mapping[str, Any], rows: int | None
) -> Vocabulary | None:
    """Reads the tokens of a model.

    They come from tokenizer.json, else from vocab.json or vocab.txt with
    added_tokens.json.

    Args:
      model: whose, for messages.
      side_files: name -> path of the files beside its weights.
      rows: of its embeddings; None: as many as there are tokens.

    Returns:
      The vocabulary; None if the model has no tokenizer at all.

    Raises:
      ValueError: for a tokenizer whose tokens are only in a file that is not read.
    """
    files = {name: side_files[name] for name in _FILES if name in side_files}
    ids: dict[str, int] = {}
    added: dict[str, Mapping[str, Any]] = {}
    if _JSON in files:
        data = _json(files[_JSON])
        try:
            known = data["model"].get("vocab", {})
            if isinstance(known, list):  # Unigram: pairs of token and score.
                known = {entry[0]: i for i, entry in enumerate(known)}
            ids.update(known)
            added = {entry["content"]: entry for entry in data.get("added_tokens", ())}
            ids.update({token: entry["id"] for token, entry in added.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{files[_JSON]}: not a tokenizer ({error})") from error
    elif "vocab.json" in files:
        ids.update(_json(files["vocab.json"]))
    elif "vocab.txt" in files:
        lines = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
        ids.update({token: i for i, token in enumerate(lines)})
    elif any(name.endswith(".model") for name in files):
        found = next(name for name in files if name.endswith(".model"))
        raise ValueError(
            f"{model}: its tokenizer is only there as {found}; save it as {_JSON} "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    else:
        return None
    if _JSON not in files and "added_tokens.json" in files:
        ids.update(_json(files["added_tokens.json"]))
    size = max(ids.values(), default=-1) + 1
    return Vocabulary(model, ids, rows if rows is not None else size, files, added)


def check_same(models: Sequence[Model], files: Sequence[Mapping[str, Any]]) -> None:
    """Refuses models whose tokenizers give a token different ids.

    Files that are equal byte for byte are not parsed.

    Raises:
      ValueError: naming both models and the first tokens that differ.
    """
    first: Vocabulary | None = None
    reference: tuple[Model, Mapping[str, Any]] | None = None
    for model, side in zip(models, files, strict=True):
        if not any(name in side for name in _FILES):
            continue
        if reference is None:
            reference = model, side
            continue
        if _same_bytes(reference[1], side):
            continue
        first = first or read_vocabulary(*reference, None)
        other = read_vocabulary(model, side, None)
        if first is None or other is None or first.ids == other.ids:
            continue
        every = {token: i for v in (other, first) for token, i in v.ids.items()}
        differing = [
            token
            for token in sorted(every, key=lambda t: (every[t], t))
            if first.ids.get(token) != other.ids.get(token)
        ]
        shown = ", ".join(
            f"{token!r} ({_id(first, token)} and {_id(other, token)})"
            for token in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"merge: the tokenizers of {first.model} and {other.model} differ: "
            f"{shown}{more}; say `tokenizer_source: base` or `union` to match rows of "
            "embeddings by token"
        )


def _same_bytes(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = (_JSON, "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer.model")
    if _JSON in one and _JSON in other:
        names = names[:1]
    there = [name for name in names if name in one]
    return bool(there) and all(
        name in other and one[name].read_bytes() == other[name].read_bytes()
        for name in there
    )


def _id(vocabulary: Vocabulary, token: str) -> str:
    return str(vocabulary.ids.get(token, "absent"))


def join(
    request: TokenizerRequest,
    vocabularies: Sequence[Vocabulary],
    donor: Vocabulary,
) -> OutputVocabulary:
    """Tokens of the output.

    `base` and a model: the tokens of `donor`. `union`: those of the donor, then those
    of the other models that it lacks, in the order of models, ordinary tokens before
    added ones, each with the next free id. Tokens that the request names and nobody
    has come last. The output has at least as many rows as the donor.

    Args:
      request: what the recipe asks for.
      vocabularies: of the models.
      donor: the base, or the model that the request names.

    Raises:
      ValueError: if tokens must be added to a tokenizer that is not a tokenizer.json.
    """
    ids = dict(donor.ids)
    new: dict[str, Mapping[str, Any]] = {}

    free = max(ids.values(), default=-1) + 1

    def add(token: str, entry: Mapping[str, Any]) -> None:
        if token not in ids:
            ids[token] = free + len(new)
            new[token] = {**_PLAIN, **entry, "id": ids[token], "content": token}

    if request.source == "union":
        for wants_added in (False, True):
            for vocabulary in vocabularies:
                for token in sorted(vocabulary.ids, key=vocabulary.ids.__getitem__):
                    is_added = token in vocabulary.added
                    if is_added == wants_added and vocabulary.usable(token) is not None:
                        add(token, vocabulary.added.get(token, {}))
    for token in request.tokens:
        add(token, {})
    used = [
        i
        for token, i in ids.items()
        if token in new or any(v.usable(token) is not None for v in vocabularies)
    ]
    rows = max(max(used, default=-1) + 1, donor.rows)
    multiple = request.pad_to_multiple_of or 1
    files = dict(donor.files)
    if new:
        files |= _with_tokens(donor, new)
    return OutputVocabulary(ids, -(-rows // multiple) * multiple, files)


_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


def _with_tokens(
    donor: Vocabulary, new: Mapping[str, Mapping[str, Any]]
) -> dict[str, bytes]:
    """The files of a tokenizer that change when tokens are added."""
    if _JSON not in donor.files:
        raise ValueError(
            f"merge: {len(new)} tokens must be added to the tokenizer of "
            f"{donor.model}, which has no {_JSON}"
        )
    data = _json(donor.files[_JSON])
    data["added_tokens"] = [*data.get("added_tokens", ()), *new.values()]
    out = {_JSON: _dump(data)}
    if "tokenizer_config.json" in donor.files:
        config = _json(donor.files["tokenizer_config.json"])
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {
                str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
                for entry in new.values()
            }
            out["tokenizer_config.json"] = _dump(config)
    return out


def _dump(data: Any) -> bytes:
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()
