"""Pickles read without running anything in them: an interpreter of the few opcodes that torch.save writes.

A pickle is a program. Here the only things it can call are builders that this package gives it, which make plain
values; everything else that it may ask for is refused. Steps and what they make are counted, and keys of mappings are
plain, so that neither time nor memory nor hashing has no end. Integers in a row, of which sparse fine-tunes consist,
are one step, and where they are many they are kept as an array.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 1_000_000  # containers and remembered values
_MOST_STEPS = 2_000_000  # about half a second; a model of a thousand tensors takes 30,000
_LONGEST_INTEGER = 16  # bytes


class PickleError(ValueError):
    """A pickle that is damaged, or that asks for more than plain tensors."""


@dataclass(frozen=True)
class Builder:
    """What a pickle may call: a function of plain values that makes a plain value."""

    make: Callable[..., Any]


@dataclass
class Built:
    """A made value that takes the state which pickles give to objects; others ignore it."""

    state: Any = None


def unpickle(raw: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any], at: int = 0) -> tuple[Any, int]:
    """Carry out the pickle that begins at a byte; give its value, and where it ends.

    Of a list with many integers in a row, many may be one `array` in it.

    Args:
        raw: the bytes.
        names: `module name` → what stands for it: a Builder, or a constant.
        persistent: makes a value of a persistent id.
        at: where the pickle begins.

    Raises PickleError.

    """
    machine = _Machine(raw, names, persistent, at)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise PickleError(f"a damaged pickle, near byte {machine.at}") from error


class _Machine:
    def __init__(self, raw: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any], at: int) -> None:
        self.at = at
        self._raw, self._names, self._persistent = raw, names, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._made = 0

    def run(self) -> Any:
        raw, table = self._raw, _OPCODES
        for _ in range(_MOST_STEPS):
            opcode = raw[self.at]
            self.at += 1
            if opcode == _STOP:
                return self._stack.pop()
            act = table.get(opcode)
            if act is None:
                raise PickleError(f"the opcode {bytes([opcode])!r}, which no file of tensors needs")
            act(self)
        raise PickleError(f"more than {_MOST_STEPS:,} steps")

    # ---- bytes and the stack

    def take(self, count: int) -> bytes:
        found = self._raw[self.at : self.at + count]
        if len(found) < count:
            raise PickleError("it ends too early")
        self.at += count
        return found

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self._raw, self.at)
        self.at += form.size
        return value

    def line(self) -> str:
        end = self._raw.index(b"\n", self.at, self.at + 1000)
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def made(self, value: Any) -> None:
        self.count()
        self._stack.append(value)

    def count(self, values: int = 1) -> None:
        self._made += values
        if self._made > _MOST:
            raise PickleError(f"more than {_MOST:,} values")

    def since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        found = self._stack[mark:]
        del self._stack[mark:]
        return found

    def plain_since_mark(self) -> list[Any]:
        """Give each integer of a run by itself."""
        found = self.since_mark()
        if not any(type(one) is array for one in found):
            return found
        self.count(sum(len(one) for one in found if type(one) is array))
        return [value for one in found for value in (one if type(one) is array else (one,))]

    # ---- what opcodes do

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def integers(self) -> None:
        """Read the integers that follow each other; the last ones stay single, for other opcodes take them so."""
        raw, at, found = self._raw, self.at - 1, array("i")
        kind = _INTEGERS.get(raw[at])
        while kind is not None:
            while raw[at : at + kind.block : kind.width] == kind.opcodes:
                found.extend(kind.many.unpack_from(raw, at))
                at += kind.block
            for _ in range(_RUN):
                kind = _INTEGERS.get(raw[at])
                if kind is None:
                    break
                found.append(*kind.one.unpack_from(raw, at))
                at += kind.width
        self.at = at
        single = found[-_SINGLE:].tolist() if len(found) > 2 * _SINGLE else found.tolist()
        if len(found) > len(single):
            self.push(found[: -len(single)])
        self.count(len(single))
        self._stack.extend(single)

    def integer(self) -> None:
        size = self.take(1)[0]
        if size > _LONGEST_INTEGER:
            raise PickleError(f"an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, form: struct.Struct, encoding: str = "utf-8") -> None:
        self.push(self.take(self.number(form)).decode(encoding))

    def tuple_of(self, count: int) -> None:
        found = tuple(self._stack[-count:])
        if len(found) < count:
            raise PickleError("its stack is empty")
        del self._stack[-count:]
        self.made(found)

    def remember(self, key: int) -> None:
        self.count()
        self._memo[key] = self._stack[-1]

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError("it appends to what is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleError("it sets an item of what is no mapping")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise PickleError(f"a {type(key).__name__} as the key of a mapping")
            target[key] = value

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_items([key, value])

    def global_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError("it asks for what has no name")
        if f"{module} {name}" not in self._names:
            raise PickleError(f"it asks for {module}.{name}, which is no part of a plain tensor")
        self.push(self._names[f"{module} {name}"])

    def global_of_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.global_name(module, name)

    def reduce(self) -> None:
        arguments, builder = self._stack.pop(), self._stack.pop()
        if not isinstance(builder, Builder) or type(arguments) is not tuple:
            raise PickleError("it calls what is no part of a plain tensor")
        self.made(builder.make(*arguments))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Built):
            target.state = state
        elif type(target) is not dict:  # of an OrderedDict the attributes, such as _metadata, are of no use here
            raise PickleError("it changes what is no part of a plain tensor")

    def persistent(self) -> None:
        self.made(self._persistent(self._stack.pop()))


_RUN = 64  # integers of one kind that are read at once
_SINGLE = 4  # integers that stay single: no opcode takes more than three


class _Kind:
    """A kind of integers: how one of them is read, and how many in a row are, each behind its opcode."""

    def __init__(self, opcode: str, form: str) -> None:
        self.one, self.many = struct.Struct(f"<x{form}"), struct.Struct("<" + f"x{form}" * _RUN)
        self.width, self.block = self.one.size, self.many.size
        self.opcodes = opcode.encode() * _RUN


_INTEGERS = {ord(opcode): _Kind(opcode, form) for opcode, form in (("K", "B"), ("M", "H"), ("J", "i"))}
_STOP = ord(".")
_BYTE, _UINT, _LONG = (struct.Struct(f"<{one}") for one in "BIQ")
_DOUBLE = struct.Struct(">d")
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.number(_BYTE),  # PROTO
    0x95: lambda m: m.number(_LONG),  # FRAME
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.made(None),
    0x88: lambda m: m.made(True),
    0x89: lambda m: m.made(False),
    **dict.fromkeys(_INTEGERS, _Machine.integers),
    0x8A: _Machine.integer,  # LONG1
    ord("G"): lambda m: m.push(m.number(_DOUBLE)),
    ord("X"): lambda m: m.text(_UINT),  # BINUNICODE
    0x8C: lambda m: m.text(_BYTE),  # SHORT_BINUNICODE
    ord("U"): lambda m: m.text(_BYTE, "latin1"),  # SHORT_BINSTRING, of Python 2
    ord("C"): lambda m: m.push(m.take(m.number(_BYTE))),  # SHORT_BINBYTES
    ord(")"): lambda m: m.made(()),
    ord("]"): lambda m: m.made([]),
    ord("}"): lambda m: m.made({}),
    ord("t"): lambda m: m.made(tuple(m.plain_since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): lambda m: m.append([m._stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.plain_since_mark()),
    ord("q"): lambda m: m.remember(m.number(_BYTE)),
    ord("r"): lambda m: m.remember(m.number(_UINT)),
    0x94: lambda m: m.remember(len(m._memo)),  # MEMOIZE
    ord("h"): lambda m: m.push(m._memo[m.number(_BYTE)]),
    ord("j"): lambda m: m.push(m._memo[m.number(_UINT)]),
    ord("c"): lambda m: m.global_name(m.line(), m.line()),
    0x93: _Machine.global_of_stack,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
