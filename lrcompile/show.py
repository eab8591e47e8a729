"""Tables and pictures for the terminal (rich): what a Plan decides, what an inspection saw, singular spectra."""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lrcompile.graph.names import plain_name
from lrcompile.passes.allocate_ranks import tile
from lrcompile.weights.factor import singular_values
from lrcompile.weights.plan import group_name
from lrcompile.words import change, count, fold_lines, size

if TYPE_CHECKING:
    from lrcompile.graph.inspect import Report
    from lrcompile.graph.stage import Stage
    from lrcompile.weights.plan import Plan

_BARS = "▁▂▃▄▅▆▇█"
PLAIN: dict[str, Any] = {
    "box": box.HORIZONTALS,
    "title_justify": "left",
    "header_style": "bold",
    "show_edge": False,
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}

# --- a Plan -----------------------------------------------------------------------------------------------------------


def plan_table(plan: Plan, spectra: dict[str, torch.Tensor] | None = None, tokens: int | None = None) -> RenderableType:
    """What a person needs to decide: every weight's rank, numbers before and after, totals.

    Args:
        plan: to show.
        spectra: entry key -> its singular values, for a picture of them.
        tokens: rows in the example inputs, to give FLOPs a token; else FLOPs of the whole example.
    """
    table = Table(title="Plan", **PLAIN)
    table.add_column("weights", overflow="fold")
    unit, write = ("bytes", size) if plan.by_bytes else ("numbers", count)
    for name in ("shape", "form" if plan.by_bytes else "rank", unit, "of model"):
        table.add_column(name, justify="right", no_wrap=True)
    before, after = plan.bytes if plan.by_bytes else plan.parameters
    seen = 0
    for group in plan.groups():
        e = group[0]
        per = plan.bytes_per_number.get(e.key, 4) if plan.by_bytes else 1
        dense, now = sum(e.dense_numel for e in group) * per, sum(e.nbytes if plan.by_bytes else e.numel for e in group)
        seen += dense
        label = Text(group_name(group), style="" if e.form else "dim")
        if e.form is None:
            label.append(f"\n{e.reason}", style="italic dim")
        rank = Text(e.fate.removeprefix("rank "), style="bold green") if e.form else Text("dense", style="dim")
        shape = "x".join(map(str, e.shape)) + (f" ×{len(group)}" if len(group) > 1 else "")
        table.add_row(label, shape, rank, _arrow(dense, now, write), f"{now / after:.1%}")
    if before - seen > 0:
        rest = Text("norms, biases and all else", style="dim")
        table.add_row(rest, "", "", write(before - seen), f"{(before - seen) / after:.1%}")
    parts: list[RenderableType] = [table, Text(""), _plan_totals(plan, tokens)]
    if asked := asked_note(plan):
        parts.append(Text(asked, style="yellow"))
    if plan.breaks:
        parts.append(breaks_note(plan.breaks))
    if spectra:
        parts.append(spectra_table(plan, spectra))
    return Group(*parts)


def _arrow(before: float, after: float, write: Any = count) -> str:
    return change(before, after, write).split(" (")[0]


def asked_note(plan: Plan) -> str:
    """What was asked and what was got, where the two differ; "" where they don't."""
    ranks = [e.rank for e in plan.adopted if e.rank is not None]
    asked, got, more = "", "", ""
    if (compression := plan.recipe.get("compression")) is not None:
        asked, got = f"compression {compression:.2f}", f"{plan.asked_compression:.2f}"
        more = f", {plan.compression:.2f} over the others" if plan.left else ""
    elif (ratio := plan.recipe.get("rank_ratio")) is not None:
        found = [e.rank / min(e.shape) for e in plan.adopted if e.rank is not None] or [ratio]
        low, high = f"{min(found):.3g}", f"{max(found):.3g}"
        asked, got = f"rank_ratio {ratio:.3g}", low if low == high else f"{low} to {high}"
    elif (budget := plan.recipe.get("budget_bytes")) is not None:
        asked, got = f"budget_bytes {budget:,}", f"{plan.bytes[1]:,}"
    if not ranks or (asked.rpartition(" ")[2] == got and not more):
        return ""
    tiles = sorted({tile(rank) for rank in ranks} - {1})
    why = f"multiples of {' and '.join(map(str, tiles))}" if tiles else "whole numbers"
    kept = f"; {len(plan.left)} weights that a pair would not make smaller stay dense{more}" if plan.left else ""
    return f"asked {asked}, got {got}: ranks are rounded to {why}{kept}"


def _plan_totals(plan: Plan, tokens: int | None) -> Table:
    pairs, (before, after), stored = plan.adopted, plan.parameters, plan.bytes
    factored = sum(e.dense_numel for e in pairs), sum(e.numel for e in pairs)
    flops = sum(2 * e.tokens * e.dense_numel for e in plan.entries), sum(e.flops for e in plan.entries)
    grid = Table.grid(padding=(0, 2))
    if plan.by_bytes:
        now = sum(e.nbytes for e in pairs)
        was = sum(e.dense_numel * plan.bytes_per_number.get(e.key, 4) for e in pairs)
        told = f"{len(pairs)} of {len(plan.entries)} weights are adopted: {_arrow(was, now, size)}"
        grid.add_row("compression", f"{plan.byte_compression:.2f}x", told)
    else:
        told = f"{len(pairs)} of {len(plan.entries)} weights become pairs: {_arrow(*factored)} numbers"
        grid.add_row("compression", f"{plan.compression:.2f}x", told)
    grid.add_row("numbers", f"{before / after:.2f}x", f"{before:,} → {after:,} in the whole model")
    grid.add_row("bytes", f"{stored[0] / stored[1]:.2f}x", f"{size(stored[0])} → {size(stored[1])} as stored")
    per = "a token" if tokens else "the example inputs"
    shown = [f / (tokens or 1) for f in flops]
    if flops[1]:
        grid.add_row(
            "FLOPs", f"{flops[0] / flops[1]:.2f}x", f"{count(shown[0])} → {count(shown[1])} for {per}, weights alone"
        )
    return grid


def breaks_note(breaks: Sequence[str]) -> Text:
    """Where the trace broke."""
    times = "once" if len(breaks) == 1 else f"{len(breaks)} times"
    text = Text(f"note: the trace broke {times}; the graphs are planned together", style="yellow")
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
    groups = [group for group in plan.groups() if group[0].rank is not None and group[0].base is None]
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
    table = Table(title="\nSingular values (linear; │ marks the rank)", **PLAIN)
    for name in ("weight", "energy kept", "error"):
        table.add_column(name, justify="left" if name == "weight" else "right", overflow="fold")
    for e in plan.adopted:
        if e.key in spectra and e.rank is not None and e.base is None:
            kept = energy(spectra[e.key], e.rank)
            label = Text(e.key.removesuffix(".weight") + "\n").append_text(sparkline(spectra[e.key], e.rank))
            table.add_row(label, f"{kept:.1%}", f"{math.sqrt(max(0.0, 1 - kept)):.3f}")
    return table


# --- a Report ---------------------------------------------------------------------------------------------------------


# A pass's figures in one line of fixed widths, 78 in all; what it did beneath, as wide as the terminal is.
_WIDTHS = {"pass": 19, "parameters": 10, "bytes": 8, "FLOPs": 8, "saved": 8, "numerics": 13, "time": 6}
_FIGURES: tuple[tuple[str, Any], ...] = (("parameters", count), ("bytes", size), ("flops", count), ("saved", size))


def report_table(report: Report) -> RenderableType:
    """The passes, their figures and what they did; then the errors of the pairs."""
    rule = Text("─" * (sum(_WIDTHS.values()) + len(_WIDTHS) - 1), style="dim", no_wrap=True, overflow="crop")
    parts: list[RenderableType] = [Text("What every pass did", style="italic"), _line(*_WIDTHS, style="bold"), rule]
    before: Stage | None = None
    for stage in report.stages:
        figures = [_figure(before, stage, name, write) for name, write in _FIGURES]
        took = f"{stage.seconds:.2f} s" if before else ""
        parts += [_line(Text(stage.name, style="bold"), *figures, _numerics(stage), took), _what(stage)]
        before = stage
    ends = [(getattr(report.stages[0], name), getattr(report.stages[-1], name)) for name, _ in _FIGURES]
    parts += [rule, _line("before / after", *(f"{was / now:.2f}x" if now else "" for was, now in ends), style="bold")]
    parts += [Text(""), _legend(report)]
    if report.breaks:
        parts.append(breaks_note(report.breaks))
    if report.errors:
        parts.append(errors_table(report))
    return Group(*parts)


def _line(*cells: str | Text, style: str = "") -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for name, width in _WIDTHS.items():
        left = name in ("pass", "numerics")
        grid.add_column(width=width, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    grid.add_row(*cells, style=style)
    return grid


def _what(stage: Stage) -> RenderableType:
    """What a pass changed and to which sites, what it left alone."""
    changed, notes = fold_lines(stage.changed), fold_lines(stage.notes)
    lines = [Text(line) for line in changed[:6]]
    if len(changed) > 6:
        lines.append(Text(f"and {len(changed) - 6} more kinds of change", style="dim"))
    lines += [Text(line, style="italic dim") for line in notes[:4]]
    if len(notes) > 4:
        lines.append(Text(f"and {len(notes) - 4} more kinds of note", style="italic dim"))
    if stage.before is None:
        nodes, graphs = sum(len(gm.graph.nodes) for gm in stage.graphs), len(stage.graphs)
        lines.append(Text(f"{graphs} graph{'s' if graphs > 1 else ''}, {nodes} nodes"))
    return Group(*(Padding(line, (0, 0, 0, 2), expand=False) for line in lines))


def error_text(stage: Stage) -> str:
    """What is known of a stage's error, in a few words."""
    if stage.before is None:
        return ""
    if stage.exact:
        return "" if stage.verified is None else "verified"
    return "not measured (meta)" if stage.error is None else f"{stage.error:.3g}"


def _numerics(stage: Stage) -> Text:
    """Whether a pass keeps the numerics; the error of one that doesn't."""
    if stage.before is None:
        return Text("")
    if stage.exact:
        return Text(error_text(stage) or "exact", style="green")
    return Text("approx." + (f" {stage.error:.3g}" if stage.error is not None else ""), style="yellow")


def _figure(before: Stage | None, stage: Stage, name: str, write: Any) -> Text:
    now = getattr(stage, name)
    if before is None:
        return Text(write(now))
    return Text("=", style="dim") if getattr(before, name) == now else Text(write(now), style="bold")


def _legend(report: Report) -> Text:
    first, last = report.stages[0], report.stages[-1]
    text = Text(f"whole model: {first.model_parameters:,} → {last.model_parameters:,} parameters, ")
    text.append(f"{size(first.model_bytes)} → {size(last.model_bytes)}\n")
    error = "relative, of the outputs, against the pass before"
    text.append(
        "figures after each pass, = where it changes nothing · parameters, bytes: what the graphs read · FLOPs: one forward "
        "on the example inputs · saved: bytes autograd keeps for backward, parameters and inputs aside · error of an "
        f"approximating pass: {error if report.measurable else 'not measured, the model has no numbers (meta)'}",
        style="dim",
    )
    return text


def errors_table(report: Report) -> Table:
    """Relative weight errors, repeated layers in one line."""
    bits = report.plan.by_bytes
    title = "‖W − Ŵ‖ / ‖W‖" if bits else "‖W − BA‖ / ‖W‖"
    table = Table(title=f"\nRelative error of the weights, {title}", **PLAIN)
    for name in ("weights", *(("form", "bytes") if bits else ("rank",)), "least", "mean", "most"):
        table.add_column(name, justify="left" if name == "weights" else "right", overflow="fold")
    for group in report.plan.groups():
        found = [report.errors[e.key] for e in group if e.key in report.errors]
        if found:
            low, mean, high = (f"{x:.4f}" for x in (min(found), sum(found) / len(found), max(found)))
            form = group[0].fate.removeprefix("rank ")
            stored = [size(sum(e.nbytes for e in group))] * bits
            table.add_row(group_name(group), form, *stored, low, mean, high)
    return table


def terminal_width() -> int:
    """Columns to print in: of the terminal, or what COLUMNS says; 120 where there is neither."""
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return shutil.get_terminal_size((120, 24)).columns if told else 120


def show(content: Any) -> None:
    """Print to the terminal; without colours where there is none."""
    if sys.stdout.isatty():
        Console().print(content)
    else:
        print(as_text(content))


def as_text(content: RenderableType, width: int | None = None) -> str:
    """What rich would print, without colours."""
    out = io.StringIO()
    width = width or terminal_width()
    Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
