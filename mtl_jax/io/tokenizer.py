"""Tokenizers of checkpoints: `tokenizer.json`, or the vocabulary of a GGUF file."""

from typing import TYPE_CHECKING

from etils import epath

from mtl_jax.io import gguf

if TYPE_CHECKING:
    import tokenizers

_FILE = "tokenizer.json"


def load_tokenizer(path: epath.PathLike) -> "tokenizers.Tokenizer":
    """Reads a tokenizer, without the cutting or padding that its file may ask for.

    Args:
      path: a GGUF file (`*.gguf`), a `tokenizer.json`, or a checkpoint folder with
        one.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is corrupt, or a vocabulary of a kind that is not known.
    """
    import tokenizers

    path = epath.Path(path)
    if path.suffix == ".gguf":
        return gguf.tokenizer(gguf.GgufFile(path))
    if path.is_dir():
        if not (path / _FILE).is_file():
            found = ", ".join(sorted(child.name for child in path.iterdir()))
            raise FileNotFoundError(
                f"{path} has no {_FILE}; found: {found or 'nothing'}"
            )
        path = path / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        out = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exceptions.
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    out.no_padding()
    out.no_truncation()
    return out
