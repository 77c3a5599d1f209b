import numpy as np
import pytest

from mtl_jax.data import mini_domains

pytestmark = pytest.mark.fast
FACTS = mini_domains.draw_facts(0)


@pytest.mark.parametrize(
    ("domain", "want"),
    [("reverse", [7, 0, 3]), ("sort", [0, 3, 7]), ("shift", [4, 1, 0])],
)
def test_answers_begin_with_the_domain(domain, want):
    found = mini_domains.answer([3, 0, 7], domain, FACTS)
    assert found[1:] == want
    assert found[0] == mini_domains.LETTERS + mini_domains.DOMAINS.index(domain)


def test_facts_are_looked_up_by_two_letters():
    found = mini_domains.answer([1, 2, 5, 5], "facts", FACTS)
    assert found[1:] == FACTS[1, 2].tolist()
    assert found == mini_domains.answer([1, 2, 0], "facts", FACTS)
    with pytest.raises(ValueError, match="no domain 'count', known: reverse"):
        mini_domains.answer([1], "count", FACTS)


def parts(row, weights):
    """(tag, letters, answer) of a row."""
    tag, *rest = row[: int(np.flatnonzero(weights)[-1]) + 1].tolist()
    at = rest.index(mini_domains.ASK)
    return mini_domains.DOMAINS[tag - mini_domains.LETTERS], rest[:at], rest[at + 1 :]


@pytest.mark.parametrize("domain", [None, "sort"])
def test_rows_are_right_and_tags_mean_what_they_should(domain):
    rows = mini_domains.draw(np.random.default_rng(0), 400, FACTS, domain=domain)
    assert rows.input_ids.max() < mini_domains.VOCAB_SIZE
    answered = []
    for row, weights in zip(*rows, strict=True):
        tag, letters, answer = parts(row, weights)
        own = mini_domains.DOMAINS[answer[0] - mini_domains.LETTERS]
        assert answer == [
            *mini_domains.answer(letters, own, FACTS),
            mini_domains.END,
        ]
        assert weights.sum() == len(answer)
        answered.append((tag, own))
    same = np.mean([tag == own for tag, own in answered])
    tagged = [own for tag, own in answered if tag == domain]
    if domain is None:
        assert 0.15 < same < 0.35
    else:
        assert set(tagged) == {"sort"} and 150 < len(tagged) < 250
