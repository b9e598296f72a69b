"""The members of a tar, found by reading its headers alone. Nothing is extracted, and no name is ever opened.

Each header is held against its checksum and the file's size. Long names (GNU's and pax) are understood; links,
devices, sparse and other special members are passed over. POSIX.1-1988 ustar, and pax of POSIX.1-2001.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", b"x", b"g", b"S"
EXTENDED = (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL)
MAX_EXTENDED = 1 << 20  # bytes of a long name or of a pax header


class Member(NamedTuple):
    """A member: its name, where its bytes are, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    plain: bool


class Damage(NamedTuple):
    """What is wrong at a byte of the tar. Members may follow, unless it is `final`: then what followed is hidden."""

    offset: int
    reason: str
    final: bool = False


def members(file: int, size: int) -> Iterator[Member | Damage]:
    """The members of a tar of `size` bytes, open for reading as descriptor `file`, in their order."""
    at, extended, well = 0, {}, True
    while at + BLOCK <= size:
        header = os.pread(file, BLOCK, at)
        if header == bytes(BLOCK):
            if not _zeros(file, at):
                yield Damage(at, "bytes follow the end mark", final=True)
            return
        parsed = _parse(header)
        name, length, kind = parsed or ("", 0, b"")
        if not parsed or kind == SPARSE or (kind in EXTENDED and length > MAX_EXTENDED):
            if well:  # once for a whole stretch
                yield Damage(at, f"the member {name!r} of a kind not understood" if parsed else "no header of a member")
            at, extended, well = at + BLOCK, {}, False
            continue
        start = at + BLOCK
        if kind in EXTENDED:
            extended |= _extended(kind, os.pread(file, length, start))
        else:
            name, length = extended.get("path", name), int(extended.get("size", length))
            if start + length > size:
                yield Damage(at, f"the file ends at byte {size} inside {name!r}", final=True)
                return
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            yield Member(name, start, length, kind in REGULAR and not sparse)
            extended = {}
        at, well = start + -(-length // BLOCK) * BLOCK, True
    yield Damage(min(at, size), f"the file ends at byte {size} without an end mark", final=True)


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header says of the next member: `path`, `size` and more."""
    if kind == LONG_NAME:
        return {"path": os.fsdecode(content.rstrip(b"\0"))}
    records = _pax(content) if kind == PAX else {}
    if not records.get("size", "0").isdecimal():
        del records["size"]
    return records


def _parse(header: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and kind; None where the checksum is wrong."""
    try:
        checksum = _octal(header[148:156])
        size = int.from_bytes(header[124:136], "big") & (1 << 88) - 1 if header[124] & 128 else _octal(header[124:136])
    except ValueError:
        return None
    if checksum != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        return None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return os.fsdecode(name), size, header[156:157]


def _octal(field: bytes) -> int:
    digits = field.strip(b"\0 ") or b"0"
    if not digits.isdigit():  # int would take a sign
        raise ValueError
    return int(digits, 8)


def _zeros(file: int, at: int) -> bool:
    while content := os.pread(file, 1 << 20, at):
        if content.strip(b"\0"):
            return False
        at += len(content)
    return True


def _pax(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` of a pax header, as far as they are well formed."""
    records = {}
    while content:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(content):
            break
        key, _, value = content[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        records[os.fsdecode(key)] = os.fsdecode(value)
        content = content[int(length) :]
    return records
