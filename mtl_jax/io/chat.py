"""Chat templates: messages to the text that a model was tuned on.

A template comes with a checkpoint and is foreign code. It is rendered by Jinja2's
immutable sandbox and sees plain data only: it can loop for long, but it cannot reach
Python objects, files or the network.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from mtl_jax.io import gguf

if TYPE_CHECKING:
    import jinja2

_CONFIG = "tokenizer_config.json"
_FILE = "chat_template.jinja"
_NAME = "default"


class ChatFormat(NamedTuple):
    """What a checkpoint says about conversations.

    Attributes:
      template: Jinja2 source.
      bos_token: the token that begins a text, or "".
      eos_token: the token that ends an answer, or "".
    """

    template: str
    bos_token: str = ""
    eos_token: str = ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime.datetime | None = None,
    ) -> str:
        """The conversation as text; see `render_chat`."""
        return render_chat(
            messages,
            self.template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            tools=tools,
            now=now,
        )


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = False,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> str:
    """Writes a conversation as one text.

    The text holds special tokens already: encode it with `add_special_tokens=False`.
    Contents are inserted as they are, so that text from strangers can contain the
    spelling of special tokens.

    Args:
      messages: each a mapping with a string `role`, usually `content`, and whatever
        else the template reads; plain data throughout.
      template: Jinja2 source.
      add_generation_prompt: end with what begins an answer.
      bos_token: the token that begins a text.
      eos_token: the token that ends an answer.
      tools: JSON schemas of functions, for templates that know them.
      now: what `strftime_now` formats; None = the time of the call.
      **variables: more plain data that the template reads.

    Returns:
      The text.

    Raises:
      ValueError: for a template that is not valid, a message that is no mapping with a
        role or not plain data, or a conversation that the template refuses, naming
        the message that it stops at.

    >>> render_chat([{"role": "user", "content": "Hi"}],
    ...             "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    '<user>Hi'
    """
    chat = [_message(i, message) for i, message in enumerate(messages)]
    values = {
        "add_generation_prompt": bool(add_generation_prompt),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "tools": None if tools is None else _plain(list(tools), "tools"),
        **{name: _plain(value, name) for name, value in variables.items()},
    }
    compiled = _compiled(template)

    def run(count):
        at = now or datetime.datetime.now()
        return compiled.render(
            messages=chat[:count], strftime_now=at.strftime, **values
        )

    try:
        return run(len(chat))
    # Whatever a foreign template does wrong, Python errors inside it included.
    except Exception as error:
        raise ValueError(_blame(run, chat, error)) from error


def read_chat_format(path: epath.PathLike | gguf.GgufFile) -> ChatFormat:
    """The chat template of a checkpoint and the tokens that it may use.

    Args:
      path: a GGUF file, open or not, or a checkpoint folder with
        `tokenizer_config.json` and maybe `chat_template.jinja`. Of several named
        templates the one called "default" is taken.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if there is no template, or the file is corrupt.
    """
    if isinstance(path, gguf.GgufFile):
        return _of_gguf(path)
    path = epath.Path(path)
    if path.suffix == ".gguf":
        return _of_gguf(gguf.GgufFile(path))
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(f"no such file: {path / _CONFIG}")
    try:
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / _CONFIG}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / _CONFIG}: must be a JSON object")
    template = config.get("chat_template")
    if (path / _FILE).is_file():
        template = (path / _FILE).read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if type(t) is dict}
        template = named.get(_NAME)
    if not isinstance(template, str):
        raise ValueError(f"{path}: has no chat template")
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name) or ""
        token = token.get("content", "") if isinstance(token, dict) else token
        tokens[name] = str(token)
    return ChatFormat(template, **tokens)


def _of_gguf(file):
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise ValueError(f"{file.path}: has no chat template")
    ends = gguf.special_tokens(file)
    return ChatFormat(template, ends["bos"] or "", ends["eos"] or "")


def _message(number, message):
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"render_chat: message {number} is {message!r:.80}, wanted a mapping with "
            "a string 'role'"
        )
    return _plain(message, f"message {number}")


def _plain(value, where):
    """A copy of exact JSON types, so that a template meets no other methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {
            _key(key, where): _plain(item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"render_chat: {where} is a {type(value).__name__}, wanted plain data"
    )


def _key(key, where):
    if type(key) is not str:
        raise ValueError(f"render_chat: {where} has the key {key!r}, wanted strings")
    return key


def _blame(run, chat, error):
    """Says at which message the template stops: the first whose addition fails."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    for count in range(1, len(chat) + 1):
        try:
            run(count)
        except Exception as other:
            if str(other) == str(error):
                role = chat[count - 1]["role"]
                return f"render_chat: at message {count - 1} ({role!r}): {text}"
    return f"render_chat: {text}"


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"render_chat: line {error.lineno} of the template: {error.message}"
        ) from error


@functools.cache
def _environment():
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the model wrote: rendered as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Attributes that a template may set, but none of Python's own."""

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.sandbox.SecurityError(f"namespace attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(**attributes):
        out = Namespace()
        for name, value in attributes.items():
            out[name] = value
        return out

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    out = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    out.filters["tojson"] = tojson
    out.globals.update(raise_exception=raise_exception, namespace=namespace)
    return out
