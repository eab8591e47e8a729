"""Kernels compiled ahead of time, with no GPU: what a shipped configuration needs of each target.

Triton's wheel carries all it takes (ptxas and cuobjdump for NVIDIA, LLVM for AMD). Not for a process that runs Triton's
interpreter: there, kernels aren't compilable.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels.launch import Tile, interpreted, table

SPILLED_BYTES_ALLOWED = 64


@dataclass(frozen=True)
class Specimen:
    """A kernel with everything fixed that its machine code depends on.

    Attributes:
        kernel: the function under @triton.jit.
        pointers: argument -> element type ("bf16", "fp32", "i8"), of those that are tensors.
        constants: argument -> value, of the tl.constexpr ones and those that are None.
        unaligned: integer arguments that may have any value; all others, and all addresses, are multiples of 16.
    """

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    unaligned: tuple[str, ...] = ("m",)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        shared_bytes: shared memory of a block.
        registers: of a thread.
        spilled_bytes: local memory of a thread (NVIDIA), scratch registers' worth of it (AMD).
        tensor_cores: whether matrix instructions are in its code.
    """

    arch: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    tensor_cores: bool

    @property
    def fits(self) -> bool:
        """Within the device's shared memory, spilling next to nothing (nothing on AMD)."""
        allowed = SPILLED_BYTES_ALLOWED if self.arch.startswith("sm_") else 0
        return self.shared_bytes <= cost.SHARED_BYTES[self.arch] and self.spilled_bytes <= allowed


def compile_for(arch: str, specimen: Specimen, tile: Tile) -> Resources:
    """Compile for "sm_90", "gfx942", ... and read what came out.

    Raises:
        KernelError: this process runs Triton's interpreter.
    """
    if interpreted():
        raise KernelError("TRITON_INTERPRET is set: compile ahead of time in a process without it")
    names: list[str] = specimen.kernel.arg_names
    signature, aligned = {}, {}
    for position, name in enumerate(names):
        if name in specimen.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{specimen.pointers[name]}" if name in specimen.pointers else "i32"
        if name not in specimen.unaligned:
            aligned[(position,)] = [["tt.divisibility", 16]]
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    source = ASTSource(specimen.kernel, signature, specimen.constants, aligned)
    compiled = triton.compile(source, target=target, options=tile.options)
    read = _read_nvidia if nvidia else _read_amd
    return Resources(arch, compiled.metadata.shared, *read(compiled.asm))


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, bool]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    matrix = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", asm["ptx"])
    return used["REG"], used["STACK"] + used["LOCAL"], matrix is not None


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, bool]:
    text = asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    return used["vgpr_count"], 4 * used["vgpr_spill_count"], "v_mfma" in text


def shipped(
    families: Sequence[str], targets: Sequence[str] = (), workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Compile every row of these families' tuning tables, for every target it is shipped for.

    Args:
        families: whose FAMILY_triton.py has a function `specimen(kernel, row)` that gives the Specimen of a row.
        targets: "sm_90" and others, these alone; all where none is named.
        workers: processes that share the work; as many as there are cores unless told.

    Yields:
        One JSON-able dict for each, in order: family, kernel, precision, up_to, tile, the fields of Resources, and `fits`.
    """
    jobs = [
        (family, kernel, row, arch)
        for family in families
        for kernel, rows in table(family).items()
        for row in rows
        for arch in row["arch"]
        if not targets or arch in targets
    ]
    # Spawned: a forked child would inherit the state of the compiler's threads.
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_row, jobs, chunksize=4)


def _compile_row(job: tuple[str, str, dict[str, Any], str]) -> dict[str, Any]:
    family, kernel, row, arch = job
    specimen = importlib.import_module(f"lrcompile.kernels.{family}_triton").specimen
    resources = compile_for(arch, specimen(kernel, row), Tile(**row["tile"]))
    told = {name: row[name] for name in ("precision", "up_to", "tile")}
    return {"family": family, "kernel": kernel, **told, **asdict(resources), "fits": resources.fits}


if __name__ == "__main__":  # python -m lrcompile.kernels.aot FAMILY ... TARGET ...: a JSON object a line
    named = [word for word in sys.argv[1:] if word in cost.SHARED_BYTES]
    for line in shipped([word for word in sys.argv[1:] if word not in named], named):
        print(json.dumps(line), flush=True)
