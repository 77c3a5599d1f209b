import pytest

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen": "scale"}, "frozen wants a tuple of regexes, found the string"),
        ({"loss_fn": 3}, "loss_fn wants a callable, found 3"),
        ({"init": {}}, "init wants a callable"),
    ],
)
def test_bad_fields(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.trainable(**changes)
