"""Texts and conversations as token numbers with weights: what is to be learnt.

The weight of a token is that of predicting it. In a conversation only what the
assistant wrote counts, the end of its turn included.
"""

import bisect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# Private-use characters that mark, for a moment, where a template puts the answers.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_BEGIN_TAG = re.compile(r"(\{%-?\s*generation\s*)(?:(-%\})\s*|%\}\n?)")
_END_TAG = re.compile(r"(?:\s*(\{%-)|(?:(?<=\n)[ \t]+)?(\{%))(?=\s*endgeneration)")
CUTS = ("right", "left", "error")


class Chat(Protocol):
    """What is needed of a chat template; `io.ChatFormat` has it."""

    template: str

    def render(self, messages: Any, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        ...

    def _replace(self, *, template: str) -> "Chat": ...


def encode_text(
    text: str, tokenizer: Any, *, end: int | None = None
) -> dict[str, np.ndarray]:
    """A document of which every token is to be learnt.

    Args:
      text: the document; special tokens in it are read as such.
      tokenizer: a `tokenizers.Tokenizer`.
      end: number of a token to put at the end, or None.

    Returns:
      {"input_ids": int32[n], "weights": float32[n]}.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = [*ids, *([] if end is None else [end])]
    return {
        "input_ids": np.array(ids, np.int32),
        "weights": np.ones(len(ids), np.float32),
    }


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    chat: Chat,
    *,
    max_length: int | None = None,
    cut: str = "right",
    last_only: bool = False,
) -> dict[str, np.ndarray]:
    """A conversation of which the assistant's tokens are to be learnt.

    A token counts when its first character lies in an answer, see `answer_spans`.

    Args:
      messages: see `io.render_chat`.
      tokenizer: a `tokenizers.Tokenizer`.
      chat: the template, an `io.ChatFormat`.
      max_length: most tokens; None = all.
      cut: which end of a longer conversation goes: "right" loses the last tokens,
        "left" the first, whatever turn they are in; "error" refuses.
      last_only: only the last answer counts.

    Returns:
      {"input_ids": int32[n], "weights": float32[n] of 0 and 1}.

    Raises:
      ValueError: if no token that counts is left, if the conversation is too long where
        that is an error, or as `answer_spans`.
    """
    if cut not in CUTS:
        raise ValueError(f"encode_chat: cut is {cut!r}, wanted one of {CUTS}")
    text, spans = answer_spans(messages, chat)
    spans = spans[-1:] if last_only else spans
    found = tokenizer.encode(text, add_special_tokens=False)
    starts = [start for start, _ in spans]
    weights = np.zeros(len(found.ids), np.float32)
    for i, (begin, _) in enumerate(found.offsets):
        place = bisect.bisect_right(starts, begin) - 1
        weights[i] = place >= 0 and begin < spans[place][1]
    ids = np.array(found.ids, np.int32)
    if max_length is not None and len(ids) > max_length:
        if cut == "error":
            raise ValueError(
                f"encode_chat: {len(ids)} tokens, at most {max_length} wanted"
            )
        kept = (
            slice(max_length) if cut == "right" else slice(len(ids) - max_length, None)
        )
        ids, weights = ids[kept], weights[kept]
    if not weights.any():
        raise ValueError(
            f"encode_chat: no answer among the {len(ids)} tokens"
            + ("" if max_length is None else f" that max_length={max_length} leaves")
        )
    return {"input_ids": ids, "weights": weights}


def answer_spans(
    messages: Sequence[Mapping[str, Any]], chat: Chat
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it the assistant speaks.

    A template that marks its answers with `{% generation %}` is believed. Of another
    one an answer is what the conversation up to it has more than the conversation
    before it with the beginning of an answer: from after `<|im_start|>assistant`,
    say, to the end of the turn.

    Args:
      messages: see `io.render_chat`.
      chat: the template.

    Returns:
      (text, [(first character, one after the last), ...] in order).

    Raises:
      ValueError: if no message is by the assistant, or if the template writes earlier
        turns differently once there are later ones, naming the message.
    """
    text = chat.render(messages)
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not answers:
        raise ValueError(f"answer_spans: none of {len(messages)} messages is an answer")
    if _BEGIN_TAG.search(chat.template):
        return text, _marked(messages, chat, text)
    spans = []
    for i in answers:
        before = chat.render(messages[:i], add_generation_prompt=True)
        after = text if i + 1 == len(messages) else chat.render(messages[: i + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"answer_spans: the template writes what is before message {i} "
                "differently once it is there, or what is after it changes it; mark "
                "the answers in it with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _marked(messages, chat, text):
    """Spans between the marks that stand beside the tags of the template."""

    def begin(match):
        dash = "-" if match[2] else ""
        return f"{match[1]}{match[2] or '%}'}{{{{{dash} '{_OPEN}' {dash}}}}}"

    def end(match):
        tag = match[1] or match[2]
        dash = "-" if match[1] else ""
        return f"{{{{{dash} '{_CLOSE}' {dash}}}}}{tag}"

    template = _END_TAG.sub(end, _BEGIN_TAG.sub(begin, chat.template))
    marked = chat._replace(template=template).render(messages)
    spans, pieces, at = [], [], 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            spans.append((at, at))
        elif piece == _CLOSE and spans:
            spans[-1] = (spans[-1][0], at)
        else:
            pieces.append(piece)
            at += len(piece)
    if "".join(pieces) != text or not spans:
        raise ValueError(
            "answer_spans: the {% generation %} tags of the template cannot be followed"
        )
    return spans
