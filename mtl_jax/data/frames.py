"""Reads data frames out of pickles without unpickling.

A pickle is a program, and running one from elsewhere runs whatever it says. Here its
opcodes are only parsed: a small machine builds an inert tree of names, calls and
values, in which nothing is imported and nothing is called, and the columns are then
taken out of the few shapes of tree that a data frame of numbers and strings has.
Every other opcode, name or shape is an error.
"""

import dataclasses
import io
import lzma
import pickletools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_MIB = 1 << 20
_MARK = object()
_NUMBERS = frozenset(("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
_LITERALS = frozenset(
    (
        *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
        *("BYTEARRAY8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class _Name:
    """`module.attribute`, a string and nothing more."""

    path: str


@dataclasses.dataclass
class _Call:
    """A call that the pickle asks for and that never happens."""

    name: str
    args: tuple
    state: Any = None


class _Machine:
    """Stack and memo of the opcodes."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def pop(self, count: int) -> tuple:
        if count > len(self.stack):
            raise ValueError("frames: the pickle takes more than it has put")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return tuple(found)

    def pop_mark(self) -> tuple:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = tuple(self.stack[place + 1 :])
                del self.stack[place:]
                return found
        raise ValueError("frames: the pickle has no open mark")

    def step(self, name: str, arg: Any) -> None:
        """One opcode."""
        if name in _LITERALS:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(self.pop(_TUPLES[name]))
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._recall(arg))
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "MEMOIZE":
            self.memo.append(self._top(object))
        elif name == "TUPLE":
            self.stack.append(self.pop_mark())
        elif name == "STACK_GLOBAL":
            self.stack.append(_Name(".".join(map(str, self.pop(2)))))
        elif name in ("REDUCE", "NEWOBJ"):
            self._call(*self.pop(2))
        else:
            self._fill(name)

    def _recall(self, place: int) -> Any:
        if place >= len(self.memo):
            raise ValueError("frames: the pickle recalls what it has not stored")
        return self.memo[place]

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"frames: the pickle has no {kind.__name__} to change")
        return self.stack[-1]

    def _call(self, name: Any, args: Any) -> None:
        if not isinstance(name, _Name) or not isinstance(args, tuple):
            raise ValueError(f"frames: the pickle calls {name!r}, which is no name")
        self.stack.append(_Call(name.path, args))

    def _fill(self, name: str) -> None:
        if name == "APPEND":
            (item,) = self.pop(1)
            self._top(list).append(item)
        elif name == "APPENDS":
            items = self.pop_mark()
            self._top(list).extend(items)
        elif name == "SETITEM":
            key, value = self.pop(2)
            self._top(dict)[key] = value
        elif name == "SETITEMS":
            items = self.pop_mark()
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "BUILD":
            (state,) = self.pop(1)
            self._top(_Call).state = state
        else:
            raise ValueError(f"frames: opcode {name} is not one of a plain data frame")


def _tree(data: bytes) -> Any:
    """What the pickle describes, as names, calls and values."""
    machine = _Machine()
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            (result,) = machine.pop(1)
            return result
        if opcode.name not in ("PROTO", "FRAME"):
            machine.step(opcode.name, arg)
    raise ValueError("frames: the pickle does not end")


def _expect(node: Any, *names: str) -> _Call:
    found = node.name if isinstance(node, _Call) else type(node).__name__
    if found not in names:
        raise ValueError(f"frames: found {found}, wanted {' or '.join(names)}")
    return node


def _numpy(module: str, name: str) -> tuple[str, str]:
    """The two paths that NumPy 1 and 2 give a function."""
    return f"numpy.core.{module}.{name}", f"numpy._core.{module}.{name}"


def _dtype(node: Any) -> np.dtype:
    call = _expect(node, "numpy.dtype")
    code, order = call.args[0], call.state[1]
    if code in ("O8", "O"):
        return np.dtype(object)
    if code not in _NUMBERS or order not in ("<", ">", "|", "="):
        raise ValueError(f"frames: dtype {order}{code} is not read")
    return np.dtype(code).newbyteorder(order)


def _array(node: Any) -> np.ndarray:
    """An array of numbers or strings."""
    buffer, rebuild = (
        _numpy("numeric", "_frombuffer"),
        _numpy("multiarray", "_reconstruct"),
    )
    call = _expect(node, *buffer, *rebuild)
    if call.name in buffer:
        data, dtype, shape, order = call.args
        dtype = _dtype(dtype)
        if dtype.hasobject:
            raise ValueError("frames: a buffer of objects is not read")
        return np.frombuffer(data, dtype).reshape(shape, order=order)
    _, shape, dtype, fortran, content = call.state
    dtype, order = _dtype(dtype), "F" if fortran else "C"
    if not dtype.hasobject:
        return np.frombuffer(content, dtype).reshape(shape, order=order)
    plain = (str, int, float, bool, type(None))
    if not all(isinstance(value, plain) for value in content):
        raise ValueError("frames: an array of objects holds more than plain values")
    found = np.empty(len(content), object)
    found[:] = content
    return found.reshape(shape, order=order)


def _places(node: Any, count: int) -> list[int]:
    """Column numbers of a block of `count` columns."""
    if not (isinstance(node, _Call) and node.name == "builtins.slice"):
        return _array(node).tolist()
    places = range(*node.args)
    if places != range(places.start, places.start + count * places.step, places.step):
        raise ValueError(f"frames: {count} columns are said to be at {places}")
    return list(places)


def _columns(frame: Any) -> Iterator[tuple[str, np.ndarray]]:
    frame = _expect(frame, "pandas.core.frame.DataFrame")
    manager = _expect(
        frame.state["_mgr"], "pandas.core.internals.managers.BlockManager"
    )
    blocks, axes = manager.args
    header = _expect(axes[0], "pandas.core.indexes.base._new_Index")
    names = _array(header.args[1]["data"]).tolist()
    for block in blocks:
        call = _expect(block, "pandas._libs.internals._unpickle_block")
        values, places, _ = call.args
        rows = _array(values)
        wanted = [names[place] for place in _places(places, len(rows))]
        yield from zip(wanted, rows, strict=True)


def parse(data: bytes) -> Mapping[str, np.ndarray]:
    """Columns of a pickled data frame.

    Args:
      data: the pickle of a pandas frame of numbers and strings.

    Returns:
      Column name -> array [rows], of numbers or of Python objects (strings).

    Raises:
      ValueError: the bytes are anything else; the message says what was met. No
        name in them is imported or called.
    """
    try:
        found = dict(_columns(_tree(data)))
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError("frames: not the pickle of a plain data frame") from error
    if len({len(column) for column in found.values()}) > 1:
        raise ValueError("frames: columns have different lengths")
    return found


def parse_xz(data: bytes, limit: int = 256 * _MIB) -> Mapping[str, np.ndarray]:
    """`parse` of bytes compressed with xz, at most `limit` after decompression.

    Raises:
      ValueError: larger than `limit`, no xz file, or as in `parse`.
    """
    try:
        with lzma.open(io.BytesIO(data)) as file:
            content = file.read(limit + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError("frames: not an xz file") from error
    if len(content) > limit:
        raise ValueError(f"frames: more than {limit} bytes after decompression")
    return parse(content)
