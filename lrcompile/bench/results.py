"""What the measurements share: the name of the machine, files of results, and processes of their own."""

from __future__ import annotations

import json
import os
import platform
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from lrcompile.errors import LrcompileError

TIMEOUT = 3600.0  # seconds after which a process of its own is given up


def machine() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    named = re.search(r"^model name\s*: (.*)", told, flags=re.M)
    return (named[1] if named else platform.processor() or platform.machine()).strip()


def load() -> float | None:
    """Processes that want a core, averaged over the last minute: above the number of cores, times are too long."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def write(out: Path | None, name: str, figures: Mapping[str, Any]) -> None:
    """Write DIR/NAME-MACHINE.json, with the machine, torch and the load beside the figures; nothing where there is no DIR."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', machine()).strip('-')}.json"
    told = {
        "machine": machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**told, "load": load(), **figures}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def apart(function: Callable[..., Any], each: list[tuple[Any, ...]], timeout: float = TIMEOUT) -> list[Any]:
    """Call a function in processes of their own, all at once, one for each tuple of arguments; their results, in order.

    Args:
        function: at the top of a module, as are the classes of what goes in and out.
        each: arguments of each process.
        timeout: seconds until they are ended.

    Raises:
        LrcompileError: one of them failed, died, or took too long; the message has its last words.
    """
    context = mp.get_context("spawn")
    running = []
    for arguments in each:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(there, function, arguments))
        process.start()
        there.close()
        running.append((process, here))
    try:
        found = []
        for process, here in running:
            if not here.poll(timeout):
                raise LrcompileError(f"{function.__module__}: no answer within {timeout:.0f} s")
            try:
                value, problem = here.recv()
            except EOFError:
                process.join()
                raise LrcompileError(f"{function.__module__}: the process died with {process.exitcode}") from None
            if problem is not None:
                raise LrcompileError(problem)
            found.append(value)
        return found
    except LrcompileError:
        for process, _ in running:
            process.kill()  # the others may wait for it
        raise
    finally:
        for process, here in running:
            process.join()
            here.close()


def _answer(there: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer: tuple[Any, str | None]
    try:
        answer = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        answer = None, f"{type(error).__name__}: {first[:300]}"
    there.send(answer)
    there.close()
