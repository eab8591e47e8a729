"""`--dry-run`: what a run would be and take, from shapes alone: no weights, no data, no other ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from lrcompile import cost
from lrcompile.errors import LrcompileError, TrainError
from lrcompile.kernels import launch
from lrcompile.show import plan_table
from lrcompile.sources import example_inputs, load_source, token_count
from lrcompile.train.build import check
from lrcompile.train.held import gathered_bytes, local_numel, optimizer_bytes
from lrcompile.train.language import blocks
from lrcompile.train.measure import Measured, measure
from lrcompile.train.optimizers import optimizers
from lrcompile.train.parallel import apart, check_dtypes
from lrcompile.train.settings import Run
from lrcompile.train.start import check_out, check_vocabulary, read_data
from lrcompile.weights.adopt import adopt
from lrcompile.weights.plan import Plan
from lrcompile.weights.planner import plan
from lrcompile.words import change, count, size


@dataclass
class Report:
    """What a dry run found. Bytes are rank 0's, the fullest.

    Attributes:
        run: its settings.
        plan: of the weights; None for a dense run.
        inputs: tokens in the example that was planned on; None where that isn't known.
        ranks, replicate, shard: ranks, copies of the parameters, ranks that share one.
        rows, accumulate: sequences that a rank takes at once, and how often in a step.
        parameters: in the dense model, and after.
        trained: of those after.
        weights, gradients, optimizer: bytes a rank.
        gathered: bytes of weights in use, in the computing precision: two blocks and what is around the blocks where weights
            are sharded; a copy of all where one rank computes in another dtype than it keeps.
        measured: one micro-batch; None where the model can't be run without numbers.
        device: that tokens/s are expected of; None where there is none that the cost table knows.
        seconds: of a step, without communication; None where it can't be told.
        notes: what a reader should know of the figures.
    """

    run: Run
    plan: Plan | None
    inputs: int | None
    ranks: int
    replicate: int
    shard: int
    rows: int
    accumulate: int
    parameters: tuple[int, int]
    trained: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    measured: Measured | None
    device: cost.Device | None
    seconds: float | None
    notes: list[str]

    @property
    def activations(self) -> int | None:
        """Bytes a rank keeps for backward."""
        return None if self.measured is None else self.measured.kept(self.run.parallel.checkpoint)

    @property
    def total(self) -> int:
        """All bytes a rank that are known."""
        return self.weights + self.gradients + self.optimizer + self.gathered + (self.activations or 0)

    @property
    def tokens_per_step(self) -> int:
        return self.run.batch * self.run.data.length

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together."""
        return None if self.seconds is None else self.tokens_per_step / self.seconds

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.plan is not None:
            parts += [plan_table(self.plan, None, self.inputs), Text("")]
        parts += [self._figures(), Text("")]
        return Group(*parts, *(Text(f"note: {note}", style="dim") for note in self.notes))

    def _figures(self) -> Table:
        run, found = self.run, self.measured
        table = Table(title="Dry run", show_header=False, box=None, padding=(0, 2), title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        before, after = self.parameters
        table.add_row("parameters", change(before, after), f"{before:,} → {after:,}, of which {self.trained:,} trained")
        if self.plan is not None:
            ratio = self.plan.byte_compression if self.plan.by_bytes else self.plan.asked_compression
            table.add_row("linear weights", f"{ratio:.2f}x", "fewer bytes" if self.plan.by_bytes else "fewer numbers")
        layout = f"{self.replicate} × {self.shard} ranks, {self.accumulate} × {self.rows} sequences of {run.data.length} each"
        table.add_row("a step", f"{count(self.tokens_per_step)} tokens", layout)
        table.add_row("all steps", f"{count(run.steps * self.tokens_per_step)} tokens", f"{run.steps:,} steps")
        table.add_section()
        states = f"{run.optimizer.name}, of what is trained"
        for name, held, told in (
            ("weights", self.weights, f"{run.model.dtype}, frozen ones as stored"),
            ("gradients", self.gradients, "of what is trained"),
            ("optimizer", self.optimizer, states),
            ("weights in use", self.gathered, f"in {run.parallel.precision}, gathered or cast"),
            ("activations", self.activations, self._kept()),
        ):
            table.add_row(name, "—" if held is None else size(held), told)
        table.add_row("bytes a rank", size(self.total), "all of these" if found else "of what is known")
        table.add_section()
        if found is not None:
            forward, dense = found.forward_flops / found.tokens, found.dense_flops / found.tokens
            table.add_row(
                "FLOPs a token",
                count(found.training_flops / found.tokens),
                f"forward and backward; forward {count(forward)}",
            )
            table.add_row("dense twin's", count(3 * dense), f"forward and backward; forward {count(dense)}")
        rate = self.tokens_per_second
        table.add_row("expected tokens/s", "—" if rate is None else count(rate), self._expected())
        if rate is not None:
            table.add_row(
                "expected hours", f"{run.steps * self.tokens_per_step / rate / 3600:.3g}", "of training, nothing else"
            )
        return table

    def _kept(self) -> str:
        if self.measured is None:
            return "can't be told"
        outside = size(self.measured.saved_outside)
        return f"kept for backward; {outside} by logits, loss and embedding; checkpoint: {self.run.parallel.checkpoint}"

    def _expected(self) -> str:
        if self.device is None:
            return "no device of the cost table is at hand (it has no CPU); --target H100 tells of one"
        reach = f"{cost.LIBRARY_REACH:.0%} of its FLOP/s, {cost.MEMORY_REACH:.0%} of its bandwidth"
        return f"{self.ranks} × {self.device.name} at {reach}; a roofline, not a measurement"


def dry_run(run: Run, world_size: int = 1, *, target: str | None = None, resume: bool = False) -> Report:
    """What a run would be and take. What the run would refuse at its start is refused by the same functions.

    Args:
        run: its settings; no data is needed, but where `data.train` is there it has to fit.
        world_size: ranks to tell of.
        target: a name of the cost table ("H100"); None: the GPU at hand.
        resume: of a run that is to go on, which has to be the one in `run.out`.

    Raises:
        TrainError: the batch can't be divided among the ranks, the model is shorter than the sequences or can't be read, the
            optimizer can't be had of it, the data doesn't fit, or the run isn't the one to resume.
        RecipeError, PlanError: what was asked for can't be had.
        KernelError: no such target.
    """
    replicate, shard, rows, accumulate = run.layout(world_size)
    recipe = run.recipe.make()
    device = (
        cost.device_named(target)
        if target
        else launch.describe(torch.device("cuda"))
        if torch.cuda.is_available()
        else None
    )
    model, inputs = on_meta(run.model.source, getattr(torch, run.model.dtype), run.model.attention)
    # A transformers config.json is all that is drawn; what else is on meta here has weights elsewhere.
    drawn = Path(run.model.source).is_file() and Path(run.model.source).suffix == ".json"
    check(model, run.model.source, recipe, length=run.data.length, drawn=drawn)
    notes = _start(run, model, resume)
    dense = sum(p.numel() for p in model.parameters())
    the_plan = None if recipe is None else plan(model, inputs, recipe)
    if the_plan is not None:
        adopt(model, the_plan)
        dense, after = the_plan.parameters
    else:
        after = dense
    precision = getattr(torch, run.parallel.precision)
    if world_size > 1 or precision != getattr(torch, run.model.dtype):  # FSDP is there
        check_dtypes(model, apart(model, blocks(model)))
    optimizers(model, **asdict(run.optimizer))
    found = None
    try:
        found = measure(model, rows=rows, length=run.data.length, precision=precision)
    except TrainError as error:
        notes.append(f"activations, FLOPs and tokens/s are not told: {error}")
    trained = [p for p in model.parameters() if p.requires_grad]
    report = Report(
        run=run,
        plan=the_plan,
        inputs=token_count(inputs),
        ranks=world_size,
        replicate=replicate,
        shard=shard,
        rows=rows,
        accumulate=accumulate,
        parameters=(dense, after),
        trained=sum(p.numel() for p in trained),
        weights=sum(local_numel(p, shard) * p.element_size() for p in model.parameters()),
        gradients=sum(local_numel(p, shard) * p.element_size() for p in trained),
        optimizer=sum(optimizer_bytes(model, run.optimizer.name, shard).values()),
        gathered=gathered_bytes(model, shard, precision),
        measured=found,
        device=device,
        seconds=None,
        notes=notes,
    )
    if found is not None and device is not None:
        report.seconds = _seconds(report, found, device, precision)
        if world_size > 1:
            notes.append("communication between the ranks is not in the tokens/s, as if it were all hidden")
    return report


def _start(run: Run, model: nn.Module, resume: bool) -> list[str]:
    """What the run would find: an error where it couldn't go on as asked, a note where only something else has to be done first."""
    notes = []
    try:
        check_out(run, resume)
    except TrainError as error:
        if resume:
            raise
        notes.append(str(error))
    if run.data.train and Path(run.data.train).exists():
        check_vocabulary(model, read_data(run, "sizes")[0])
    return notes


def on_meta(source: str, dtype: torch.dtype, attention: str) -> tuple[nn.Module, Any]:
    """The dense model of a source, on `meta` whatever it is, and example inputs.

    Raises:
        LrcompileError: as `lrcompile.sources.load_source` does.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        model, inputs = load_source(str(path / "config.json"))  # shapes are all that is needed
    elif path.suffix == ".gguf" and path.is_file():
        model, inputs = _of_gguf(path)
    else:
        with torch.device("meta"):
            model, inputs = load_source(source)
    made: dict[int, nn.Parameter] = {}  # Module.to("meta") would untie what is tied
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in made:
                shape = torch.empty_like(p, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
                made[id(p)] = nn.Parameter(shape, p.requires_grad)
            module._parameters[name] = made[id(p)]
    model.to("meta")  # the buffers
    settle: Any = getattr(model, "set_attn_implementation", None)
    if settle is not None:
        settle(attention)
    return model.train(), inputs


def _of_gguf(path: Path) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise LrcompileError(f"{path}: {type(error).__name__}: {error}") from error
    return model, example_inputs(model)


# --- time -------------------------------------------------------------------------------------------------------------


def _seconds(report: Report, found: Measured, device: cost.Device, precision: torch.dtype) -> float:
    """Of a step, by the cost model: each product at the roofline, what is kept for backward written and read once, and the
    weights, gradients and states passed over by the optimizer."""
    kind = launch.precision(precision)
    policy = report.run.parallel.checkpoint
    backward = (found.training_flops - found.forward_flops) / max(1, found.forward_flops)
    micro = 0.0
    for product in found.products:
        once = cost.Cost(product.flops, product.bytes, library=True).seconds(device, kind)
        again = policy == "block" and product.in_block
        micro += once * (1 + backward + again)
    micro += 2 * found.kept("none") / (device.bandwidth * cost.MEMORY_REACH)
    passed = 2 * (report.weights + report.optimizer) + report.gradients
    return report.accumulate * micro + passed / (device.bandwidth * cost.MEMORY_REACH)
