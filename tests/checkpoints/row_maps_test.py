import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax.checkpoints import _row_maps, _rows
from mtl_jax.checkpoints._schema import Model, TokenizerRequest, TokenSource
from mtl_jax.checkpoints.source import ArrayView
from mtl_jax.checkpoints.tokens import OutputVocabulary, Vocabulary

pytestmark = pytest.mark.fast

LETTERS = "abcdefgh"


def vocabulary(name, tokens, rows=None):
    ids = {token: i for i, token in enumerate(tokens)}
    return Vocabulary(Model(name, name), ids, rows or len(ids), {})


def maps(request, ids, rows, vocabularies, base):
    output = OutputVocabulary(ids, rows, {})
    return _row_maps.row_maps(request, output, vocabularies, base)


def wanted_rows(request, ids, tables, vocabularies, base):
    """Token by token, from the definition: own row, else the source's, else by rule."""
    out = [{} for _ in vocabularies]
    for token, i in ids.items():
        have = [m for m, v in enumerate(vocabularies) if token in v.ids]
        source = request.tokens.get(token, TokenSource("default"))
        rows = [tables[m][vocabularies[m].ids[token]] for m in have]
        if source.kind == "zero" or not have:
            value = np.zeros(tables[0].shape[1])
        elif source.kind == "model":
            (m,) = [m for m in have if vocabularies[m].model == source.model]
            value = rows[have.index(m)]
        elif base in have:
            value = rows[have.index(base)]
        else:
            value = np.mean(rows, axis=0)
        for m in range(len(vocabularies)):
            own = m in have and not source.force
            out[m][i] = rows[have.index(m)] if own else value
    return out


@hypothesis.given(st.data())
def test_every_token_has_its_row(data):
    several = st.permutations(LETTERS).flatmap(
        lambda p: st.integers(1, len(p)).map(lambda n: p[:n])
    )
    vocabularies = [vocabulary(str(m), data.draw(several)) for m in range(3)]
    base = data.draw(st.sampled_from([0, None]))
    every = sorted({token for v in vocabularies for token in v.ids})
    ids = {token: i for i, token in enumerate(data.draw(st.permutations(every)))}
    tokens = {}
    for token in data.draw(st.lists(st.sampled_from(every), unique=True)):
        kind = data.draw(st.sampled_from(["default", "zero", "model"]))
        have = [v.model for v in vocabularies if token in v.ids]
        model = data.draw(st.sampled_from(have)) if kind == "model" else None
        tokens[token] = TokenSource(kind, data.draw(st.booleans()), model)
    request = TokenizerRequest("union", tokens)
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(v.rows, 2)).astype(np.float32) for v in vocabularies]
    found = maps(request, ids, len(ids), vocabularies, base)
    wanted = wanted_rows(request, ids, tables, vocabularies, base)
    for m, rows in enumerate(found):
        table = _rows.RowsView([ArrayView(t) for t in tables], m, rows).whole()
        for i in range(len(ids)):
            np.testing.assert_allclose(table[i], wanted[m][i], rtol=1e-5, atol=1e-6)


def test_a_named_row():
    vocabularies = [vocabulary("0", "ab"), vocabulary("1", "ac")]
    for more in ({"token": "c"}, {"token_id": 1}):
        source = TokenSource("model_token", model=Model("1", "1"), **more)
        request = TokenizerRequest("union", {"n": source})
        for found in maps(request, {"a": 0, "n": 1}, 2, vocabularies, 0):
            assert (found.donor[1], found.row[1]) == (1, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TokenSource("model", model=Model("1", "1")), "1 has no row for 'b'"),
        (TokenSource("model", model=Model("x", "x")), "x does not take part"),
        (
            TokenSource("model_token", model=Model("1", "1"), token_id=2),
            "1 has 2 rows; found token_id 2",
        ),
        (
            TokenSource("model_token", model=Model("1", "1"), token="z"),
            "1 has no row for 'z'",
        ),
    ],
)
def test_sources_that_lack_a_token(source, message):
    vocabularies = [vocabulary("0", "ab"), vocabulary("1", "ac")]
    request = TokenizerRequest("base", {"b": source})
    with pytest.raises(ValueError, match=rf"tokenizer\.tokens: 'b': {message}"):
        maps(request, {"a": 0, "b": 1}, 2, vocabularies, 0)


def test_equal_vocabularies_are_identities():
    """Rows without a token, as of padded embeddings, stay where they are, too."""
    vocabularies = [vocabulary(n, "abc", rows=5) for n in "01"]
    found = maps(TokenizerRequest("base"), vocabularies[0].ids, 5, vocabularies, 0)
    assert [rows.is_identity(m, 5) for m, rows in enumerate(found)] == [True, True]


def test_padding_is_the_mean():
    vocabularies = [vocabulary("0", "ab"), vocabulary("1", "ba")]
    found = maps(TokenizerRequest("base"), {"a": 0, "b": 1}, 4, vocabularies, 0)
    for rows in found:
        assert rows.donor[2:].tolist() == [_rows.MEAN, _rows.MEAN] and rows.named == 2


def test_rows_that_are_tokens_elsewhere_are_not_padding():
    """Row 2 stands for `c` in the second model: its padding comes from the base."""
    vocabularies = [vocabulary("0", "ab", rows=3), vocabulary("1", "abc")]
    found = maps(TokenizerRequest("base"), {"a": 0, "b": 1}, 3, vocabularies, 0)
    assert [(int(r.donor[2]), int(r.row[2])) for r in found] == [(0, 2), (0, 2)]
