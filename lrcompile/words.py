"""Numbers and names as people read them: 1.23M, 5.3 GB, layers.0-31.mlp.up_proj."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def count(n: float) -> str:
    """1234567 -> "1.23M"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}" if abs(n) < 999.5 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


def size(n: float) -> str:
    """1234567 -> "1.23 MB"; decimal units."""
    text = count(n)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def change(before: float, after: float, write: Any = count) -> str:
    """ "12M → 4M (3.00x)"."""
    if before == after:
        return str(write(before))
    return f"{write(before)} → {write(after)}" + (f" ({before / after:.2f}x)" if after else "")


def fold(names: Iterable[str]) -> list[str]:
    """Repeated layers as one: ["h.0.fc", "h.1.fc", "out"] -> ["h.0-1.fc", "out"]. Order of first appearance."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        shape = ".".join(
            "{}" if part.isdigit() else part.replace("{", "{{").replace("}", "}}") for part in name.split(".")
        )
        groups.setdefault(shape, []).append(tuple(int(part) for part in name.split(".") if part.isdigit()))
    return [shape.format(*index) for shape, indices in groups.items() for index in _ranges(indices)]


def _ranges(indices: Sequence[tuple[int, ...]]) -> list[tuple[str, ...]]:
    if not indices[0]:
        return [()]
    columns = [sorted(set(column)) for column in zip(*indices, strict=True)]
    if math.prod(map(len, columns)) == len(indices):
        return [tuple(map(_range, columns))]
    return [
        (str(first), *rest)
        for first in columns[0]
        for rest in _ranges([index[1:] for index in indices if index[0] == first])
    ]


def _range(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def fold_lines(lines: Iterable[str]) -> list[str]:
    """Lines "site: what" with the same `what` as one, their sites folded; the number of sites in front."""
    by_change: dict[str, list[str]] = {}
    for line in lines:
        site, _, what = line.partition(": ")
        by_change.setdefault(what, []).append(site)
    out = []
    for what, sites in by_change.items():
        folded = fold(name.removesuffix(".weight") for site in sites for name in site.split(", "))
        where = ", ".join(folded[:4]) + (f" and {len(folded) - 4} more" if len(folded) > 4 else "")
        times = f"{len(sites)} × " if len(sites) > 1 else ""
        out.append(f"{times}{what}: {where}" if what else where)
    return out
