"""Vocabularies against scalar encoders, and vocabularies that contradict themselves."""

import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax.io import gguf

pytestmark = pytest.mark.fast
pytest.importorskip("tokenizers")

NORMAL, UNKNOWN, CONTROL, USER, _, BYTE = range(1, 7)


def byte_alphabet():
    """Printable stand-ins of the 256 bytes, by the published rule."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


ALPHABET = byte_alphabet()
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "1 2", "Ċ Ċ"]
SPECIAL = ["<|end|>", "<|start|>"]


def byte_level(**changes):
    """A vocabulary of all bytes, a few merges and three added tokens."""
    tokens = [*SPECIAL, *ALPHABET, *(m.replace(" ", "") for m in MERGES), "<think>"]
    types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 3) + [USER]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        **changes,
    }
    return {k: v for k, v in metadata.items() if v is not None}


CHARS = ["a", "b", "c", "▁"]
PIECES = ["ab", "bc", "abc", "▁a", "aa", "aab", "ca", "▁ab", "▁▁", "bca", "cc"]


def sentencepiece(pieces=PIECES, **changes):
    """Characters, pieces with falling scores, and tokens for bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    scores = [0.0] * len(tokens) + [-1.0 - i for i in range(len(pieces))]
    scores += [-100.0 - i for i in range(len(CHARS))]
    tokens += [*pieces, *CHARS]
    types += [NORMAL] * (len(tokens) - len(types))
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {k: v for k, v in metadata.items() if v is not None}


def opened(tmp_path, vocabulary):
    path = tmp_path / "x.gguf"
    named = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    gguf.save(path, {}, named)
    return gguf.GgufFile(path)


def built(tmp_path, vocabulary):
    return gguf.tokenizer(opened(tmp_path, vocabulary))


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    return built(tmp_path_factory.mktemp("bytes"), byte_level(pre="smollm"))


@pytest.fixture(scope="module")
def pieces_tokenizer(tmp_path_factory):
    return built(tmp_path_factory.mktemp("pieces"), sentencepiece(add_bos_token=False))


def merged(symbols, rank):
    """Joins the best pair, the leftmost of equals, until none has a rank."""
    symbols = list(symbols)
    while True:
        pairs = [rank(a, b) for a, b in zip(symbols, symbols[1:], strict=False)]
        known = [r for r in pairs if r is not None]
        if not known:
            return symbols
        i = pairs.index(min(known))
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


# GPT-2's words for ASCII; a digit stands alone.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?[a-zA-Z]+| ?[^\s\w]+|\s+(?!\S)|\s+"


def scalar_byte_level(text, vocabulary):
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(vocabulary["merges"])}
    out = []
    for part in re.split(r"([0-9])", text):
        for word in [part] if part.isdigit() else re.findall(WORDS, part):
            symbols = [ALPHABET[byte] for byte in word.encode()]
            out += merged(symbols, lambda a, b: ranks.get((a, b)))
    return [ids[token] for token in out]


@hypothesis.given(st.text("hello wr12'st.\n\t", max_size=40))
def test_byte_level_ids_are_those_of_a_scalar_encoder(bytes_tokenizer, text):
    got = bytes_tokenizer.encode(text).ids
    assert got == scalar_byte_level(text, byte_level())


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.text())
def test_byte_level_text_comes_back(bytes_tokenizer, text):
    encoded = bytes_tokenizer.encode(text)
    decoded = bytes_tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert decoded == text


def scalar_sentencepiece(text, vocabulary):
    """The best-scored pair first; characters without a token become bytes."""
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    scores = dict(zip(vocabulary["tokens"], vocabulary["scores"], strict=True))
    text = "▁" + text.replace(" ", "▁") if text else ""
    out = []
    for symbol in merged(
        text, lambda a, b: -scores[a + b] if a + b in PIECES else None
    ):
        known = symbol in ids
        out += [symbol] if known else [f"<0x{b:02X}>" for b in symbol.encode()]
    return [ids[token] for token in out]


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.text("abc é", max_size=12))
def test_sentencepiece_ids_are_those_of_a_scalar_encoder(pieces_tokenizer, text):
    got = pieces_tokenizer.encode(text).ids
    assert got == scalar_sentencepiece(text, sentencepiece())


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.text())
def test_sentencepiece_text_comes_back(pieces_tokenizer, text):
    # The format spells spaces as ▁, so that its own ▁ comes back as a space, and
    # strips nothing but the space that it put in front.
    decoded = pieces_tokenizer.decode(
        pieces_tokenizer.encode(text).ids, skip_special_tokens=False
    )
    assert decoded == text.replace("▁", " ")


def test_special_and_added_tokens_are_found_whole(tmp_path):
    out = built(tmp_path, byte_level())
    ids = {token: i for i, token in enumerate(byte_level()["tokens"])}
    text = "<|start|>hello<think> <|end|>"
    encoded = out.encode(text)
    assert encoded.tokens == ["<|start|>", "hello", "<think>", "Ġ", "<|end|>"]
    assert encoded.ids == [ids[token] for token in encoded.tokens]
    assert out.decode(encoded.ids) == "hello<think> "
    assert out.decode(encoded.ids, skip_special_tokens=False) == text
    assert out.get_vocab_size() == len(ids)
    assert out.truncation is None
    assert out.padding is None


@pytest.mark.parametrize(
    ("changes", "begin", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [0]),
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_begin_and_end_are_added_where_the_file_says_so(tmp_path, changes, begin, end):
    out = built(tmp_path, byte_level(**changes))
    plain = out.encode("hello", add_special_tokens=False).ids
    assert out.encode("hello").ids == begin + plain + end
    both = out.encode("hello", "hello").ids
    assert both == begin + plain + end + begin + plain + end


def test_sentencepiece_adds_a_begin_by_default(tmp_path):
    out = built(tmp_path, sentencepiece())
    assert out.encode("ab").tokens == ["<s>", "▁ab"]
    assert out.decode(out.encode("ab").ids) == "ab"
    bare = built(tmp_path, sentencepiece(add_space_prefix=False))
    assert bare.encode("ab").tokens == ["<s>", "ab"]
    assert bare.decode(bare.encode(" ab").ids) == " ab"
    assert out.encode("ab</s>ab").tokens == ["<s>", "▁ab", "</s>", "▁ab"]


def test_text_does_not_merge_into_control_or_byte_tokens(tmp_path):
    pieces = [*PIECES, "<", "0", "x", "1", ">", "<0", "x1", "x11", "<0x11", "<0x1"]
    out = built(tmp_path, sentencepiece(pieces, add_bos_token=False))
    assert "<0x11>" not in out.encode("<0x11>").tokens
    assert out.encode("\x11").tokens == ["▁", "<0x11>"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ123", ",", "Ġit", "'s", "ĊĠ", "ĠIT", "'", "S"]),
        (
            "smollm",
            ["a", "ĠĠ", "1", "2", "3", ",", "Ġit", "'s", "ĊĠ", "ĠIT", "'", "S"],
        ),
        (
            "llama-bpe",
            ["a", "Ġ", "Ġ", "123", ",", "Ġit", "'s", "Ċ", "Ġ", "ĠIT", "'S"],
        ),
        (
            "qwen2",
            ["a", "Ġ", "Ġ", "1", "2", "3", ",", "Ġit", "'s", "Ċ", "Ġ", "ĠIT", "'S"],
        ),
    ],
)
def test_words_of_each_pre_tokenizer(tmp_path, pre, words):
    out = built(tmp_path, byte_level(pre=pre))
    found = out.pre_tokenizer.pre_tokenize_str("a  123, it's\n  IT'S")
    assert [word for word, _ in found] == words


def test_whole_words_skip_the_merges_of_llama_3(tmp_path):
    tokens = byte_level()["tokens"]
    types = np.append(byte_level()["token_type"], NORMAL).astype(np.int32)
    changes = {"tokens": [*tokens, "rw"], "token_type": types}
    for pre, want in (("llama-bpe", ["rw"]), ("gpt-2", ["r", "w"])):
        out = built(tmp_path, byte_level(pre=pre, add_bos_token=False, **changes))
        assert out.encode("rw").tokens == want


def test_composed_characters_of_qwen(tmp_path):
    out = built(tmp_path, byte_level(pre="qwen2"))
    assert out.encode("e\u0301").ids == out.encode("é").ids


def test_bytes_that_are_missing_become_the_unknown_token(tmp_path):
    vocabulary = byte_level(unknown_token_id=0)
    at = vocabulary["tokens"].index(ALPHABET[4])
    vocabulary["tokens"][at] = "spare"
    out = built(tmp_path, vocabulary)
    assert out.encode("h\x04h").tokens == ["h", "<|end|>", "h"]


def test_special_tokens_by_role(tmp_path):
    file = opened(tmp_path, byte_level(padding_token_id=np.uint32(0xFFFFFFFF)))
    assert gguf.special_tokens(file) == {
        "bos": "<|start|>",
        "eos": "<|end|>",
        "unknown": None,
        "padding": None,
        "end_of_turn": None,
    }


@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_what_ends_a_turn(tmp_path, token):
    """As the file says, or else by its usual name, if it is a control token."""
    vocabulary = byte_level()
    tokens, types = [*vocabulary["tokens"], token], vocabulary["token_type"]
    for kind, found in ((CONTROL, token), (NORMAL, None)):
        own = byte_level(tokens=tokens, token_type=np.append(types, np.int32(kind)))
        assert gguf.special_tokens(opened(tmp_path, own))["end_of_turn"] == found
        said = opened(tmp_path, {**own, "eot_token_id": 1})
        assert gguf.special_tokens(said)["end_of_turn"] == "<|start|>"
    wrong = opened(tmp_path, byte_level(eot_token_id=9999))
    with pytest.raises(ValueError, match="eot_token_id is 9999, but there are"):
        gguf.special_tokens(wrong)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("vocabulary", "alphabet"),
    [
        (sentencepiece(), "abc é"),
        (byte_level(add_bos_token=False), "hello wr12'st.\n"),
        (byte_level(pre="llama-bpe", add_bos_token=True), "hello wr12'st.\n"),
        (byte_level(pre="qwen2"), "hello wr12'st.\n"),
    ],
    ids=["sentencepiece", "gpt-2", "llama-bpe", "qwen2"],
)
def test_transformers_gives_the_same_numbers(tmp_path, vocabulary, alphabet):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    named = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    gguf.save(tmp_path / "x.gguf", {}, {"general.architecture": "llama", **named})
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ours = gguf.tokenizer(gguf.GgufFile(tmp_path / "x.gguf"))
    rng = np.random.default_rng(0)
    for length in range(60):
        # Its sentencepiece puts no space in front of one.
        text = "".join(rng.choice(list(alphabet), length)).lstrip()
        assert ours.encode(text).ids == peer(text).input_ids, repr(text)
        plain = ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(plain) == peer.decode(plain), repr(text)


def without(vocabulary, key):
    return {k: v for k, v in vocabulary.items() if k != key}


FAULTS = {
    "nothing": ({}, "tokenizer.ggml.model is None: there is no vocabulary"),
    "kind is a list": (byte_level(model=["a"]), "model is .'a'.: there is no vocab"),
    "pre is a list": (byte_level(pre=["a"]), "pre=.'a'. is not supported"),
    "kind": (byte_level(model="bert"), "model='bert' is not supported, only 'gpt2', "),
    "no tokens": (without(byte_level(), "tokens"), "tokens is missing or no list of s"),
    "numbers": (byte_level(tokens=np.arange(3)), "tokens is missing or no list of st"),
    "twice": (
        byte_level(tokens=["a", "b", "a"], token_type=None),
        "tokens has 'a' twice, at 0 and 2",
    ),
    "types": (
        byte_level(token_type=np.zeros(3, np.int32)),
        r"token_type has 3 entries for \d+ tokens",
    ),
    "pre": (byte_level(pre="klingon"), "pre='klingon' is not supported, only 'gpt-2'"),
    "no pre": (without(byte_level(), "pre"), "pre=None is not supported"),
    "no merges": (without(byte_level(), "merges"), "merges is missing"),
    "merge of one": (byte_level(merges=["he"]), r"merges\[0\] is 'he', wanted two"),
    "merge of a stranger": (
        byte_level(merges=["h e", "he zz"]),
        r"merges\[1\] is 'he zz'",
    ),
    "merge to a stranger": (byte_level(merges=["h h"]), r"merges\[0\] is 'h h'"),
    "role": (byte_level(bos_token_id=9999), "bos_token_id is 9999, but there are"),
    "flag": (byte_level(add_bos_token=1), "add_bos_token is 1, wanted a boolean"),
    "no begin": (
        byte_level(add_bos_token=True, bos_token_id=None),
        "add_bos_token or add_eos_token without the token",
    ),
    "no scores": (without(sentencepiece(), "scores"), "metadata lacks .*scores"),
    "scores": (sentencepiece(scores=np.ones(2, np.float32)), "scores has 2 entries"),
    "score": (
        sentencepiece(scores=np.full(len(sentencepiece()["tokens"]), np.nan)),
        "a score that is not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path, fault):
    vocabulary, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}"):
        built(tmp_path, vocabulary)
