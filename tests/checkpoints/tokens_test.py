import json

import pytest

from mtl_jax.checkpoints import tokens
from mtl_jax.checkpoints._schema import Model, TokenizerRequest, TokenSource

pytestmark = pytest.mark.fast


def files(folder):
    return {path.name: path for path in folder.iterdir()}


def read(folder, rows=None):
    return tokens.read_vocabulary(Model(folder.name, folder.name), files(folder), rows)


@pytest.fixture
def vocabulary(tmp_path, save_tokenizer):
    """`vocabulary(name, tokens, rows)`: saved and read again."""

    def make(name, ids, rows=None, **config):
        if not isinstance(ids, dict):
            ids = {token: i for i, token in enumerate(ids.split())}
        save_tokenizer(tmp_path / name, ids, **config)
        return read(tmp_path / name, rows)

    return make


def test_tokenizer_json(vocabulary):
    found = vocabulary("a", "x y <z>")
    assert found.ids == {"x": 0, "y": 1, "<z>": 2} and found.rows == 3
    assert set(found.added) == {"<z>"}
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json"}
    short = vocabulary("a", "x y <z>", rows=2)
    assert short.usable("y") == 1 and short.usable("<z>") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", '{"x": 0, "y": 1}'),
        ("vocab.txt", "x\ny\n"),
        ("tokenizer.json", '{"model": {"vocab": [["x", -1.5], ["y", 0]]}}'),
    ],
)
def test_other_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "added_tokens.json").write_text('{"<z>": 5}')
    wanted = {"x": 0, "y": 1} | ({} if name == "tokenizer.json" else {"<z>": 5})
    assert read(tmp_path).ids == wanted


def test_what_is_not_read(tmp_path):
    assert read(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only there as tokenizer\.model"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        read(tmp_path)


def test_equal_tokenizers_pass(tmp_path, vocabulary):
    one = vocabulary("a", "x y <z>").files
    other = vocabulary("b", "x y <z>").files
    # Equal ids in another file, and a model without any tokenizer.
    text = json.loads(other["tokenizer.json"].read_text()) | {"version": "2"}
    other["tokenizer.json"].write_text(json.dumps(text))
    models = [Model(n, n) for n in "abc"]
    tokens.check_same(models, [one, other, {"config.json": tmp_path}])


def test_same_bytes_are_not_parsed(tmp_path):
    sides = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("broken")
        sides.append(files(tmp_path / name))
    tokens.check_same([Model("a", "a"), Model("b", "b")], sides)


def test_other_ids_are_refused(vocabulary):
    one, other = vocabulary("a", "x y z u"), vocabulary("b", "x z y <v>")
    with pytest.raises(ValueError, match="tokenizers of a and b differ") as error:
        tokens.check_same([one.model, other.model], [one.files, other.files])
    assert "'y' (1 and 2), 'z' (2 and 1), '<v>' (absent and 3) and 1 more" in str(
        error.value
    )
    assert "tokenizer_source" in str(error.value)


def test_base_keeps_its_tokens_and_rows(vocabulary):
    base, other = vocabulary("a", "x y", rows=5), vocabulary("b", "x z")
    found = tokens.join(TokenizerRequest("base"), [base, other], base)
    assert found.ids == base.ids and found.rows == 5
    assert found.files == dict(base.files)


def test_union(vocabulary):
    base = vocabulary("a", "x y <s>", added_tokens_decoder={"2": {"content": "<s>"}})
    other = vocabulary("b", "<t> y w x v")
    found = tokens.join(TokenizerRequest("union"), [base, other], base)
    # Those of the base, then ordinary new ones in the order of ids, then added ones.
    assert found.ids == {"x": 0, "y": 1, "<s>": 2, "w": 3, "v": 4, "<t>": 5}
    assert found.rows == 6
    data = json.loads(found.files["tokenizer.json"])
    assert data["model"]["vocab"] == {"x": 0, "y": 1}
    new = {e["content"]: e for e in data["added_tokens"]}
    assert [e["id"] for e in new.values()] == [2, 3, 4, 5]
    assert new["<t>"]["special"] and not new["w"]["special"]
    config = json.loads(found.files["tokenizer_config.json"])
    assert config["added_tokens_decoder"]["5"]["content"] == "<t>"


def test_the_union_is_a_tokenizer(vocabulary, tmp_path):
    library = pytest.importorskip("tokenizers")
    base, other = vocabulary("a", "x y <s>"), vocabulary("b", "x <t> w")
    found = tokens.join(TokenizerRequest("union"), [base, other], base)
    made = library.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    assert made.get_vocab() == found.ids
    assert made.encode("x <t> y w").ids == [
        found.ids[t] for t in ("x", "<t>", "y", "w")
    ]


def test_tokens_beyond_the_rows_are_not_joined(vocabulary):
    base, other = vocabulary("a", "x y"), vocabulary("b", "x y u v", rows=3)
    found = tokens.join(TokenizerRequest("union"), [base, other], base)
    assert found.ids == {"x": 0, "y": 1, "u": 2} and found.rows == 3


def test_named_tokens_are_added_and_rows_padded(vocabulary):
    base = vocabulary("a", "x y")
    request = TokenizerRequest("base", {"<n>": TokenSource("zero")}, 4)
    found = tokens.join(request, [base], base)
    assert found.ids == {"x": 0, "y": 1, "<n>": 2} and found.rows == 4
    data = json.loads(found.files["tokenizer.json"])
    assert data["added_tokens"][-1]["content"] == "<n>"


def test_adding_needs_a_tokenizer_json(tmp_path, vocabulary):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "vocab.txt").write_text("x\n")
    base = read(folder)
    with pytest.raises(ValueError, match=r"c, which has no tokenizer\.json"):
        tokens.join(TokenizerRequest("union"), [base, vocabulary("a", "x y")], base)


def test_tokenizer_files(tmp_path, save_tokenizer):
    save_tokenizer(tmp_path / "a", {"x": 0})
    found = tokens.tokenizer_files(f"{tmp_path / 'a'}+lora")
    assert set(found) == {"tokenizer.json", "tokenizer_config.json"}
