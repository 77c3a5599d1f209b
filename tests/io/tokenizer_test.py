import pytest

from mtl_jax import io
from mtl_jax.io import tokenizer

pytestmark = pytest.mark.fast
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def saved():
    """A tokenizer that its file asks to cut and to pad."""
    vocab = {"a": 0, "b": 1, "ab": 2, "<pad>": 3}
    out = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("a", "b")]))
    out.enable_truncation(2)
    out.enable_padding(length=5, pad_id=3, pad_token="<pad>")
    return out


def test_folder_and_file_without_cutting_or_padding(tmp_path, saved):
    saved.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        got = tokenizer.load_tokenizer(path)
        assert got.encode("abaab").ids == [2, 0, 2]


def test_vocabularies_of_gguf_files(tmp_path):
    path = tmp_path / "x.gguf"
    tokens = {"tokens": ["a", "b", "ab"], "merges": ["a b"]}
    metadata = {"model": "gpt2", "pre": "gpt-2", **tokens}
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    io.gguf.save(path, {}, named)
    assert tokenizer.load_tokenizer(path).encode("abab").ids == [2, 2]


def test_faults_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*x\.json"):
        tokenizer.load_tokenizer(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*x\.gguf"):
        tokenizer.load_tokenizer(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; found: noth"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"found: vocab\.txt"):
        tokenizer.load_tokenizer(tmp_path)
    for text in ("", "{}", "[1", '{"model": {"type": "None"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
            tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
        tokenizer.load_tokenizer(tmp_path)
