import threading

import pytest

from mtl_jax.checkpoints._spool import Spool

pytestmark = pytest.mark.fast


def test_items_are_handled_in_order():
    seen = []
    spool = Spool(seen.append, 3)
    for i in range(100):
        spool.put(i, 1)
    spool.drain()
    assert seen == list(range(100))
    spool.close()


def test_who_gives_too_much_waits():
    gate, seen = threading.Event(), []

    def handle(item):
        gate.wait()
        seen.append(item)

    spool, given = Spool(handle, 10), []

    def give():
        for size in (4, 6, 1, 50, 2):
            spool.put(size, size)
            given.append(size)

    giver = threading.Thread(target=give)
    giver.start()
    giver.join(0.2)
    # The first is being handled and counts; the third would be too much.
    assert given == [4, 6] and giver.is_alive()
    gate.set()
    giver.join()
    spool.drain()
    assert seen == [4, 6, 1, 50, 2]  # Even what is larger than the buffer.
    spool.close()


def test_an_error_reaches_who_gives_and_who_waits():
    def handle(item):
        raise KeyError(item)

    spool = Spool(handle, 1)
    with pytest.raises(KeyError):
        for i in range(3):
            spool.put(i, 1)
    with pytest.raises(KeyError):
        spool.drain()
    spool.close()


def test_closing_drops_what_waits():
    gate, started, seen = threading.Event(), threading.Event(), []

    def handle(item):
        started.set()
        gate.wait()
        seen.append(item)

    spool = Spool(handle, 10)
    for i in range(3):
        spool.put(i, 1)
    started.wait()
    closer = threading.Thread(target=spool.close)
    closer.start()
    while not spool._closed:
        pass
    gate.set()
    closer.join()
    assert seen == [0]
    with pytest.raises(ValueError, match="the writer is closed"):
        spool.put(1, 1)
