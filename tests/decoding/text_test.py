import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.decoding import Detokenizer, StopStrings

pytestmark = pytest.mark.fast

PIECES = ["a", "b ", " ", "é", "漢字", "🙂👩‍👩‍👧", "\ufffd", "x\n"]


class Bytes:
    """A token per byte; 256 is a special token, 257 two bytes within a character."""

    def decode(self, ids, skip_special_tokens=True):
        special = b"" if skip_special_tokens else b"<s>"
        parts = {256: special, 257: "漢".encode()[1:]}
        data = b"".join(parts.get(i, bytes([i % 256])) for i in ids)
        return data.decode(errors="replace")


def pushed(tokenizer, ids, **options):
    text = Detokenizer(tokenizer, **options)
    return [*(text.push(i) for i in ids), text.flush()]


@given(st.lists(st.sampled_from(PIECES)))
def test_text_comes_in_whole_characters(pieces):
    ids = list("".join(pieces).encode())
    out = pushed(Bytes(), ids)
    assert "".join(out) == "".join(pieces)
    if "\ufffd" not in pieces:
        assert not any("\ufffd" in piece for piece in out)


@given(st.lists(st.integers(0, 257)))
def test_any_tokens_come_out_as_they_decode(ids):
    for skip in (True, False):
        got = "".join(pushed(Bytes(), ids, skip_special_tokens=skip))
        assert got == Bytes().decode(ids, skip_special_tokens=skip)


class Spaced:
    """Writes a space between words, none in front, as SentencePiece does."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids)


def test_the_space_between_words_is_kept():
    assert pushed(Spaced(), [1, 2, 3]) == ["w1", " w2", " w3", ""]


def test_with_a_real_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "né 🙂 end"
    out = pushed(tokenizer, tokenizer.encode(text).ids)
    assert "".join(out) == text and "🙂" in out


def cut(pieces, stops):
    text = StopStrings(stops)
    out = "".join(text.push(piece) for piece in pieces)
    return out + text.flush(), text.found


@given(st.text("ab|"), st.lists(st.integers(1, 3), max_size=9), st.booleans())
def test_text_ends_before_the_first_stop(text, sizes, both):
    stops = ["ab|", "aab"] if both else ["ab|"]
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    pieces += list(rest)
    out, found = cut(pieces, stops)
    ends = [s for s in stops if s in text]
    if not ends:
        assert (out, found) == (text, None)
        return
    assert found in stops and found in text
    assert out == text[: text.find(found)]


def test_what_may_begin_a_stop_is_held_back():
    text = StopStrings(["###", "\n\n"])
    assert [text.push(p) for p in ("a#", "#", "b\n", "c##", "#d", "e")] == [
        *("a", "", "##b", "\nc", "", "")
    ]
    assert text.found == "###" and text.flush() == ""
    assert cut(["##"], ["###"]) == ("##", None)
    assert cut(["one"], []) == ("one", None)
    for wrong in (["a", ""], "abc"):
        with pytest.raises(ValueError, match="non-empty strings"):
            StopStrings(wrong)
