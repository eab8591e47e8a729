"""A head tied to the embedding is in an ExecuTorch file once.

The lookup finds the matrix among the program's constants, XNNPACK in a segment of its own; both hold the same bytes, and
segments of a file may overlap: XNNPACK's is made to lie inside the constants'. Only numbers in the file's table of segments
change (ExecuTorch's program.fbs: fields 4, 5 and 7 of Program; its extended header: bytes 8 to 40).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lrcompile.errors import ExportError

_ALIGNMENT = 128  # of segments, as ExecuTorch writes them
_WORTH = 1 << 10  # bytes; smaller ones may stay twice


class _Segment(NamedTuple):
    place: int  # in the file, of its offset; 0 where the offset is 0 and not stored
    offset: int  # from the first segment on
    size: int


def share_tied(file: bytes) -> bytes:
    """The same program in fewer bytes: what is among its constants and a segment of its own too is kept once.

    Raises:
        ExportError: the file is no ExecuTorch program with a table of segments.
    """
    if file[4:6] != b"ET" or file[8:12] != b"eh00":
        raise ExportError("this is no ExecuTorch program with segments")
    (base,) = struct.unpack_from("<Q", file, 24)
    segments, home, offsets, named = _read(file)
    moved: dict[int, int] = {}
    if home is not None:
        start, end = base + segments[home].offset, base + segments[home].offset + segments[home].size
        for index in named:
            _, offset, size = segments[index]
            data = memoryview(file)[base + offset : base + offset + size]
            for at in offsets:
                if size >= _WORTH and start + at + size <= end and file[start + at : start + at + size] == data:
                    moved[index] = at
                    break
    if not moved:
        return file
    head, kept = bytearray(file[:base]), bytearray()
    for index in sorted(range(len(segments)), key=lambda i: segments[i].offset):
        place, offset, size = segments[index]
        if index in moved:
            continue
        kept.extend(bytes(-len(kept) % _ALIGNMENT))
        if place:
            struct.pack_into("<Q", head, place, len(kept))
        if index == home:
            moved = {i: len(kept) + at for i, at in moved.items()}
        kept.extend(memoryview(file)[base + offset : base + offset + size])
    for index, offset in moved.items():
        struct.pack_into("<Q", head, segments[index].place, offset)
    struct.pack_into("<Q", head, 32, len(kept))  # the header's size of all segments
    return bytes(head + kept)


def _read(file: bytes) -> tuple[list[_Segment], int | None, list[int], list[int]]:
    """The segments; which of them holds the constants, and the offsets of those in it; which are named."""
    program = _follow(file, 0)
    segments = []
    for table in _tables(file, program, 4):
        offset, size = _field(file, table, 0), _field(file, table, 1)
        segments.append(_Segment(offset, _number(file, offset, "<Q"), _number(file, size, "<Q")))
    named = sorted({_number(file, _field(file, table, 1), "<I") for table in _tables(file, program, 7)})
    at = _field(file, program, 5)
    if not at:
        return segments, None, [], named
    constants = _follow(file, at)
    offsets: list[int] = []
    if vector := _field(file, constants, 1):
        vector = _follow(file, vector)
        (count,) = struct.unpack_from("<I", file, vector)
        offsets = list(struct.unpack_from(f"<{count}Q", file, vector + 4))
    return segments, _number(file, _field(file, constants, 0), "<I"), offsets, named


# A FlatBuffer: tables with a vtable of 16-bit places, and 32-bit offsets from where they stand.


def _follow(file: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", file, at)[0]


def _field(file: bytes, table: int, index: int) -> int:
    """Where a field of a table is; 0 where it has its default."""
    vtable = table - struct.unpack_from("<i", file, table)[0]
    (size,) = struct.unpack_from("<H", file, vtable)
    place = struct.unpack_from("<H", file, vtable + 4 + 2 * index)[0] if 4 + 2 * index < size else 0
    return table + place if place else 0


def _number(file: bytes, at: int, kind: str) -> int:
    return struct.unpack_from(kind, file, at)[0] if at else 0


def _tables(file: bytes, table: int, index: int) -> list[int]:
    """A field that is a vector of tables."""
    at = _field(file, table, index)
    if not at:
        return []
    vector = _follow(file, at)
    (count,) = struct.unpack_from("<I", file, vector)
    return [_follow(file, vector + 4 + 4 * i) for i in range(count)]
