import datetime
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from mtl_jax import io
from mtl_jax.io import chat

pytestmark = pytest.mark.fast
pytest.importorskip("jinja2")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Alternating roles, as the templates of Llama 2 and Gemma demand them.
STRICT = """{{ bos_token }}{% for m in messages %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {{- m.role ~ ":" ~ m.content | trim ~ eos_token -}}
{% endfor %}"""


def user(content="Hi", **more):
    return {"role": "user", "content": content, **more}


ANSWER = {"role": "assistant", "content": "Hello"}


def test_messages_in_turn():
    assert chat.render_chat([user(), ANSWER, user("a\nb")], CHATML) == (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\na\nb<|im_end|>\n"
    )
    assert chat.render_chat([user()], CHATML, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render_chat([], CHATML) == ""


def test_tokens_whitespace_and_helpers():
    got = chat.render_chat([user(" Hi ")], STRICT, bos_token="<s>", eos_token="</s>")
    assert got == "<s>user:Hi</s>"
    now = datetime.datetime(2026, 1, 31)
    got = chat.render_chat([], "{{ strftime_now('%d %b %Y') }}", now=now)
    assert got == "31 Jan 2026"
    assert len(chat.render_chat([], "{{ strftime_now('%Y') }}")) == 4
    tools = [{"name": "f", "note": "<é & '>", "n": 1}]
    got = chat.render_chat([], "{{ tools | tojson }}", tools=tools)
    assert got == json.dumps(tools, ensure_ascii=False)
    got = chat.render_chat([], "{{ tools[0] | tojson(indent=1) }}", tools=tools)
    assert got == json.dumps(tools[0], ensure_ascii=False, indent=1)
    assert chat.render_chat([], "{{ tools is none }}") == "True"
    loops = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
    assert chat.render_chat([], loops + "{% endfor %}") == "01"
    assert chat.render_chat([], "{{ mode }}", mode="on") == "on"
    found = "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    assert chat.render_chat([], found) == "2"
    marked = "a{% generation %}b{{ eos_token }}{% endgeneration %}c"
    assert chat.render_chat([], marked, eos_token="!") == "ab!c"


@hypothesis.given(st.lists(st.text(), max_size=4))
def test_contents_are_inserted_as_they_are(contents):
    messages = [user(content) for content in contents]
    want = "".join(f"<|im_start|>user\n{c}<|im_end|>\n" for c in contents)
    assert chat.render_chat(messages, CHATML) == want


def test_contents_are_not_templates():
    text = "{{ 1 + 1 }}{% for x in y %} &lt; <b>"
    assert text in chat.render_chat([user(text)], CHATML)


def test_refusals_of_a_template_name_the_message():
    good = [user(), ANSWER, user()]
    chat.render_chat(good, STRICT)
    with pytest.raises(
        ValueError, match=r"at message 3 \('user'\): TemplateError: roles must alt"
    ):
        chat.render_chat([*good, user(), ANSWER], STRICT)
    with pytest.raises(ValueError, match=r"render_chat: at message 1 .*UndefinedError"):
        chat.render_chat([user(), {"role": "user"}], "{% set x = messages %}" + CHATML)
    with pytest.raises(ValueError, match="^render_chat: TemplateError: never$"):
        chat.render_chat([], "{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        chat.render_chat([user()], "{{ 1 / 0 }}")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("Hi", "message 1 is 'Hi', wanted a mapping with a string 'role'"),
        ({"content": "Hi"}, "message 1 is .*wanted a mapping"),
        ({"role": 3}, "message 1 is .*wanted a mapping"),
        (user(object()), r"message 1\['content'\] is a object, wanted plain data"),
        (
            user([{"type": "image", "image": b""}]),
            r"message 1.*\[0\]\['image'\] is a bytes",
        ),
        ({"role": "user", 1: 2}, "message 1 has the key 1, wanted strings"),
    ],
)
def test_messages_that_are_none_are_named(message, text):
    with pytest.raises(ValueError, match=f"render_chat: {text}"):
        chat.render_chat([user(), message], CHATML)


def test_lists_of_parts_are_plain_data():
    parts = ({"type": "text", "text": "Hi"},)
    got = chat.render_chat([user(parts)], "{{ messages[0].content[0].text }}")
    assert got == "Hi"


def test_syntax_errors_name_the_line():
    with pytest.raises(ValueError, match="render_chat: line 2 of the template: "):
        chat.render_chat([], "a\n{% if %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ strftime_now.__func__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0.__class__.__base__}'.format_map({'0': ''}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(attack):
    """Either refused, or undefined and so empty."""
    messages = [user()]
    try:
        assert chat.render_chat(messages, attack) == ""
    except ValueError as error:
        assert "render_chat: " in str(error)
    assert messages == [user()]


def test_formats_of_gguf_files(tmp_path):
    path = tmp_path / "x.gguf"
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    io.gguf.save(path, {}, {**vocabulary, "tokenizer.chat_template": STRICT})
    for given in (path, io.gguf.GgufFile(path)):
        got = chat.read_chat_format(given)
        assert got == chat.ChatFormat(STRICT, "<s>", "</s>")
    assert got.render([user()]) == "<s>user:Hi</s>"
    io.gguf.save(path, {}, vocabulary)
    with pytest.raises(ValueError, match=r"x\.gguf: has no chat template"):
        chat.read_chat_format(path)


def test_formats_of_folders(tmp_path):
    def write(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        chat.read_chat_format(tmp_path)
    write(chat_template="a", bos_token=None, eos_token={"content": "</s>"})
    assert chat.read_chat_format(tmp_path) == chat.ChatFormat("a", "", "</s>")
    named = [{"name": n, "template": t} for n, t in (("rag", "b"), ("default", "c"))]
    write(chat_template=named)
    assert chat.read_chat_format(tmp_path) == chat.ChatFormat("c")
    write(chat_template=named[:1])
    with pytest.raises(ValueError, match="has no chat template"):
        chat.read_chat_format(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("d")
    assert chat.read_chat_format(tmp_path).template == "d"
    for text, message in (("{", "not valid JSON"), ("[]", "must be a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            chat.read_chat_format(tmp_path)
