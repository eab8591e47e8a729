"""A head tied to the embedding is in an ExecuTorch file once.

The lookup finds the matrix among the program's constants, XNNPACK in a segment of its own; both hold the same bytes, and
segments of a file may overlap: XNNPACK's is made to lie inside the constants'. Only numbers in the file's table of segments
change (ExecuTorch's program.fbs: fields 4, 5 and 7 of Program; its extended header: bytes 8 to 40). ExecuTorch's own reader of
that schema tells no places of numbers, and its writer can't make segments that overlap.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from lrcompile.errors import ExportError

_ALIGNMENT = 128  # of segments, as ExecuTorch writes them
_WORTH = 1 << 10  # bytes; smaller ones may stay twice
# Slots of a FlatBuffer's vtable are two bytes each after its first four: 4 is a table's first field, 6 its second.
_SEGMENTS, _CONSTANTS, _NAMED = 12, 14, 18  # of Program


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
    from flatbuffers.number_types import Uint32Flags, Uint64Flags
    from flatbuffers.table import Table

    def tables(slot: int) -> list[Any]:
        at = program.Offset(slot)
        count = program.VectorLen(at) if at else 0
        return [Table(file, program.Indirect(program.Vector(at) + 4 * i)) for i in range(count)]

    program = Table(file, Table(file, 0).Indirect(0))
    segments = []
    for table in tables(_SEGMENTS):
        place = table.Offset(4)
        offset, size = (int(table.GetSlot(slot, 0, Uint64Flags)) for slot in (4, 6))
        segments.append(_Segment(place and table.Pos + place, offset, size))
    named = sorted({int(table.GetSlot(6, 0, Uint32Flags)) for table in tables(_NAMED)})
    if not (at := program.Offset(_CONSTANTS)):
        return segments, None, [], named
    constants = Table(file, program.Indirect(program.Pos + at))
    at = constants.Offset(6)
    offsets = struct.unpack_from(f"<{constants.VectorLen(at)}Q", file, constants.Vector(at)) if at else ()
    return segments, int(constants.GetSlot(4, 0, Uint32Flags)), list(offsets), named
