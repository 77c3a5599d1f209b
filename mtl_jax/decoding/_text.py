"""From tokens to text as they come, on the host."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_BROKEN = "\ufffd"


class Detokenizer:
    """Text of a growing token sequence, in pieces that hold whole characters.

    A token may end within a character, or change how the next one is written. A piece
    is handed over only when nothing that comes later can change it; the pieces and
    `flush` together are what the tokenizer decodes from all tokens.

    >>> class Bytes:
    ...     def decode(self, ids, skip_special_tokens=True):
    ...         return bytes(ids).decode(errors="replace")
    >>> text = Detokenizer(Bytes())
    >>> [text.push(byte) for byte in "é!".encode()], text.flush()
    (['', 'é', '!'], '')
    """

    def __init__(
        self, tokenizer: "tokenizers.Tokenizer", *, skip_special_tokens: bool = True
    ):
        """Args: tokenizer; skip_special_tokens: leave them out of the text."""
        self._decode = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens
        )
        # Tokens whose text is out, kept for their effect on the next; then the others.
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        self._waiting.append(int(token))
        text = self._text()
        # The end of a character may be missing.
        if not text or text.endswith(_BROKEN):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is left, with U+FFFD for what is no character."""
        text = self._text()
        self._before, self._waiting = self._waiting, []
        return text

    def _text(self):
        known = self._decode(self._before)
        return self._decode(self._before + self._waiting)[len(known) :]


class StopStrings:
    """Cuts a text that comes in pieces at the first of some strings.

    What could be the beginning of a stop string is held back until it is certain.

    >>> cut = StopStrings(["END"])
    >>> cut.push("to the E"), cut.push("NDless"), cut.found
    ('to the ', '', 'END')
    """

    def __init__(self, stops: Sequence[str]):
        """Args: stops: the strings, none empty."""
        if isinstance(stops, str) or not all(stops):
            raise ValueError(f"StopStrings: wanted non-empty strings, found {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The string that ended the text, if any."""

    def push(self, piece: str) -> str:
        """The text that is certain now; nothing after a stop."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(text.find(s), -len(s), s) for s in self._stops if s in text]
        if hits:
            at, _, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once the text is over."""
        text, self._held = self._held, ""
        return text


def _overlap(text, stop):
    """Length of the longest end of the text that begins the stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
