"""Where the bytes of each tensor go, before any of them is known."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from mtl_jax.checkpoints.source import TensorSpec
from mtl_jax.io import safetensors, shards


class Place(NamedTuple):
    """Where a tensor goes.

    Attributes:
      file: name of the file.
      offset: of its first byte in the file.
      spec: of the tensor.
    """

    file: str
    offset: int
    spec: TensorSpec


class Layout:
    """The files of a checkpoint: headers and the places of all tensors.

    Args:
      specs: tensors in the order in which files are filled.
      shard_bytes: at most so many bytes of tensors in a file, or one tensor.
      metadata: of every file; None = as PyTorch programs expect.

    Attributes:
      headers: file -> what it begins with.
      sizes: file -> bytes.
      places: tensor -> where it goes.
      index: text of the index, or None for one file.

    Raises:
      ValueError: without tensors, or for a dtype that the format lacks.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int,
        metadata: Mapping[str, str] | None = None,
    ):
        metadata = {"format": "pt"} if metadata is None else metadata
        if not specs:
            raise ValueError("CheckpointWriter: there are no tensors to write")
        if shard_bytes < 1:
            raise ValueError(
                f"CheckpointWriter: shard_bytes wants at least 1, found {shard_bytes}"
            )
        sizes = {name: spec.nbytes for name, spec in specs.items()}
        files = shards.divide(sizes, shard_bytes)
        self.index = shards.index(files, sizes) if len(files) > 1 else None
        if self.index is None:
            files = {shards.WEIGHTS: list(specs)}
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.places: dict[str, Place] = {}
        for file, names in files.items():
            part = {name: specs[name] for name in names}
            self.headers[file] = safetensors.header(part, metadata)
            offset = len(self.headers[file])
            for name in safetensors.order(part):
                self.places[name] = Place(file, offset, part[name])
                offset += sizes[name]
            self.sizes[file] = offset

    def digest(self, plan: str) -> str:
        """Identifies a plan and this layout of what it makes."""
        digest = hashlib.sha256(plan.encode())
        for file, header in self.headers.items():
            digest.update(f"\0{file}\0".encode() + header)
        return digest.hexdigest()
