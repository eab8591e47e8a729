"""Shards in memory, every token of which can be told from every other; and small files to prepare."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.train.data import Shards


def shards_of(lengths: Sequence[int], prompts: Sequence[int] | None = None, files: int = 2) -> Shards:
    """Documents of these lengths whose tokens are 0, 1, 2 … through all of them; the end token, for padding, is the next."""
    bounds = np.array([lengths, prompts or [0] * len(lengths)], np.int64).T
    tokens = np.arange(sum(lengths))
    parts = np.array_split(np.arange(len(lengths)), min(files, len(lengths)))
    ends = np.cumsum(lengths)
    data = np.split(tokens, [ends[part[-1]] for part in parts[:-1]])
    index: dict[str, Any] = {
        "kind": "text" if prompts is None else "prompts",
        "fingerprint": "f" * 64,
        "tokenizer": {"kind": "bytes", "fingerprint": "t" * 64, "end": len(tokens), "vocab_size": len(tokens) + 1},
        "shards": [{"documents": len(part)} for part in parts],
    }
    return Shards(Path("memory"), index, data, bounds)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- packages, as the registries' files are made -----------------------------------------------------------------------


def rdb_of(objects: Sequence[Sequence[str]], version: int = 3) -> bytes:
    """R's lazy-load database of vectors of strings: a length and a zlib stream of its serialisation for each."""
    whole = b""
    for strings in objects:
        data = b"X\n" + struct.pack(">iii", version, 0x00040201, 0x00030500)
        if version == 3:
            data += struct.pack(">i", 5) + b"UTF-8"
        data += struct.pack(">ii", 16, len(strings))
        for text in strings:
            latin = not text.isascii()
            raw = text.encode("latin-1" if latin else "ascii")
            data += struct.pack(">ii", (4 if latin else 64) << 12 | 9, len(raw)) + raw
        whole += struct.pack(">I", len(data)) + zlib.compress(data)
    return whole


def tar_of(files: Mapping[str, bytes], kind: str) -> bytes:
    """A tar of these files, compressed by "gz" or "xz"."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def deb_of(members: Mapping[str, bytes]) -> bytes:
    """An ar archive, as a Debian package is one."""
    whole = b"!<arch>\n"
    for name, data in members.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        whole += head + data + b"\n" * (len(data) % 2)
    return whole
