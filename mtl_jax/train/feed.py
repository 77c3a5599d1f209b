"""Where batches come from, and how a resumed run finds its place in them."""

from collections.abc import Callable, Iterable
from typing import Any

Data = Iterable[Any] | Callable[[int], Any]


class Feed:
    """A stream of batches with a position that can be saved.

    Three kinds of source are taken: a function `batch(step)`, whose position is the
    step; an iterator (or something with one) that has `get_state` and `set_state`,
    as Grain's have; and any other iterable, whose first batches are read again and
    dropped on resume, so it must come in the same order every time.
    """

    def __init__(self, data: Data):
        self._function: Any = None
        self._iterator: Any = None
        if isinstance(data, Iterable):
            self._iterator = iter(data)
        elif callable(data):
            self._function = data
        else:
            raise ValueError(
                "fit: data wants an iterable of batches or a function of the step, "
                f"found {type(data).__name__}"
            )

    def next(self, step: int) -> Any:
        """The batch of step number `step`, counted from 0."""
        if self._function is not None:
            return self._function(step)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"fit: the data ended after {step} batches; repeat them or ask for "
                "fewer steps"
            ) from None

    def get_state(self) -> Any:
        """The position as plain data, or None when it follows from the step."""
        if hasattr(self._iterator, "get_state"):
            return self._iterator.get_state()
        return None

    def restore(self, state: Any, step: int) -> None:
        """Goes to where `get_state` was called after `step` batches."""
        if state is not None:
            if not hasattr(self._iterator, "set_state"):
                raise ValueError(
                    "fit: the checkpoint holds a data position, but the data given "
                    "now have no set_state"
                )
            self._iterator.set_state(state)
        elif self._function is None:
            for index in range(step):
                self.next(index)
