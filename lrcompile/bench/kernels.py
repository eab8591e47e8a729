"""Our kernels against the vendor's library, torch.compile and other libraries, on the GPU at hand.

For every shape: median milliseconds of forward, and of forward and backward, the part of the roofline reached (of the copy
bandwidth and the product rate measured in the same run), and peak memory. Without a GPU the cost model's expectations
for one are printed beside empty columns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from lrcompile.cost import Device, device_named
from lrcompile.kernels import launch
from lrcompile.kernels.lowrank_linear import Shape, lowrank_linear, predict_backward, predict_forward

# (in_features, out_features) of the block matrices that differ.
LAYERS = {
    "gpt2-1.5b": [(1600, 4800), (1600, 1600), (1600, 6400), (6400, 1600)],
    "llama-3-8b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "qwen3-0.6b": [(1024, 2048), (2048, 1024), (1024, 1024), (1024, 3072), (3072, 1024)],
}
TOKENS = (1, 16, 256, 4096, 16384)
RANKS = (64, 128, 256, None)  # None: a quarter of min(in, out)


@dataclass
class Row:
    """One measurement.

    Attributes:
        family: "lowrank_linear".
        model, tokens, in_features, out_features, rank: where.
        contender: what computed it.
        forward, both: median seconds of forward, and of forward and backward; None: not measured.
        roofline: of `both` (of `forward` where that is all), the least possible seconds over the seconds taken.
        peak_bytes: memory allocated above the operands.
        expected: seconds that the cost model predicts of `both`, or of `forward`.
    """

    family: str
    model: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    contender: str
    forward: float | None = None
    both: float | None = None
    roofline: float | None = None
    peak_bytes: int | None = None
    expected: float | None = None


@dataclass
class Peaks:
    """What this device reaches in this run: bytes/s of a large copy, FLOP/s of a large bf16 product."""

    bandwidth: float
    rate: float

    def least(self, flops: float, moved: float) -> float:
        """Seconds that the roofline allows."""
        return max(flops / self.rate, moved / self.bandwidth)


def shapes() -> Iterator[tuple[str, Shape]]:
    """Every shape of the bench, the widest layers of each model first, so that a cut run has seen those."""
    for tokens in (16384, 1, 4096, 256, 16):
        for model, layers in LAYERS.items():
            for k, n in sorted(layers, key=lambda layer: -layer[0] * layer[1]):
                for rank in RANKS:
                    yield model, Shape(tokens, k, n, rank or min(k, n) // 4)


def run(*, quick: bool = False, out: Path | None = None, minutes: float = 7.0, target: str = "H100") -> None:
    """Measure, print the table, and write `out`/kernels-DEVICE.json.

    Args:
        quick: two shapes only.
        out: folder of the result file; None: print only.
        minutes: stop measuring after so long; what was not reached is missing from the file, and that is told.
        target: the GPU whose expected figures are printed where there is none.
    """
    todo = list(shapes())[:2] if quick else list(shapes())
    device = launch.describe(torch.device("cuda")) if torch.cuda.is_available() else None
    if device is None:
        rows = [row for model, shape in todo for row in _expected(model, shape, device_named(target))]
        _print(rows, f"{target}: expected by the cost model, not measured (no GPU here)")
        return
    peaks, name = _peaks(), torch.cuda.get_device_name()
    rows, start, reached = [], time.monotonic(), 0
    for model, shape in todo:
        if time.monotonic() - start > 60 * minutes:
            break
        rows += _measure(model, shape, device, peaks)
        reached += 1
    title = f"{name}, torch {torch.__version__}: copy {peaks.bandwidth / 1e12:.2f} TB/s, bf16 {peaks.rate / 1e12:.0f} TFLOP/s"
    if reached < len(todo):
        title += f"; {len(todo) - reached} of {len(todo)} shapes not reached in {minutes} minutes"
    _print(rows, title)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"kernels-{name.replace(' ', '-')}.json"
        body = {"device": name, "torch": torch.__version__, **asdict(peaks), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(body, indent=1), encoding="utf-8")
        print(f"wrote {path}")


def _work(shape: Shape, both: bool) -> tuple[float, float]:
    """FLOPs, and bytes that have to move in bf16, of a pair; backward as without recomputation: the least there is."""
    m, k, n, r = shape.tokens, shape.in_features, shape.out_features, shape.rank
    flops, moved = 2.0 * m * r * (k + n), 2.0 * (m * (k + n) + r * (k + n))
    if both:
        flops, moved = 3 * flops, moved + 2.0 * (m * (2 * k + n) + 2 * r * (k + n))
    return flops, moved


def _expected(model: str, shape: Shape, device: Device) -> list[Row]:
    forward = predict_forward(shape, torch.bfloat16, device)
    backward = predict_backward(shape, torch.bfloat16, device)
    where = (model, shape.tokens, shape.in_features, shape.out_features, shape.rank)
    return [
        Row("lowrank_linear", *where, f"ours ({forward.variant})", expected=forward.seconds + backward.seconds),
        Row("lowrank_linear", *where, "two library products", expected=forward.gemms + backward.gemms),
    ]


def _measure(model: str, shape: Shape, device: Device, peaks: Peaks) -> list[Row]:
    m, k, n, r = shape.tokens, shape.in_features, shape.out_features, shape.rank
    make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16) / size[-1] ** 0.5  # noqa: E731
    x, a, b, w = (t.requires_grad_() for t in (make(m, k), make(r, k), make(n, r), make(n, k)))
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def pair(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, a), b)

    contenders: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "dense": (F.linear, (x, w)),
        "two library products": (pair, (x, a, b)),
        "ours": (lambda *t: lowrank_linear(*t, None), (x, a, b)),
    }
    if shape.tokens in (1, 16384) and shape.rank in (128, 256):  # compiling each is slow
        torch._dynamo.reset()
        contenders["torch.compile max-autotune"] = (torch.compile(pair, mode="max-autotune-no-cudagraphs"), (x, a, b))
    expected = {row.contender.split(" (")[0]: row.expected for row in _expected(model, shape, device)}
    rows = []
    for name, (function, operands) in contenders.items():
        forward, _ = _time(lambda f=function, o=operands: f(*o), grad=False)  # type: ignore[misc]
        both, peak = _time(lambda f=function, o=operands: torch.autograd.grad(f(*o), o, dy), grad=True)  # type: ignore[misc]
        least = peaks.least(*_work(shape, both=True)) if name != "dense" else None
        rows.append(
            Row(
                "lowrank_linear",
                model,
                m,
                k,
                n,
                r,
                name,
                forward,
                both,
                least and least / both,
                peak,
                expected.get(name),
            )
        )
    return rows


def _time(function: Callable[[], Any], grad: bool) -> tuple[float, int]:
    """(median seconds on the device, peak bytes above what was allocated), the L2 cache cleared before each run."""
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device="cuda")
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peak = torch.cuda.max_memory_allocated() - before
        times = []
        for _ in range(15):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times), peak


def _peaks() -> Peaks:
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = _time(lambda: target.copy_(source), grad=False)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, _ = _time(lambda: left @ right, grad=False)
    return Peaks(2 * source.numel() / seconds, 2 * 8192**3 / product)


def _print(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in (
        "model",
        "tokens",
        "in → out",
        "rank",
        "what",
        "fwd µs",
        "fwd+bwd µs",
        "roofline",
        "peak MB",
        "expected µs",
    ):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    write = lambda x, scale: "" if x is None else f"{x * scale:.3g}"  # noqa: E731
    for row in rows:
        table.add_row(
            row.model, str(row.tokens), f"{row.in_features} → {row.out_features}", str(row.rank), row.contender,
            write(row.forward, 1e6), write(row.both, 1e6), write(row.roofline, 1), write(row.peak_bytes, 1e-6),
            write(row.expected, 1e6),
        )  # fmt: skip
    Console(width=130 if not Console().is_terminal else None).print(table)
