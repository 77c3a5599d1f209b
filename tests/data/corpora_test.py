import pytest

from mtl_jax.data import corpora

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", list(corpora.INVENTED))
def test_invented_languages(name):
    train, test = (corpora.texts(name, split, limit=20) for split in ("train", "test"))
    assert len(train) == 20 and train == corpora.texts(name, "train", limit=20)
    assert train != test and all(len(text) > 4 for text in train)


def test_names():
    with pytest.raises(ValueError, match="no domain 'news', known: .*letters"):
        corpora.texts("news", "train")
    with pytest.raises(ValueError, match="no split 'dev', known: train, "):
        corpora.texts("letters", "dev")
