"""Pickles made with stand-ins of pandas' names; what reads them imports none."""

import lzma
import os
import pickle
import sys
import types

import numpy as np
import pytest

from mtl_jax.data import frames

pytestmark = pytest.mark.fast


def stand_in(module, name):
    """A class that pickles under another module's name."""
    return type(name, (), {"__module__": module, "__qualname__": name})


def function(module, name):
    def call(*args):
        raise AssertionError(f"{module}.{name} was called")

    call.__module__, call.__qualname__, call.__name__ = module, name, name
    return call


class Asks:
    """Pickles as a call of `name` with `args`."""

    def __init__(self, name, *args):
        self.name, self.args = name, args

    def __reduce__(self):
        return self.name, self.args


@pytest.fixture
def pandas(monkeypatch):
    """The names of pandas that a frame's pickle mentions."""
    made = {}
    for module, name, kind in (
        ("pandas.core.frame", "DataFrame", stand_in),
        ("pandas.core.internals.managers", "BlockManager", stand_in),
        ("pandas.core.indexes.base", "Index", stand_in),
        ("pandas._libs.internals", "_unpickle_block", function),
        ("pandas.core.indexes.base", "_new_Index", function),
    ):
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            home = ".".join(parts[:count])
            if home not in made:
                made[home] = types.ModuleType(home)
                monkeypatch.setitem(sys.modules, home, made[home])
        made[name] = kind(module, name)
        setattr(made[module], name, made[name])
    return made


@pytest.fixture
def pickled(pandas):
    """Columns -> the bytes of a frame's pickle, one block per dtype."""

    def build(columns, change=lambda frame: frame, protocol=5):
        kinds = {}
        for place, column in enumerate(columns.values()):
            kinds.setdefault(column.dtype.str, []).append((place, column))
        blocks = []
        for number, found in enumerate(kinds.values()):
            places = np.array([place for place, _ in found])
            if number == len(kinds) - 1 and len(found) == 1:
                places = slice(int(places[0]), int(places[0]) + 1, 1)
            values = np.stack([column for _, column in found])
            blocks.append(Asks(pandas["_unpickle_block"], values, places, 2))
        header = np.array(list(columns), object)
        index = Asks(
            pandas["_new_Index"], pandas["Index"], {"data": header, "name": None}
        )
        frame = pandas["DataFrame"]()
        frame._mgr = Asks(pandas["BlockManager"], tuple(blocks), [index, None])
        frame._typ = "dataframe"
        return pickle.dumps(change(frame), protocol=protocol)

    return build


COLUMNS = {
    "score": np.array([0.5, -1.25, 3.0]),
    "school": np.array([1, 1, 2]),
    "age": np.array([11.0, 12.0, 13.5]),
    "sex": np.array(["F", "M", None], object),
}


def test_reads_numbers_and_strings_back(pickled):
    found = frames.parse(pickled(COLUMNS))
    assert set(found) == set(COLUMNS)
    for name, column in COLUMNS.items():
        assert found[name].dtype == column.dtype
        assert found[name].tolist() == column.tolist()


def test_other_byte_orders_and_widths(pickled):
    columns = {"a": np.array([1, 2], ">i4"), "b": np.array([0.5, 2.5], "<f4")}
    found = frames.parse(pickled(columns))
    assert found["a"].tolist() == [1, 2] and found["b"].tolist() == [0.5, 2.5]


def test_compressed_frames_are_bounded(pickled):
    packed = lzma.compress(pickled(COLUMNS))
    assert set(frames.parse_xz(packed)) == set(COLUMNS)
    with pytest.raises(ValueError, match="more than 100 bytes after decompression"):
        frames.parse_xz(packed, limit=100)
    with pytest.raises(ValueError, match="not an xz file"):
        frames.parse_xz(b"something else")


def test_nothing_that_a_pickle_says_is_done(tmp_path, pickled):
    target = tmp_path / "touched"
    attack = Asks(os.mkdir, str(target))
    with pytest.raises(ValueError, match="mkdir, wanted pandas.core.frame.DataFrame"):
        frames.parse(pickle.dumps(attack))

    def hide(frame):
        frame._mgr.args[0][0].args = (attack, slice(0, 2, 1), 2)
        return frame

    with pytest.raises(ValueError, match="mkdir"):
        frames.parse(pickled(COLUMNS, hide))
    assert not target.exists()


@pytest.mark.parametrize(
    "value", [{"a": 1}, [1, 2], "text", 3.5, np.arange(3), {1, 2}, 2**70, 1 + 2j]
)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="frames: "):
        frames.parse(pickle.dumps(value))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_old_protocols_are_refused(protocol, pickled):
    with pytest.raises(ValueError, match="frames: "):
        frames.parse(pickled(COLUMNS, protocol=protocol))


def test_damaged_bytes_are_refused(pickled):
    data = pickled(COLUMNS)
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            found = frames.parse(bytes(broken[: rng.integers(1, len(data) + 1)]))
        except ValueError:
            continue
        # A changed number is no damage to the form.
        assert len({len(column) for column in found.values()}) <= 1


@pytest.mark.parametrize("code", ["O8", "M8", "V4", "c16"])
def test_buffers_of_other_dtypes_are_refused(code, pickled):
    data = pickled({"a": np.array([1.0]), "b": np.array([2.0])})
    assert data.count(b"\x8c\x02f8") == 1
    code = code.encode()
    broken = data.replace(b"\x8c\x02f8", b"\x8c" + bytes([len(code)]) + code)
    with pytest.raises(ValueError, match="frames: |pickle"):
        frames.parse(broken)
