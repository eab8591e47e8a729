"""A Report as one page of HTML that stands alone: no scripts, nothing loaded, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import torch

from lrcompile.show import energy, error_text
from lrcompile.weights.plan import group_name
from lrcompile.words import change, count, fold_lines, size

if TYPE_CHECKING:
    from lrcompile.graph.inspect import Report
    from lrcompile.graph.stage import Stage
    from lrcompile.weights.plan import Entry

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #e3e6ec; --page: #fbfbfd; --card: #fff;
  --good: #12805c; --warn: #b25e09; --add: #e5f6ec; --del: #fdecea; --accent: #3559c7; --cut: #c03a2b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #98a1b3; --line: #2c313c; --page: #14161b;
  --card: #1b1e25; --good: #4cc38a; --warn: #f0a94b; --add: #12351f; --del: #431c1a; --accent: #8aa4ff; --cut: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { color: var(--soft); margin: .4rem 0; max-width: 60rem; }
code, pre, td.n, .name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin-top: 1.4rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; } .tile span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: .78rem; font-weight: 600; color: var(--soft); text-transform: uppercase; letter-spacing: .03em; }
th, td { padding: .55rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th.n, td.n { text-align: right; white-space: nowrap; } td.same { color: var(--soft); opacity: .6; }
.was { color: var(--soft); display: block; } .what { color: var(--soft); font-size: .85rem; }
.what div { padding-left: 1em; text-indent: -1em; } .left { font-style: italic; opacity: .8; }
.exact { color: var(--good); } .approx { color: var(--warn); font-weight: 600; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: .5rem 0; }
summary { cursor: pointer; padding: .6rem 1rem; font-weight: 600; } summary span { color: var(--soft); font-weight: 400; }
pre { margin: 0; padding: .6rem 0; overflow-x: auto; border-top: 1px solid var(--line); line-height: 1.45; }
pre div { padding: 0 1rem; min-width: max-content; } pre .a { background: var(--add); } pre .d { background: var(--del); }
pre .h { color: var(--accent); padding-top: .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }
.plot { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.plot .name { display: block; overflow-wrap: anywhere; } svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
.note { border-left: 3px solid var(--warn); padding-left: .8rem; }
"""


def page(report: Report) -> str:
    """The page; measures what was not measured yet (errors and spectra, where the model has numbers)."""
    parts = [_head(report), _tiles(report), _breaks(report), _passes(report.stages), _weights(report)]
    parts += [_spectra(report), _diffs(report.stages)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>lrcompile: {escape(report.recipe.dial)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(p for p in parts if p)
        + "\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    plan = report.plan
    made = f"{len(plan.adopted)} of {len(plan.entries)} weights are adopted"
    told = f"{made}, asked for by <code>{escape(report.recipe.dial)}</code>."
    return f"<h1>What lrcompile does to this model</h1>\n<p>{told}</p>"


def _tiles(report: Report) -> str:
    first, last = report.stages[0], report.stages[-1]
    tiles = [
        ("weights that are adopted", f"{report.plan.byte_compression:.2f}×", "fewer bytes in them")
        if report.plan.by_bytes
        else ("weights that become pairs", f"{report.plan.compression:.2f}×", "fewer numbers in them"),
        (
            "parameters",
            _ratio(first.model_parameters, last.model_parameters),
            change(first.model_parameters, last.model_parameters).split(" (")[0],
        ),
        (
            "bytes",
            _ratio(first.model_bytes, last.model_bytes),
            change(first.model_bytes, last.model_bytes, size).split(" (")[0],
        ),
        ("FLOPs of a forward", _ratio(first.flops, last.flops), change(first.flops, last.flops).split(" (")[0]),
        ("saved for backward", _ratio(first.saved, last.saved), change(first.saved, last.saved, size).split(" (")[0]),
    ]
    cells = (f'<div class="tile"><span>{t}</span><b>{b}</b><span>{s}</span></div>' for t, b, s in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}×" if after else "–"


def _breaks(report: Report) -> str:
    if not report.breaks:
        return ""
    why = "".join(f"<p><code>{escape(next(iter(b.strip().splitlines()), ''))}</code></p>" for b in report.breaks)
    return f'<div class="note"><h2>The trace broke</h2><p>Its graphs are planned together.</p>{why}</div>'


def _passes(stages: list[Stage]) -> str:
    rows = []
    before: Stage | None = None
    for stage in stages:
        lines = [f"<div>{escape(line)}</div>" for line in fold_lines(stage.changed)]
        lines += [f'<div class="left">{escape(line)}</div>' for line in fold_lines(stage.notes)]
        kind = (
            ""
            if before is None
            else '<td class="exact">exact</td>'
            if stage.exact
            else '<td class="approx">approximating</td>'
        )
        cells = [
            _cell(before, stage, *c)
            for c in (("parameters", count), ("bytes", size), ("flops", count), ("saved", size))
        ]
        cells += [f'<td class="n">{x}</td>' for x in (error_text(stage), f"{stage.seconds:.2f} s" if before else "")]
        name = f'<b class="name">{escape(stage.name)}</b><div class="what">{"".join(lines)}</div>'
        rows.append(f"<tr><td>{name}</td>{kind or '<td></td>'}{''.join(cells)}</tr>")
        before = stage
    head = ("pass", "numerics", "parameters", "bytes", "FLOPs", "saved", "error", "time")
    note = (
        "Parameters and bytes: what the graphs read. FLOPs: one forward on the example inputs. Saved: bytes autograd keeps for "
        "backward, parameters and inputs aside. Error: of the outputs, relative, against the stage before."
    )
    return f"<h2>Pass by pass</h2>\n{_table(head, rows, 2)}\n<p>{note}</p>"


def _cell(before: Stage | None, stage: Stage, name: str, write: object) -> str:
    assert callable(write)
    now = getattr(stage, name)
    if before is None:
        return f'<td class="n">{write(now)}</td>'
    was = getattr(before, name)
    if was == now:
        return '<td class="n same">=</td>'
    return f'<td class="n"><span class="was">{write(was)} →</span>{write(now)}</td>'


def _table(head: Iterable[str], rows: Iterable[str], left: int) -> str:
    cells = "".join(f"<th{'' if i < left else ' class=n'}>{h}</th>" for i, h in enumerate(head))
    return (
        f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _weights(report: Report) -> str:
    rows = []
    errors, by_bytes = report.errors, report.plan.by_bytes

    def bytes_of(e: Entry) -> int:
        return e.dense_numel * report.plan.bytes_per_number.get(e.key, 4)

    for e in report.plan.entries:
        form = e.fate.removeprefix("rank ")
        error = (
            f"{errors[e.key]:.4f}"
            if e.key in errors
            else ""
            if e.form is None or report.measurable
            else "not measured (meta)"
        )
        kept, before = (e.nbytes, bytes_of(e)) if by_bytes else (e.numel, e.dense_numel)
        after = f"{kept:,}" if e.form else f'<span class="what">{escape(e.reason)}</span>'
        cells = ("×".join(map(str, e.shape)), form, f"{before:,}", after, error)
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f'<tr><td class="name">{escape(" = ".join(e.names))}</td>{numbers}</tr>')
    names = ("form", "bytes", "after", "‖W − Ŵ‖ / ‖W‖") if by_bytes else ("rank", "numbers", "after", "‖W − BA‖ / ‖W‖")
    table = _table(("weight", "shape", *names), rows, 1)
    shown = " open" if len(rows) <= 20 else ""
    return f"<h2>Every weight</h2>\n<details{shown}><summary>{len(rows)} weights</summary>{table}</details>"


def _spectra(report: Report) -> str:
    if not report.measurable:
        return ""
    plots = []
    for group in report.plan.groups():
        known = [e for e in group if e.rank is not None and e.base is None and e.key in report.weights]
        if not known:
            continue
        shown = {e.key: e for e in (known[0], known[len(known) // 2], known[-1])}
        values = [report.spectrum(key) for key in shown]
        rank = known[0].rank or 0
        kept = sum(energy(v, rank) for v in values) / len(values)
        plots.append(
            f'<div class="plot"><span class="name">{escape(group_name(group))}</span>'
            f'<span class="what">rank {rank} of {len(values[0])} keeps {kept:.1%} of the energy</span>{_plot(values, rank)}</div>'
        )
    if not plots:
        return ""
    return (
        "<h2>Singular values</h2><p>σᵢ / σ₁ from 1 down, linear; first, middle and last layer. What is right of the line is cut "
        f'away.</p><div class="plots">{"".join(plots)}</div>'
    )


def _plot(spectra: list[torch.Tensor], rank: int) -> str:
    width, height = 240, 90
    x = width * min(1.0, rank / len(spectra[0]))
    lines = []
    for values in spectra:
        picked = torch.linspace(0, len(values) - 1, min(len(values), 120)).round().long()
        top = float(values[0]) or 1.0
        points = ((width * (i + 0.5) / len(values), height * (1 - float(values[i]) / top)) for i in picked.tolist())
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points if math.isfinite(b))
        lines.append(f'<polyline points="{path}" fill="none" stroke="var(--accent)" stroke-width="1.5" opacity=".75"/>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="singular values">'
        f'<rect x="{x:.1f}" y="0" width="{width - x:.1f}" height="{height}" fill="var(--line)" opacity=".5"/>{"".join(lines)}'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--cut)" stroke-dasharray="3 2"/>'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="var(--line)"/></svg>'
    )


def _diffs(stages: list[Stage]) -> str:
    out = ["<h2>The graph</h2>"]
    for stage in stages:
        if stage.before is None:
            body = "".join(f"<div>{escape(line) or '&nbsp;'}</div>" for line in stage.code.splitlines())
            out.append(
                f"<details><summary>{stage.name} <span>the graph as it came</span></summary><pre>{body}</pre></details>"
            )
            continue
        lines = stage.diff().splitlines()[2:]
        if not lines:
            out.append(
                f"<details><summary>{escape(stage.name)} <span>leaves the graph as it is</span></summary></details>"
            )
            continue
        plus, minus = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        body = "".join(_diff_line(line) for line in lines)
        out.append(
            f"<details><summary>{escape(stage.name)} <span>+{plus} −{minus} lines</span></summary><pre>{body}</pre></details>"
        )
    return "\n".join(out)


def _diff_line(line: str) -> str:
    kind = {"+": "a", "-": "d", "@": "h"}.get(line[:1], "")
    text = "…" if kind == "h" else escape(line)
    return f'<div class="{kind}">{text or "&nbsp;"}</div>'
