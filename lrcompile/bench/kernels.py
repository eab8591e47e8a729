"""Our kernels against the vendor's library, torch.compile and other libraries' kernels, on the GPU at hand.

For each case: median microseconds of forward, and of forward and backward; the part of the roofline reached (of the copy
bandwidth and the bf16 product rate measured in the same run); peak memory; and what the cost model expects. Without a
GPU, its expectations stand beside empty columns. `--show FILE` prints the table of a committed result file.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lrcompile.bench.contenders import Case, cases, contenders, expected
from lrcompile.cost import device_named
from lrcompile.errors import LrcompileError
from lrcompile.kernels import launch

FLUSHED_BYTES = 256 << 20  # more than any last-level cache of the table but AMD's
REPEATS = 15


@dataclass
class Row:
    """One contender in one case; seconds are medians, None where not measured.

    Attributes:
        case: where.
        name: of the contender.
        forward, both: seconds of forward, and of forward and backward.
        roofline: the least seconds that the roofline allows over those taken, of `both` (of `forward` without it).
        peak_bytes: allocated above the operands, by forward and backward.
        expected: seconds of forward, and of both, that the cost model predicts.
        error: why it could not be measured.
    """

    case: Case
    name: str
    forward: float | None = None
    both: float | None = None
    roofline: float | None = None
    peak_bytes: int | None = None
    expected: tuple[float, float] | None = None
    error: str = ""


@dataclass
class Result:
    """A run: the device, its measured peaks (bytes/s of a copy, FLOP/s of a bf16 product), and the rows."""

    device: str
    torch: str
    bandwidth: float | None
    rate: float | None
    rows: list[Row]
    not_reached: int = 0

    @classmethod
    def read(cls, path: Path) -> Result:
        """A result file.

        Raises:
            LrcompileError: it can't be read as one.
        """
        try:
            body = json.loads(path.read_text("utf-8"))
            rows = [Row(**{**row, "case": Case(**row["case"])}) for row in body.pop("rows")]
            return cls(**body, rows=rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LrcompileError(f"{path} is no result of `lrcompile bench kernels --out`: {error}") from error


def run(
    *,
    quick: bool = False,
    out: Path | None = None,
    minutes: float = 7.0,
    target: str = "H100",
    show: Path | None = None,
) -> None:
    """Measure, print the table, and write it.

    Args:
        quick: the first cases only.
        out: folder for kernels-DEVICE.json and the picture kernels-DEVICE.png; None: print only.
        minutes: stop measuring after so long; what was not reached is told and counted in the file.
        target: the GPU whose expected figures are printed where there is none.
        show: print this result file instead.
    """
    todo = list(cases())[:10] if quick else list(cases())
    if show is not None:
        _print(Result.read(show))
        return
    device = launch.describe(torch.device("cuda")) if torch.cuda.is_available() else None
    if device is None:
        known = device_named(target)
        rows = [Row(case, name, expected=told) for case in todo for name, told in expected(case, known).items()]
        _print(
            Result(
                f"{known.name}, expected by the cost model and not measured: no GPU here",
                torch.__version__,
                None,
                None,
                rows,
            )
        )
        if out is not None:
            print(f"nothing was measured, so nothing is written to {out}")
        return
    result = Result(torch.cuda.get_device_name(), torch.__version__, *_peaks(), rows=[])
    start = time.monotonic()
    for done, case in enumerate(todo):
        if time.monotonic() - start > 60 * minutes:
            result.not_reached = len(todo) - done
            break
        told = expected(case, device)
        for row in _measure(case, result):
            row.expected = told.get(row.name)
            result.rows.append(row)
    _print(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"kernels-{result.device.replace(' ', '-')}.json"
        path.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
        picture(result, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png')}")


def _measure(case: Case, result: Result) -> Iterable[Row]:
    compiled = case.tokens in (1, 16384) and case.rank == 128 and case.in_features >= 4096
    for name, make in contenders(case, compiled):
        try:
            forward, inputs = make()
            seconds, _ = timed(forward, gradients=False)
            row = Row(case, name, seconds)
            if inputs:
                dy = torch.randn_like(forward())
                row.both, row.peak_bytes = timed(lambda f=forward, t=inputs, g=dy: torch.autograd.grad(f(), t, g))  # type: ignore[misc]
        except Exception as error:  # a peer that can't take the case is told, and the bench goes on
            yield Row(case, name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        if name != "dense":
            flops, moved = case.work(backward=row.both is not None)
            assert result.rate is not None and result.bandwidth is not None
            row.roofline = max(flops / result.rate, moved / result.bandwidth) / (row.both or seconds)
        yield row


def timed(function: Callable[[], Any], gradients: bool = True) -> tuple[float, int]:
    """(median seconds on the device, peak bytes above those allocated before), with a cold L2 cache."""
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peak = torch.cuda.max_memory_allocated() - before
        times = []
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times), peak


def _peaks() -> tuple[float, float]:
    """(bytes/s read and written by a copy of 1 GiB, FLOP/s of a bf16 product of side 8192)."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy, _ = timed(lambda: target.copy_(source), gradients=False)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, _ = timed(lambda: left @ right, gradients=False)
    return 2 * source.numel() / copy, 2 * 8192**3 / product


def _print(result: Result) -> None:
    title = f"{result.device}, torch {result.torch}"
    if result.bandwidth and result.rate:
        title += f": copy {result.bandwidth / 1e12:.2f} TB/s, bf16 products {result.rate / 1e12:.0f} TFLOP/s"
    console = Console(width=None if Console().is_terminal else 80)
    console.print(title, style="bold", highlight=False)
    console.print("fwd, both: µs of forward, of forward and backward, measured; empty without a GPU")
    console.print("roof: part of the roofline reached; model: what the cost model expects")
    console.print("library: cuBLAS products (of a decoded weight); max-autotune: torch.compile's\n")
    kinds: dict[str, list[Row]] = {}
    for row in result.rows:
        kinds.setdefault(f"{row.case.family} {row.case.form}".strip(), []).append(row)
    for kind, found in kinds.items():
        console.print(_table(kind, found))
        for told in dict.fromkeys(f"{row.name} was not measured: {row.error}" for row in found if row.error):
            console.print(told, highlight=False)
    if result.not_reached:
        console.print(f"{result.not_reached} cases were not reached in the time given (--minutes)")


def _table(kind: str, found: list[Row]) -> Table:
    """The cases of one kernel family, in a width of 80."""
    table = Table(title=kind, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("case", no_wrap=True)
    table.add_column("what", no_wrap=True)
    for column in ("fwd", "both", "roof", "peak\nMB", "model\nfwd", "model\nboth"):
        table.add_column(column, justify="right", no_wrap=True, min_width=5)
    for case, rows in groupby(found, key=lambda row: row.case):
        size = f"{case.tokens} token{'s' * (case.tokens > 1)}" + (f", rank {case.rank}" if case.rank else "")
        where = iter((f"{case.model} {case.in_features}→{case.out_features}", size))
        for row in rows:
            times = [_short(t, 1e6) for t in (row.forward, row.both, *(row.expected or (None, None)))]
            told = (_short(row.roofline, 1), _short(row.peak_bytes, 1e-6))
            table.add_row(next(where, ""), row.name, *times[:2], *told, *times[2:])
        for line in where:
            table.add_row(line)
        table.add_section()
    return table


def _short(number: float | None, scale: float) -> str:
    """Three digits, no exponent up to a million."""
    return "" if number is None else f"{float(f'{number * scale:.3g}'):g}"


def picture(result: Result, path: Path) -> None:
    """The roofline, and where each contender stands under it: FLOP/s over FLOPs a byte, log-log."""
    from matplotlib.figure import Figure

    assert result.rate is not None and result.bandwidth is not None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names = sorted({row.name for row in result.rows if row.name != "dense"})
    for name in names:
        found = [row for row in result.rows if row.name == name and row.forward is not None]
        work = [row.case.work(backward=False) for row in found]
        axes.scatter(
            [flops / moved for flops, moved in work],
            [flops / (row.forward or 1.0) for (flops, _), row in zip(work, found, strict=True)],
            s=12, alpha=0.6, label=name,
        )  # fmt: skip
    intensity = [2.0**i for i in range(-2, 13)]
    axes.plot(intensity, [min(result.rate, i * result.bandwidth) for i in intensity], "k-", label="roofline, measured")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s, forward", title=result.device)
    axes.legend()
    figure.savefig(path, dpi=130)
