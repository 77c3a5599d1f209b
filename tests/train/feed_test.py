import pytest

from mtl_jax.train.feed import Feed

pytestmark = pytest.mark.fast


class Positioned:
    def __init__(self):
        self.n = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        return self.n - 1

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


@pytest.mark.parametrize(
    "make", [lambda: lambda step: step, Positioned, lambda: iter(range(99))]
)
def test_position_is_found_again(make):
    feed = Feed(make())
    assert [feed.next(step) for step in range(3)] == [0, 1, 2]
    state = feed.get_state()
    other = Feed(make())
    other.restore(state, 3)
    assert [other.next(step) for step in range(3, 6)] == [3, 4, 5]


def test_what_is_no_data_is_refused():
    with pytest.raises(ValueError, match="function of the step, found int"):
        Feed(3)
    with pytest.raises(ValueError, match="ended after 2 batches"):
        Feed([1, 2]).restore(None, 3)
    with pytest.raises(ValueError, match="have no set_state"):
        Feed([1, 2]).restore({"n": 1}, 1)
