"""Tables and pictures for the terminal (rich): what a Plan decides, what an inspection saw, singular spectra."""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lrcompile.graph.names import plain_name
from lrcompile.weights.factor import singular_values
from lrcompile.words import change, count, fold, fold_lines, size

if TYPE_CHECKING:
    from lrcompile.graph.inspect import Report
    from lrcompile.graph.stage import Stage
    from lrcompile.weights.plan import Entry, Plan

_BARS = "▁▂▃▄▅▆▇█"

# --- a Plan -----------------------------------------------------------------------------------------------------------


def plan_groups(plan: Plan) -> list[list[Entry]]:
    """The entries of a Plan, repeated layers of the same fate together."""
    groups: dict[Any, list[Entry]] = {}
    for e in plan.entries:
        pattern = re.sub(r"\b\d+\b", "#", " = ".join(e.names))
        groups.setdefault((pattern, e.shape, e.rank, e.reason), []).append(e)
    return list(groups.values())


def group_name(group: Sequence[Entry]) -> str:
    """The folded names of one group, ".weight" dropped, tied names joined."""
    columns = [fold(e.names[i].removesuffix(".weight") for e in group) for i in range(len(group[0].names))]
    return " = ".join(", ".join(column) for column in columns[:3]) + (" = …" if len(columns) > 3 else "")


def plan_table(plan: Plan, spectra: dict[str, torch.Tensor] | None = None, tokens: int | None = None) -> RenderableType:
    """What a person needs to decide: every weight's rank, numbers before and after, totals.

    Args:
        plan: to show.
        spectra: entry key -> its singular values, for a picture of them.
        tokens: rows in the example inputs, to give FLOPs a token; else FLOPs of the whole example.
    """
    table = Table(title="Plan", title_justify="left", header_style="bold", expand=False)
    table.add_column("weights", overflow="fold")
    for name in ("shape", "rank", "numbers", "kept", "of model"):
        table.add_column(name, justify="right", no_wrap=name != "numbers")
    before, after = plan.parameters
    seen = 0
    for group in plan_groups(plan):
        e, dense, now = group[0], sum(e.dense_numel for e in group), sum(e.numel for e in group)
        seen += dense
        label = Text(group_name(group) + (f"  ×{len(group)}" if len(group) > 1 else ""), style="" if e.rank else "dim")
        if e.rank is None:
            label.append(f"\n{e.reason}", style="italic dim")
        rank = Text(str(e.rank), style="bold green") if e.rank is not None else Text("dense", style="dim")
        kept = f"{now / dense:.0%}" if e.rank is not None else ""
        table.add_row(
            label, "x".join(map(str, e.shape)), rank, change(dense, now).split(" (")[0], kept, f"{now / after:.1%}"
        )
    if before - seen > 0:
        table.add_row(
            Text("norms, biases and all else", style="dim"),
            "",
            "",
            count(before - seen),
            "",
            f"{(before - seen) / after:.1%}",
        )
    parts: list[RenderableType] = [table, _plan_totals(plan, tokens)]
    if plan.breaks:
        parts.append(breaks_note(plan.breaks))
    if spectra:
        parts.append(spectra_table(plan, spectra))
    return Group(*parts)


def _plan_totals(plan: Plan, tokens: int | None) -> Table:
    pairs, (before, after), stored = plan.pairs, plan.parameters, plan.bytes
    factored = sum(e.dense_numel for e in pairs), sum(e.numel for e in pairs)
    flops = sum(2 * e.tokens * e.dense_numel for e in plan.entries), sum(e.flops for e in plan.entries)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "compression",
        f"{plan.compression:.2f}x",
        f"{len(pairs)} of {len(plan.entries)} weights become pairs: {change(*factored).split(' (')[0]} numbers",
    )
    grid.add_row("numbers", f"{before / after:.2f}x", f"{before:,} → {after:,} in the whole model")
    grid.add_row("bytes", f"{stored[0] / stored[1]:.2f}x", f"{size(stored[0])} → {size(stored[1])} as stored")
    per = "a token" if tokens else "one call on the example inputs"
    shown = [f / (tokens or 1) for f in flops]
    if flops[1]:
        grid.add_row(
            "FLOPs", f"{flops[0] / flops[1]:.2f}x", f"{count(shown[0])} → {count(shown[1])} for {per}, weights alone"
        )
    return grid


def breaks_note(breaks: Sequence[str]) -> Text:
    """Where the trace broke."""
    text = Text(f"note: the trace broke {len(breaks)} time(s); the graphs are planned together", style="yellow")
    for why in breaks:
        first = next((line.strip() for line in why.splitlines() if line.strip()), "")
        text.append(f"\n  {first[:160]}", style="dim")
    return text


# --- spectra ----------------------------------------------------------------------------------------------------------


def middle_spectra(model: torch.nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Entry key -> singular values of the middle layer of every planned group; empty where there are no numbers."""
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    if any(p.is_meta for p in parameters.values()):
        return {}
    groups = [group for group in plan_groups(plan) if group[0].rank is not None]
    chosen = [group[len(group) // 2] for group in groups]
    return {e.key: singular_values(parameters[e.key]) for e in chosen}


def energy(values: torch.Tensor, rank: int) -> float:
    """The share of ‖W‖² in the first `rank` singular values."""
    total = float(values.square().sum())
    return float(values[:rank].square().sum()) / total if total else 1.0


def sparkline(values: torch.Tensor, rank: int, width: int = 48) -> Text:
    """Singular values, largest first, as bars; a line where the rank cuts, what is cut away dim."""
    edges = [round(i * len(values) / min(width, len(values))) for i in range(min(width, len(values)) + 1)]
    top = float(values[0]) or 1.0
    text, marked = Text(), False
    for start, stop in zip(edges, edges[1:], strict=False):
        if start >= rank and not marked:
            text.append("│", style="bold red")
            marked = True
        level = float(values[start:stop].mean()) / top
        text.append(_BARS[min(7, int(level * 8))], style="green" if start < rank else "dim")
    return text


def spectra_table(plan: Plan, spectra: dict[str, torch.Tensor]) -> Table:
    """A line for each weight whose singular values are given."""
    table = Table(title="Singular values (linear; │ marks the rank)", title_justify="left", header_style="bold")
    for name in ("weight", "spectrum", "energy kept", "error"):
        table.add_column(name, justify="left" if name in ("weight", "spectrum") else "right")
    for e in plan.pairs:
        if e.key in spectra and e.rank is not None:
            kept = energy(spectra[e.key], e.rank)
            line = sparkline(spectra[e.key], e.rank)
            table.add_row(e.key.removesuffix(".weight"), line, f"{kept:.1%}", f"{math.sqrt(max(0.0, 1 - kept)):.3f}")
    return table


# --- a Report ---------------------------------------------------------------------------------------------------------


def report_table(report: Report) -> RenderableType:
    """The passes, one a row; then the errors of the pairs."""
    table = Table(
        title="What every pass did", title_justify="left", header_style="bold", box=box.HORIZONTALS, show_lines=True
    )
    table.add_column("pass", overflow="fold", ratio=1)
    for name in ("exact?", "parameters", "bytes", "FLOPs", "saved", "error", "time"):
        table.add_column(name, justify="right")
    before: Stage | None = None
    for stage in report.stages:
        cells = [("parameters", count), ("bytes", size), ("flops", count), ("saved", size)]
        table.add_row(
            _what(stage),
            "" if before is None else Text("exact", "green") if stage.exact else Text("approx.", "yellow"),
            *(_cell(before, stage, name, write) for name, write in cells),
            error_text(stage).replace(" (", "\n("),
            f"{stage.seconds:.2f} s" if before else "",
        )
        before = stage
    parts: list[RenderableType] = [table, _legend(report)]
    if report.breaks:
        parts.append(breaks_note(report.breaks))
    if report.errors:
        parts.append(errors_table(report))
    return Group(*parts)


def _what(stage: Stage) -> Text:
    """The pass, what it changed and to which sites, what it left alone."""
    what = Text(stage.name, style="bold")
    changed, notes = fold_lines(stage.changed), fold_lines(stage.notes)
    for line in changed[:6]:
        what.append(f"\n{line}", style="not bold")
    if len(changed) > 6:
        what.append(f"\nand {len(changed) - 6} more kinds of change", style="not bold dim")
    for line in notes[:4]:
        what.append(f"\n{line}", style="not bold italic dim")
    if stage.before is None:
        nodes = sum(len(gm.graph.nodes) for gm in stage.graphs)
        what.append(f"\n{len(stage.graphs)} graph(s), {nodes} nodes", style="not bold")
    return what


def error_text(stage: Stage) -> str:
    """What is known of a stage's error, in a few words."""
    if stage.before is None:
        return ""
    if stage.exact:
        return "" if stage.verified is None else "verified"
    return "not measured (meta)" if stage.error is None else f"{stage.error:.3g}"


def _cell(before: Stage | None, stage: Stage, name: str, write: Any) -> Text:
    now = getattr(stage, name)
    if before is None:
        return Text(write(now))
    was = getattr(before, name)
    return Text("=", style="dim") if was == now else Text(f"{write(was)}\n→ {write(now)}", style="bold")


def _legend(report: Report) -> Text:
    first, last = report.stages[0], report.stages[-1]
    text = Text(f"whole model: {first.model_parameters:,} → {last.model_parameters:,} parameters, ")
    text.append(f"{size(first.model_bytes)} → {size(last.model_bytes)}\n")
    text.append(
        "parameters, bytes: what the graphs read · FLOPs: one forward on the example inputs · saved: bytes autograd keeps for "
        "backward, parameters and inputs aside · error: relative, of the outputs, against the stage before · = unchanged",
        style="dim",
    )
    return text


def errors_table(report: Report) -> Table:
    """Relative weight errors, repeated layers in one line."""
    table = Table(title="Relative error of the weights, ‖W − BA‖ / ‖W‖", title_justify="left", header_style="bold")
    for name in ("weights", "rank", "least", "mean", "most"):
        table.add_column(name, justify="left" if name == "weights" else "right", overflow="fold")
    for group in plan_groups(report.plan):
        found = [report.errors[e.key] for e in group if e.key in report.errors]
        if found:
            low, mean, high = (f"{x:.4f}" for x in (min(found), sum(found) / len(found), max(found)))
            table.add_row(group_name(group), str(group[0].rank), low, mean, high)
    return table


def show(content: Any) -> None:
    """Print to the terminal; in 120 columns where there is none."""
    Console(width=None if sys.stdout.isatty() else 120).print(content)


def as_text(content: RenderableType, width: int | None = None) -> str:
    """What rich would print, without colours; in 120 columns where there is no terminal."""
    if width is None:
        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
