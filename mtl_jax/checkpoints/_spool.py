"""A thread that handles items one after the other, behind a bounded buffer."""

import collections
import threading
from collections.abc import Callable
from typing import Any


class Spool:
    """Hands items to one thread; who gives too many waits.

    Args:
      handle: called with each item, in order, on the thread. Once it has raised, items
        are dropped and every `put` and `drain` raises what it raised.
      limit: bytes of items that wait or are being handled; a larger item waits until
        it is alone.
    """

    def __init__(self, handle: Callable[[Any], None], limit: int):
        self._handle, self._limit = handle, limit
        self._items: collections.deque[tuple[Any, int]] = collections.deque()
        self._held = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, item: Any, size: int) -> None:
        """Hands over an item of so many bytes."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error or not self._held or self._held + size <= self._limit
                )
            )
            self._check()
            self._items.append((item, size))
            self._held += size
            self._changed.notify_all()

    def drain(self) -> None:
        """Returns once everything is handled."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not (self._items or self._held)
            )
            self._check()

    def close(self) -> None:
        """Ends the thread after the item at hand; others are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise ValueError("the writer is closed")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._closed:
                    return
                item, size = self._items.popleft()
            error = None
            try:
                self._handle(item)
            except BaseException as raised:
                error = raised
            del item
            with self._changed:
                self._held -= size
                self._error = error
                self._changed.notify_all()
                if error is not None:
                    return
