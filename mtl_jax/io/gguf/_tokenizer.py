"""The vocabulary in a GGUF file as a `tokenizers.Tokenizer`.

Two kinds of vocabulary are understood. "gpt2" is byte-pair encoding over the bytes of
words; the file lists its merges and names how text splits into words. "llama" is
SentencePiece's byte-pair encoding over characters, whose merges follow from the scores
of the tokens, with tokens for single bytes where a character is unknown.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_jax.io.gguf._reader import GgufFile

if TYPE_CHECKING:
    import tokenizers

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers by name: split off single digits first; then a pattern of words (None:
# that of GPT-2); whole words may skip the merges; a BOS is added unless denied; NFC.
_GPT2 = {"digits": False, "words": None, "whole": False, "bos": False, "nfc": False}
_DIGITS = {**_GPT2, "digits": True}
_LLAMA3 = {**_GPT2, "words": _WORDS % "{1,3}", "whole": True, "bos": True}
_QWEN2 = {**_GPT2, "words": _WORDS % "", "nfc": True}
_PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), {**_LLAMA3, "whole": False, "bos": False}),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": {**_QWEN2, "nfc": False},
}
_SPACE = "\u2581"
_ROLES = ("bos", "eos", "unknown", "padding")
# What ends a turn of a conversation, where a file does not say so.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def tokenizer(file: GgufFile) -> "tokenizers.Tokenizer":
    """The tokenizer of a file, with its special and added tokens.

    `encode` adds the tokens for begin and end where the file says so; pass
    `add_special_tokens=False` for text, such as that of a chat template, that has
    them already.

    Args:
      file: an open file.

    Returns:
      A `tokenizers.Tokenizer` without truncation or padding.

    Raises:
      ValueError: if the file has no vocabulary, one of a kind that is not known, or
        one that contradicts itself; naming the fault.

    **Differs**: a byte that a "gpt2" vocabulary lacks becomes its unknown token,
    where it has one; llama.cpp and transformers drop the byte. In a "llama"
    vocabulary each stretch of text between special tokens gets a space in front, as
    in llama.cpp and the published `tokenizer.json` of Llama 2; transformers gives one
    to the first stretch only, and only where none is there. It also reads neither
    `add_space_prefix` nor that "smollm" and its like split off single digits.
    """
    vocabulary = _Vocabulary(file)
    if vocabulary.kind == "gpt2":
        out, add_bos = _byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        out, add_bos = _sentencepiece(vocabulary), True
    else:
        raise vocabulary.fault(
            f"{_KEY}model={vocabulary.kind!r} is not supported, only 'gpt2', 'llama'"
        )
    _add_tokens(out, vocabulary)
    _add_ends(out, vocabulary, add_bos)
    return out


def special_tokens(file: GgufFile) -> dict[str, str | None]:
    """The tokens that have a role in a file.

    Returns:
      bos, eos, unknown, padding and end_of_turn, each a token or None. A file that
      does not say what ends a turn may have one of the usual control tokens for it.

    Raises:
      ValueError: if the file has no vocabulary, or a number is outside of it.
    """
    vocabulary = _Vocabulary(file)
    out = {name: vocabulary.special(name) for name in _ROLES}
    return {**out, "end_of_turn": vocabulary.special("eot") or vocabulary.turn()}


class _Vocabulary:
    """What the metadata says, checked for agreement with itself."""

    def __init__(self, file: GgufFile):
        self._file = file
        self.kind = self.get("model")
        if not isinstance(self.kind, str):
            raise self.fault(f"{_KEY}model is {self.kind!r}: there is no vocabulary")
        self.tokens = self.strings("tokens")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            second = next(i for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise self.fault(
                f"{_KEY}tokens has {self.tokens[second]!r} twice, at {second} and "
                f"{self.ids[self.tokens[second]]}"
            )
        types = self.numbers("token_type")
        self.types = np.full(len(self.tokens), _NORMAL) if types is None else types

    def fault(self, message: str) -> ValueError:
        return ValueError(f"{self._file.path}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(_KEY + key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"{_KEY}{key} is {value!r}, wanted a boolean")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.fault(f"{_KEY}{key} is missing or no list of strings")
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """One number per token."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.shape != (len(self.tokens),):
            found = len(value) if isinstance(value, np.ndarray | list) else value
            raise self.fault(
                f"{_KEY}{key} has {found} entries for {len(self.tokens)} tokens"
            )
        return value

    def special(self, name: str) -> str | None:
        """The token whose number the file gives under `<name>_token_id`."""
        key = f"{name}_token_id"
        number = self.get(key)
        # Some writers state "none" as the largest number.
        if number is None or number == 0xFFFFFFFF:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise self.fault(
                f"{_KEY}{key} is {number!r}, but there are {len(self.tokens)} tokens"
            )
        return self.tokens[number]

    def turn(self) -> str | None:
        """The usual control token that ends a turn."""
        known = (self.ids.get(token) for token in _ENDS_OF_TURN)
        control = (i for i in known if i is not None and self.types[i] == _CONTROL)
        number = next(control, None)
        return None if number is None else self.tokens[number]


def _byte_level(vocabulary):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get("pre")
    if not isinstance(name, str) or name not in _PRE:
        raise vocabulary.fault(
            f"{_KEY}pre={name!r} is not supported, only {', '.join(map(repr, _PRE))}"
        )
    rules = _PRE[name]
    out = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_listed_merges(vocabulary),
            unk_token=vocabulary.special("unknown"),
            ignore_merges=rules["whole"],
        )
    )
    steps: list[Any] = []
    if rules["digits"]:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules["words"]:
        words = tokenizers.Regex(rules["words"])
        steps.append(pre_tokenizers.Split(words, behavior="isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=rules["words"] is None
        )
    )
    out.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    out.decoder = decoders.ByteLevel()  # pyright: ignore
    if rules["nfc"]:
        out.normalizer = normalizers.NFC()  # pyright: ignore
    return out, rules["bos"]


def _listed_merges(vocabulary):
    """Pairs, best first; each part and the whole must be tokens."""
    merges = []
    for i, merge in enumerate(vocabulary.strings("merges")):
        # The first character may itself be a space.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise vocabulary.fault(
                f"{_KEY}merges[{i}] is {merge!r}, wanted two tokens that make a third"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(vocabulary):
    import tokenizers
    from tokenizers import decoders, models, normalizers

    out = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_scored_merges(vocabulary),
            unk_token=vocabulary.special("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    before: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    out.normalizer = normalizers.Sequence(  # pyright: ignore
        [*before, normalizers.Replace(" ", _SPACE)]
    )
    out.decoder = decoders.Sequence(  # pyright: ignore
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *after,
        ]
    )
    return out


def _scored_merges(vocabulary):
    """Every pair of tokens that makes a third, in the order of the third's score.

    Text never merges into control, unknown or byte tokens.
    """
    scores, ids = vocabulary.numbers("scores"), vocabulary.ids
    if scores is None:
        raise vocabulary.fault(f"metadata lacks {_KEY}scores")
    if not np.isfinite(scores).all():
        raise vocabulary.fault(f"{_KEY}scores has a score that is not finite")
    found = []
    for number, token in enumerate(vocabulary.tokens):
        if vocabulary.types[number] not in (_NORMAL, _USER_DEFINED, _UNUSED):
            continue
        found += [
            (-scores[number], number, -cut)
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
    ranked = ((vocabulary.tokens[number], -cut) for _, number, cut in sorted(found))
    return [(token[:cut], token[cut:]) for token, cut in ranked]


def _add_tokens(out, vocabulary):
    """Control tokens are special; both kinds are found before anything is split."""
    from tokenizers import AddedToken

    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        added = [
            AddedToken(vocabulary.tokens[i], special=special, normalized=False)
            for i in np.flatnonzero(vocabulary.types == kind)
            if vocabulary.tokens[i]
        ]
        (out.add_special_tokens if special else out.add_tokens)(added)
    if out.get_vocab_size() != len(vocabulary.tokens):
        raise vocabulary.fault(
            f"{out.get_vocab_size()} tokens were made of {len(vocabulary.tokens)}"
        )


def _add_ends(out, vocabulary, add_bos):
    from tokenizers import processors

    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    begin = [bos] if vocabulary.flag("add_bos_token", add_bos) else []
    end = [eos] if vocabulary.flag("add_eos_token", False) else []
    if None in begin + end:
        raise vocabulary.fault(
            f"{_KEY}add_bos_token or add_eos_token without the token"
        )
    if begin or end:
        named = {token: vocabulary.ids[token] for token in begin + end}
        out.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A:0", *end, *(f"{t}:1" for t in begin), "$B:1"]
            + [f"{t}:1" for t in end],
            special_tokens=list(named.items()),
        )
