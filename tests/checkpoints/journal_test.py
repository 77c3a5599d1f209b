import json

import pytest

from mtl_jax.checkpoints._journal import Journal, Piece

pytestmark = pytest.mark.fast

PIECES = [Piece(0, 5, 123), Piece(5, 9, 2**32 - 1)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def written(path, plan="p"):
    """A journal with two tensors, closed."""
    journal = Journal(path, plan)
    for name in ("a/é", "b"):
        journal.add(name, PIECES)
    journal.close()
    return path.read_bytes()


def test_what_was_noted_is_found(path):
    written(path)
    journal = Journal(path, "p")
    assert journal.finished == {"a/é": PIECES, "b": PIECES} and not journal.fresh
    journal.add("c", [])
    journal.close()
    journal = Journal(path, "p")
    assert journal.finished == {"a/é": PIECES, "b": PIECES, "c": []}
    journal.remove()
    assert not path.exists()


def test_a_new_one_is_fresh(path):
    journal = Journal(path, "p")
    assert journal.fresh and journal.finished == {}
    journal.close()


def test_every_cut_is_survived(path):
    raw = written(path)
    lines = raw.splitlines(keepends=True)
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    for cut in range(len(raw) + 1):
        path.write_bytes(raw[:cut])
        journal = Journal(path, "p")
        complete = sum(end <= cut for end in ends)
        assert journal.fresh == (complete == 0)
        assert list(journal.finished) == ["a/é", "b"][: max(complete - 1, 0)]
        journal.add("last", PIECES)
        journal.close()
        # No line is glued to what was cut off.
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
        again = Journal(path, "p")
        assert "last" in again.finished
        again.close()


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"tensor": "c"}\n', b"\n"]
)
def test_junk_ends_it(path, junk):
    raw = written(path)
    path.write_bytes(raw + junk + b'{"tensor":"z","pieces":[]}\n')
    journal = Journal(path, "p")
    assert set(journal.finished) == {"a/é", "b"}
    journal.close()
    assert path.read_bytes() == raw


def test_another_plan_is_refused_unless_it_may_be_lost(path):
    raw = written(path)
    with pytest.raises(ValueError, match="unfinished write of another plan"):
        Journal(path, "q")
    assert path.read_bytes() == raw
    journal = Journal(path, "q", restart=True)
    assert journal.finished == {} and not journal.fresh
    journal.close()
    # The same plan goes on, whether it may be lost or not.
    written(path, "q")
    journal = Journal(path, "q", restart=True)
    assert set(journal.finished) == {"a/é", "b"}
    journal.close()


def test_only_one_writes(path):
    journal = Journal(path, "p")
    with pytest.raises(ValueError, match="another process is writing there"):
        Journal(path, "p", restart=True)
    journal.add("a", PIECES)
    journal.close()
    again = Journal(path, "p")
    assert set(again.finished) == {"a"}
    again.close()
