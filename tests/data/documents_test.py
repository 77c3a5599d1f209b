import numpy as np
import pytest

from mtl_jax.data import documents

pytestmark = pytest.mark.fast
SAID = 1 + documents.TOPICS * documents.WORDS


def traits(rows):
    """(topic, meaning, wording) of every document, from its words."""
    found = []
    for row in rows:
        about = {(w - 1) // documents.WORDS for w in row if 1 <= w < SAID}
        size = documents.MEANINGS * documents.WORDINGS * documents.SAID
        said = {(w - SAID) // documents.SAID for w in row if SAID <= w < SAID + size}
        assert len(about) == len(said) == 1
        found.append((about.pop(), *divmod(said.pop(), documents.WORDINGS)))
    return np.array(found).T


def drawn(make):
    pairs = make(np.random.default_rng(0), 300)
    assert pairs.first.shape == pairs.second.shape == (300, documents.LENGTH)
    assert pairs.first.max() < documents.VOCAB_SIZE and pairs.first.min() > 0
    return pairs, traits(pairs.first), traits(pairs.second)


def test_retrieval_shares_the_topic_alone():
    pairs, first, second = drawn(documents.retrieval)
    assert (first[0] == second[0]).all() and (first[0] == pairs.label).all()
    assert np.mean(first[1] == second[1]) < 0.15


def test_similarity_shares_the_meaning_in_another_wording():
    pairs, first, second = drawn(documents.similarity)
    assert (first[1] == second[1]).all() and (first[1] == pairs.label).all()
    assert (first[2] != second[2]).all()
    assert np.mean(first[0] == second[0]) < 0.15


def test_crops_share_everything():
    _, first, second = drawn(documents.crops)
    np.testing.assert_array_equal(first, second)


def test_half_of_the_judged_pairs_mean_the_same():
    pairs, alike = documents.judged(np.random.default_rng(1), 300)
    same = traits(pairs.first)[1] == traits(pairs.second)[1]
    np.testing.assert_array_equal(same, alike == 1)
    assert 0.4 < alike.mean() < 0.6
