"""From a GGUF file to the parameters of one of our backbones."""

from typing import Any

from etils import epath
from jax.typing import DTypeLike

from mtl_jax.io.gguf._reader import GgufFile
from mtl_jax.io.names._gguf_llama import gguf_llama
from mtl_jax.io.names._table import NameTable


def name_table(file: GgufFile) -> NameTable:
    """The layout of a file, by its architecture and head counts.

    `models.build(table.model, **table.options(file.metadata))` is the backbone that
    fits its weights.

    Args:
      file: an open file.

    Returns:
      A table for `load`; it keeps no tensor.

    Raises:
      ValueError: for an architecture or metadata that no backbone can express, an
        embedding that has another number of rows than the vocabulary, or another
        number of blocks.
    """
    factors = file.get("rope_freqs.weight")
    try:
        table = gguf_llama(
            file.metadata, tied="output.weight" not in file, rope_factors=factors
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    depth = table.options(file.metadata)["depth"]
    blocks = {name.split(".")[1] for name in file if name.startswith("blk.")}
    if blocks != {str(i) for i in range(min(depth, len(blocks) + 1))}:
        raise ValueError(
            f"{file.path}: the metadata has {depth} blocks, the tensors are of "
            f"{len(blocks)}"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    rows = file.shape("token_embd.weight")[0] if "token_embd.weight" in file else None
    if isinstance(tokens, list) and rows is not None and len(tokens) != rows:
        raise ValueError(
            f"{file.path}: the vocabulary has {len(tokens)} tokens, "
            f"'token_embd.weight' {rows} rows"
        )
    return table


def find(path: epath.PathLike) -> epath.Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder.

    Returns:
      A path that ends in `.gguf`, or None.

    Raises:
      ValueError: for a folder with several, naming them.
    """
    path = epath.Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir():
        return None
    found = sorted(p.name for p in path.iterdir() if p.suffix == ".gguf")
    if len(found) > 1:
        raise ValueError(f"{path}: which of {', '.join(found)}?")
    return path / found[0] if found else None


def load(
    path: epath.PathLike | GgufFile,
    like: Any = None,
    *,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Reads a file into the parameters of one of our backbones, leaf by leaf.

    Each leaf is decoded straight into its place, so that the host holds the tree, one
    leaf and a few MiB, beside pages of the mapped file.

    Args:
      path: the file, or one that is open.
      like: parameters or their `jax.eval_shape`, unrolled or scanned; gives structure,
        shapes, dtypes and shardings. None: unrolled, in the dtypes of the file, where
        quantised tensors are float32.
      dtype: of floating-point leaves; see `NameTable.load`.

    Returns:
      Nested dict of JAX arrays, to be used as `params`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a corrupt or unsupported file, or listing every tensor that is
        missing, unexpected or of the wrong shape.
    """
    file = path if isinstance(path, GgufFile) else GgufFile(path)
    where = f"gguf.load: {file.path}"
    return name_table(file).load(file, like, dtype=dtype, where=where)
