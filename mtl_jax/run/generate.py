"""`mtl-jax generate`: text from a checkpoint, shown as it comes."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mtl_jax import decoding, io, models
from mtl_jax.decoding import logits
from mtl_jax.io.pretrained import gguf_in
from mtl_jax.zoo import language

if TYPE_CHECKING:
    import tokenizers

_KNOWN = {"smollm2-135m-instruct": language.smollm2}
_SAMPLING = {
    "top_k": logits.top_k,
    "top_p": logits.top_p,
    "min_p": logits.min_p,
}


class Checkpoint(NamedTuple):
    """A model that is ready to write.

    Attributes:
      module: a `models.Decoder`.
      params: all leaves.
      tokenizer: text to token numbers and back.
      ends: tokens that end a text.
      chat: the format of conversations, or None.
    """

    module: nn.Module
    params: Any
    tokenizer: "tokenizers.Tokenizer"
    ends: tuple[int, ...]
    chat: io.ChatFormat | None


def open_checkpoint(
    name: str,
    *,
    chat: bool = False,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Reads a model with its tokenizer.

    Args:
      name: a GGUF file or a folder with one, a folder as `transformers` writes them,
        or a known name.
      chat: its chat format is wanted, and what ends a turn ends a text.
      dtype: of parameters and computation; None = float32.
      progress: receives a line about each download.

    Returns:
      `Checkpoint`, the layers of the module scanned.

    Raises:
      FileNotFoundError: if something is not there, such as a tokenizer.
      ValueError: for a name or a kind of model that is not known, a corrupt file, or
        parts that do not belong together.
    """
    path = epath.Path(name)
    options = {"scan": True} | ({} if dtype is None else {"param_dtype": dtype})
    if not path.exists():
        if name not in _KNOWN:
            raise FileNotFoundError(
                f"no such file or folder: {name}; models known by name: "
                f"{', '.join(_KNOWN)}"
            )
        found = _of_model(_KNOWN[name](progress=progress, **options), chat)
    elif gguf := gguf_in(path):
        found = _of_model(language.open_gguf(gguf, **options), chat)
    elif path.is_dir():
        found = _open_folder(path, chat, options)
    else:
        raise ValueError(f"{name} is neither a folder nor a GGUF file (*.gguf)")
    _check_vocabulary(name, found.tokenizer, found.module)
    if chat and found.chat is None:
        raise ValueError(f"{name} has no chat template; leave out --chat")
    return found


def _of_model(model, chat):
    roles = ("eos", "end_of_turn") if chat else ("eos",)
    found = (model.special[role] for role in roles)
    ends = tuple(dict.fromkeys(end for end in found if end is not None))
    return Checkpoint(model.module, model.params, model.tokenizer, ends, model.chat)


def _open_folder(path, chat, options):
    config = io.read_config(path)
    table = io.names.of_config(config, model="decoder", where=str(path))
    module = models.build(table.model, **{**table.options(config), **options})
    tokenizer = io.load_tokenizer(path)
    # Before the weights are read, which can take long.
    _check_vocabulary(path, tokenizer, module)
    chat_format = io.read_chat_format(path) if chat else None
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = io.load_pretrained(path, table, like["params"])
    ends = dict.fromkeys(_ends(path, config))
    if chat_format is not None:
        turn = tokenizer.token_to_id(chat_format.eos_token)
        ends |= {} if turn is None else {turn: None}
    return Checkpoint(module, params, tokenizer, tuple(ends), chat_format)


def _ends(path, config):
    """The end tokens of a folder; those for generation come first."""
    file = path / "generation_config.json"
    if file.is_file():
        try:
            own = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: not a JSON object: {error}") from error
        config = {**config, **{k: x for k, x in own.items() if x is not None}}
    end = config.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    if not all(type(e) is int and e >= 0 for e in ends):
        raise ValueError(f"{path}: eos_token_id is {end!r}, wanted token numbers")
    return tuple(ends)


def _check_vocabulary(name, tokenizer, module):
    """Models may pad their vocabulary, but each token needs a row."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > module.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {size} tokens, the model {module.vocab_size}"
        )


def main(args: argparse.Namespace) -> None:
    """Writes the continuation to standard output, and how fast to standard error.

    Args:
      args: as `mtl-jax generate` takes them.

    Raises:
      ValueError: for options that do not fit together, an empty prompt, or one that
        is longer than the context; else as `open_checkpoint`.
    """
    process = _processor(args)
    stops = decoding.StopStrings(args.stop)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    model = open_checkpoint(
        args.checkpoint, chat=args.chat, dtype=args.dtype, progress=_say
    )
    ids = _encode(model, prompt, args)
    context = model.module.max_positions
    room = context - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the context of the model is {context}"
        )
    if room < args.max_new_tokens:
        _say(f"the context of {context} tokens has room for {room} more")
    new = min(args.max_new_tokens, room)
    run = _search if args.beam else _stream
    run(model, ids, new, process, stops, args)


def _processor(args):
    """Checks the options of sampling and puts them together."""
    if args.max_new_tokens < 1:
        raise ValueError(
            f"--max-new-tokens must be 1 or more, is {args.max_new_tokens}"
        )
    if args.beam is not None and args.beam < 1:
        raise ValueError(f"--beam must be 1 or more, is {args.beam}")
    if args.system is not None and not args.chat:
        raise ValueError("--system belongs to --chat")
    parts = []
    if args.repetition_penalty is not None:
        parts.append(logits.repetition_penalty(args.repetition_penalty))
    if args.temperature:
        if args.beam:
            raise ValueError("--beam searches and --temperature samples: choose one")
        parts.append(logits.temperature(args.temperature))
    for name, make in _SAMPLING.items():
        value = getattr(args, name)
        if value is not None:
            if not args.temperature:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} needs a --temperature above 0")
            parts.append(make(value))
    return logits.chain(*parts) if parts else None


def _encode(model: Checkpoint, prompt: str, args: argparse.Namespace) -> list[int]:
    if args.chat and model.chat is not None:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        text = model.chat.render(messages, add_generation_prompt=True)
        ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = model.tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("the prompt has no tokens")
    return ids


def _stream(model, ids, new, process, stops, args):
    """Token by token, until the model, a stop string or the length ends it."""
    text = decoding.Detokenizer(model.tokenizer)
    begin = time.perf_counter()
    times = []
    for out in decoding.stream(
        decoding.from_decoder(model.module),
        model.params,
        [ids],
        max_new_tokens=new,
        key=jax.random.key(args.seed) if args.temperature else None,
        process=process,
        stop=model.ends,
    ):
        times.append(time.perf_counter())
        _refuse_not_finite(int(out.reasons[0]) == decoding.Reason.NOT_FINITE)
        if out.reasons[0] == decoding.Reason.STOP:
            break
        _write(stops.push(text.push(out.tokens[0, -1])))
        if stops.found is not None:
            break
    _write(stops.push(text.flush()) + stops.flush() + "\n")
    line = f"{len(ids)} + {len(times)} tokens, the first after {times[0] - begin:.1f} s"
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        line += f", then {rate:.1f} tokens/s"
    _say(line)


def _search(model, ids, new, process, stops, args):
    """The best text of a beam search, at once."""
    begin = time.perf_counter()
    found = decoding.beam_search(
        decoding.from_decoder(model.module),
        model.params,
        [ids],
        max_new_tokens=new,
        beams=args.beam,
        process=process,
        stop=model.ends,
    )
    _refuse_not_finite(bool(np.isnan(found.scores[0]).any()))
    best = found.rows()[0][0]
    text = model.tokenizer.decode(best, skip_special_tokens=True)
    _write(stops.push(text) + stops.flush() + "\n")
    seconds = time.perf_counter() - begin
    _say(f"{len(ids)} + {len(best)} tokens in {seconds:.1f} s, compilation included")


def _refuse_not_finite(broken: bool) -> None:
    if broken:
        raise ValueError(
            "the logits of the model are not finite: are its weights damaged?"
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
