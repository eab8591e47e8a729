"""Character vectors out of R's lazy-load databases (.rdb): pieces of R's serialisation, each compressed by zlib.

The format is R's own (R Internals, "Serialization Formats"; src/main/serialize.c). Read are version 2 and 3, binary, of
vectors of strings; nothing else is needed here.
"""

from __future__ import annotations

import struct
import zlib

from lrcompile.errors import TrainError

_CHARSXP, _STRSXP = 9, 16
_LATIN1 = 1 << 2  # of a string's levels, which stand above its type and flags


def character_vectors(raw: bytes, where: str) -> list[list[str]]:
    """Every object of a .rdb, in the order it lies in the file.

    Each is four bytes, big-endian, its length, and a zlib stream of as many bytes.

    Args:
        raw: the file.
        where: to call it in messages.

    Raises:
        TrainError: it is cut or damaged, or an object is no vector of strings.
    """
    found, place = [], 0
    while place < len(raw):
        stream = zlib.decompressobj()
        try:
            (length,) = struct.unpack_from(">I", raw, place)
            data = stream.decompress(raw[place + 4 :])
        except (struct.error, zlib.error) as error:
            raise TrainError(f"{where} is no .rdb compressed by zlib, or a damaged one (at byte {place})") from error
        if len(data) != length or not stream.eof:
            raise TrainError(f"{where} is cut: the object at byte {place} has {len(data):,} bytes of {length:,}")
        try:
            found.append(_Reader(data).strings())
        except (struct.error, ValueError) as error:
            raise TrainError(f"{where}, the object at byte {place}: {error}") from error
        place = len(raw) - len(stream.unused_data)
    return found


class _Reader:
    """One serialised object."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 2
        if data[:2] != b"X\n":
            raise ValueError("not in R's binary serialisation")
        version, _, _ = self.number(), self.number(), self.number()
        if version not in (2, 3):
            raise ValueError(f"version {version} of R's serialisation; 2 and 3 are known")
        if version == 3:
            self.take(self.number())  # the name of the native encoding

    def strings(self) -> list[str]:
        if (kind := self.number() & 0xFF) != _STRSXP:
            raise ValueError(f"R type {kind}, not a vector of strings")
        return [self.string() for _ in range(self.number())]

    def string(self) -> str:
        flags, length = self.number(), self.number()
        if flags & 0xFF != _CHARSXP:
            raise ValueError(f"R type {flags & 0xFF} where a string belongs")
        if length == -1:
            raise ValueError("a string that is NA")
        return self.take(length).decode("latin-1" if flags >> 12 & _LATIN1 else "utf-8")

    def number(self) -> int:
        (value,) = struct.unpack_from(">i", self.data, self.place)
        self.place += 4
        return int(value)

    def take(self, length: int) -> bytes:
        part = self.data[self.place : self.place + length]
        if length < 0 or len(part) < length:
            raise ValueError("the object ends too early")
        self.place += length
        return part
