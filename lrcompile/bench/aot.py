"""What every shipped kernel configuration compiles to, for every GPU target: shared memory, registers, spills.

Needs Triton, no GPU. A configuration "fits" within the target's shared memory and spills next to nothing.
"""

from __future__ import annotations

import os
from importlib import resources
from itertools import product

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import lrcompile.kernels
from lrcompile.cost import SHARED_BYTES
from lrcompile.errors import LrcompileError


def run(*, quick: bool = False) -> None:
    """Compile and print; `quick` takes the first family only."""
    os.environ.pop("TRITON_INTERPRET", None)  # compiled for real here, whatever this shell does in its tests
    from lrcompile.kernels.aot import shipped

    files = resources.files(lrcompile.kernels).joinpath("tuning").iterdir()
    families = sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))
    title = "Ahead-of-time compilation: the most that any configuration uses"
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("kernel", no_wrap=True)
    for column in ("target", "configs", "shared KiB\nof allowed", "registers", "spilled\nbytes", "matrix\nunits"):
        table.add_column(column, justify="right")
    bad = 0
    every = list(shipped(families[:1] if quick else families))
    for family in families:
        told = [row for row in every if row["family"] == family]
        bad += sum(not row["fits"] for row in told)
        last = ""
        kernels = dict.fromkeys(row["kernel"] for row in told)
        for kernel, arch in product(kernels, SHARED_BYTES):
            rows = [row for row in told if (row["kernel"], row["arch"]) == (kernel, arch)]
            if not rows:
                continue
            name = f"{family}: {kernel}"
            if name != last:
                table.add_section()
            most = {name: max(row[name] for row in rows) for name in ("shared_bytes", "registers", "spilled_bytes")}
            table.add_row(
                "" if name == last else name,
                arch,
                str(len(rows)),
                f"{most['shared_bytes'] / 1024:.0f} of {SHARED_BYTES[arch] / 1024:.0f}",
                str(most["registers"]),
                str(most["spilled_bytes"]),
                f"{sum(row['tensor_cores'] for row in rows)} of {len(rows)}",
            )
            last = name
    Console(width=None if Console().is_terminal else 80).print(table)
    if bad:
        raise LrcompileError(f"{bad} configuration(s) don't fit their target")
