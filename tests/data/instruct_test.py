import types

import numpy as np
import pytest

from mtl_jax import io
from mtl_jax.data import instruct

pytest.importorskip("jinja2")
pytestmark = pytest.mark.fast

# As in SmolLM2: a system message is put in front where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<s>system\nBe kind</s>\n' }}{% endif %}"
    "{{'<s>' + message['role'] + '\n' + message['content'] + '</s>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MARKED = (
    "{%- for m in messages %}\n  {{- '<' + m.role + '>' }}\n"
    "  {%- if m.role == 'assistant' %}\n    {%- generation -%}\n"
    "  {{ m.content }}</s>\n    {%- endgeneration %}\n"
    "  {%- else %}\n    {{- m.content }}\n  {%- endif %}\n{%- endfor %}"
)
PLAIN_MARKS = (
    "{% for m in messages %}\n<{{ m.role }}>\n{% if m.role == 'assistant' %}\n"
    "  {% generation %}\n{{ m.content }}</s>\n  {% endgeneration %}\n"
    "{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}"
)
# Thoughts of earlier turns are left out, as newer templates do.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else "
    "m.content.split('!')[-1] }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " one "},
    {"role": "user", "content": "And </s> now?"},
    {"role": "assistant", "content": "two"},
]


class Letters:
    """One token per character, but the end of a turn, which is one."""

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        offsets, at = [], 0
        while at < len(text):
            size = 4 if text.startswith("</s>", at) else 1
            offsets.append((at, at + size))
            at += size
        ids = [1 if b - a == 4 else ord(text[a]) for a, b in offsets]
        return types.SimpleNamespace(ids=ids, offsets=offsets)


def shown(found):
    """What is to be learnt, tokens that do not count as dots."""
    pairs = zip(found["input_ids"], found["weights"], strict=True)
    return "".join("/" if i == 1 and w else chr(i) if w else "." for i, w in pairs)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, [" one </s>\n", "two</s>\n"]),
        (MARKED, [" one </s>", "two</s>"]),
        (PLAIN_MARKS, [" one </s>\n", "two</s>\n"]),
    ],
)
def test_answers_are_found(template, wanted):
    chat = io.ChatFormat(template)
    text, spans = instruct.answer_spans(CHAT, chat)
    assert text == chat.render(CHAT)
    assert [text[a:b] for a, b in spans] == wanted


def test_only_answers_count():
    chat = io.ChatFormat(CHATML)
    found = instruct.encode_chat(CHAT, Letters(), chat)
    assert shown(found).replace(".", "") == " one /\ntwo/\n"
    assert found["input_ids"].dtype == np.int32
    assert found["weights"].dtype == np.float32
    last = instruct.encode_chat(CHAT, Letters(), chat, last_only=True)
    assert shown(last).replace(".", "") == "two/\n"


def test_cutting():
    chat = io.ChatFormat(CHATML)
    whole = instruct.encode_chat(CHAT, Letters(), chat)
    for cut, part in (("right", slice(45)), ("left", slice(-45, None))):
        found = instruct.encode_chat(CHAT, Letters(), chat, max_length=45, cut=cut)
        for name in whole:
            np.testing.assert_array_equal(found[name], whole[name][part])
    with pytest.raises(ValueError, match="tokens, at most 45 wanted"):
        instruct.encode_chat(CHAT, Letters(), chat, max_length=45, cut="error")
    with pytest.raises(ValueError, match="no answer among the 5 tokens that max_leng"):
        instruct.encode_chat(CHAT, Letters(), chat, max_length=5)
    with pytest.raises(ValueError, match="cut is 'middle'"):
        instruct.encode_chat(CHAT, Letters(), chat, cut="middle")


def test_templates_that_rewrite_the_past_are_refused():
    talk = [*CHAT[:1], {"role": "assistant", "content": "hm! yes"}, *CHAT[2:]]
    with pytest.raises(ValueError, match="before message 1 differently"):
        instruct.answer_spans(talk, io.ChatFormat(FORGETFUL))
    with pytest.raises(ValueError, match="none of 1 messages is an answer"):
        instruct.answer_spans(CHAT[:1], io.ChatFormat(CHATML))


def test_texts():
    found = instruct.encode_text("ab", Letters(), end=1)
    assert found["input_ids"].tolist() == [97, 98, 1]
    assert found["weights"].tolist() == [1.0, 1.0, 1.0]
