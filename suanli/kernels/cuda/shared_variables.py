"""What the symbols of a built kernel's library tell: its variables in shared memory, its copies.

The host headers make `__shared__` thread-local storage: the compiler then lays all of it out in one
place, that of templates and inline functions too, and names each variable with its extent.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from suanli.base.errors import SuanliError

_ANCHOR = "suanli_anchor"
_BAND = "suanli_band_"
_SYMBOL_TABLE = 2  # SHT_SYMTAB
_FUNCTION = 2  # STT_FUNC
_THREAD_LOCAL = 6  # STT_TLS
# Constructors and assignments from another one of the same class (Itanium C++ ABI, 5.1.4 and 5.1.9)
_COPIES = re.compile(r"(?:C[12]|aS)E(?:RK|O|R)S[0-9A-Z]*_$")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_NUMBER = re.compile(r"\d+")
_REST = re.compile(r"(?:_\d*_?)?")  # tells apart variables of one name in one function


@dataclass(frozen=True, kw_only=True)
class SharedVariable:
    """One variable in static shared memory.

    Attributes:
        name: As in the text; "" for what the compiler adds for itself.
        begin: Bytes from where the library's thread-local storage begins.
        size: In bytes.
    """

    name: str
    begin: int
    size: int


def shared_variables(library: Path) -> tuple[int, tuple[SharedVariable, ...]]:
    """Where the headers' own anchor lies, and the variables in the order of their places.

    Args:
        library: A kernel built by `host_build`; ELF of 64 bits.

    Raises:
        SuanliError: It has no anchor, so it is no such library.
    """
    anchor = -1
    found: dict[int, SharedVariable] = {}
    for mangled, begin, size in _symbols(library.read_bytes(), _THREAD_LOCAL):
        if _ANCHOR in mangled:
            anchor = begin
        if _BAND not in mangled and size > 0:
            name = plain_name(mangled)
            found[begin] = SharedVariable(name=name, begin=begin, size=size)
    if anchor < 0:
        raise SuanliError(f"{library.name} was not built to be executed on the CPU")
    return anchor, tuple(found[begin] for begin in sorted(found))


def special_functions(library: Path) -> tuple[tuple[int, int, int], ...]:
    """(begin, size, kind) of functions that copy a structure (1) and of the headers' own (2).

    Raises:
        SuanliError: It is no ELF library of 64 bits.
    """
    found = _symbols(library.read_bytes(), _FUNCTION)
    kinds = [2 if "suanli_" in name else 1 if _COPIES.search(name) else 0 for name, _, _ in found]
    return tuple(
        (begin, size, kind) for (_, begin, size), kind in zip(found, kinds, strict=True) if kind
    )


def plain_name(mangled: str) -> str:
    """The last identifier of a name as compilers mangle it; "" for guards and the headers' own."""
    if mangled.startswith(("_ZGV", "_ZTH", "_ZTW", "__tls")) or _ANCHOR in mangled:
        return ""
    if not mangled.startswith("_Z"):
        return mangled
    for match in reversed(list(_NUMBER.finditer(mangled))):
        length, rest = int(match[0]), mangled[match.end() :]
        if rest[:length].isidentifier() and _REST.fullmatch(rest[length:]):
            return rest[:length]
    return ""


def _symbols(image: bytes, kind: int) -> list[tuple[str, int, int]]:
    """(mangled name, place, size) of each symbol of a kind in an ELF image."""
    if image[:5] != b"\x7fELF\x02":
        raise SuanliError("the compiler made no ELF library of 64 bits")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry, count = struct.unpack_from("<HH", image, 0x3A)
    sections = [_SECTION.unpack_from(image, table + entry * k) for k in range(count)]
    found = []
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        names = sections[section[6]][4]
        for place in range(section[4], section[4] + section[5], _SYMBOL.size):
            name, info, _, _, value, size = _SYMBOL.unpack_from(image, place)
            if info & 15 == kind:
                end = image.index(b"\0", names + name)
                found.append((image[names + name : end].decode(), value, size))
    return found
