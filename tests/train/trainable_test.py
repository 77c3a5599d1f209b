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


def test_counts_of_tasks_want_an_aggregator(toy):
    with pytest.raises(ValueError, match="task_counts=.* wants an aggregator"):
        toy.trainable(task_counts=lambda batch: batch["task"])
