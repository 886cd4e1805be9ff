"""The symbols of a relocatable object file: ELF of either width, and WebAssembly.

Sources: the System V ABI's "Symbol Table"; WebAssembly's tool conventions, "Linking".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SYMTAB, _UNDEFINED_SECTION, _LOCAL = 2, 0, 0
_WASM_CUSTOM, _WASM_IMPORT, _WASM_SYMBOL_TABLE = 0, 2, 8
_WASM_DATA, _WASM_SECTION = 1, 3
_WASM_IS_LOCAL, _WASM_IS_UNDEFINED, _WASM_IS_NAMED = 0x02, 0x10, 0x40


@dataclass(frozen=True)
class Symbols:
    """Names that a file gives to others, and names that it needs of others."""

    defined: frozenset[str]
    undefined: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Symbols:
        """Reads a file.

        Raises:
            ValueError: it is neither a little-endian ELF file nor a WebAssembly object.
        """
        data = path.read_bytes()
        if data[:4] == b"\x7fELF" and data[5] == 1:
            symbols = list(_elf(data))
        elif data[:4] == b"\0asm":
            symbols = list(_wasm(data))
        else:
            raise ValueError(f"{path}: neither a little-endian ELF file nor a WebAssembly object")
        return cls(
            frozenset(name for name, defined in symbols if defined),
            frozenset(name for name, defined in symbols if not defined),
        )


def _elf(data: bytes) -> Iterator[tuple[str, bool]]:
    wide = data[4] == 2
    (sections,) = struct.unpack_from("<Q" if wide else "<I", data, 0x28 if wide else 0x20)
    size, count = struct.unpack_from("<HH", data, 0x3A if wide else 0x2E)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ" if wide else "<10I", data, sections + i * size)
        for i in range(count)
    ]
    for _, kind, _, _, offset, length, link, *_ in headers:
        if kind != _SYMTAB:
            continue
        names = headers[link][4]
        symbol = struct.Struct("<IBBHQQ" if wide else "<IIIBBH")
        for fields in symbol.iter_unpack(data[offset : offset + length]):
            name, info, section = (
                (fields[0], fields[1], fields[3]) if wide else (fields[0], fields[3], fields[5])
            )
            if info >> 4 != _LOCAL:
                end = data.index(b"\0", names + name)
                yield data[names + name : end].decode(), section != _UNDEFINED_SECTION


class _Reader:
    """WebAssembly's numbers and names, one after the other."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def name(self) -> str:
        length = self.number()
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def part(self) -> _Reader:
        """What follows as a length and so many bytes."""
        length = self.number()
        self.at += length
        return _Reader(self.data, self.at - length, self.at)


def _wasm(data: bytes) -> Iterator[tuple[str, bool]]:
    imports: dict[int, list[str]] = {}
    file = _Reader(data, 8, len(data))
    while file.at < file.end:
        kind, section = file.byte(), file.part()
        if kind == _WASM_IMPORT:
            imports = _wasm_imports(section)
        elif kind == _WASM_CUSTOM and section.name() == "linking":
            section.number()  # the version
            while section.at < section.end:
                part, body = section.byte(), section.part()
                if part == _WASM_SYMBOL_TABLE:
                    yield from _wasm_symbols(body, imports)


def _wasm_imports(section: _Reader) -> dict[int, list[str]]:
    """Names of imports by kind, in the order of their indices."""
    found: dict[int, list[str]] = {}
    for _ in range(section.number()):
        section.name()
        name, kind = section.name(), section.byte()
        found.setdefault(kind, []).append(name)
        if kind == 1:  # a table: its type before its limits
            section.byte()
        if kind in (1, 2):
            limits = section.byte()
            section.number()
            if limits & 1:
                section.number()
        elif kind == 3:  # a global: type and mutability
            section.byte()
            section.byte()
        else:
            section.number()
    return found


def _wasm_symbols(body: _Reader, imports: dict[int, list[str]]) -> Iterator[tuple[str, bool]]:
    # Kinds of symbols, and of imports: function 0 and 0, global 2 and 3, table 5 and 1.
    imported = {0: imports.get(0, []), 2: imports.get(3, []), 5: imports.get(1, [])}
    for _ in range(body.number()):
        kind, flags = body.byte(), body.number()
        undefined = bool(flags & _WASM_IS_UNDEFINED)
        if kind == _WASM_SECTION:
            body.number()
            continue
        if kind == _WASM_DATA:
            name = body.name()
            if not undefined:
                for _ in range(3):
                    body.number()
        else:
            index = body.number()
            named = not undefined or flags & _WASM_IS_NAMED
            name = body.name() if named else imported[kind][index]
        # The stack pointer and the table of functions are the linker's own.
        if not flags & _WASM_IS_LOCAL and (kind in (0, _WASM_DATA) or not undefined):
            yield name, not undefined
