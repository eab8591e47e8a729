"""Runs side by side as one page of HTML that stands alone: no scripts, nothing loaded, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from lrcompile.train.history import History

_SAMPLES = 4  # the last ones of each run are shown; all are in metrics.jsonl
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #e3e6ec; --page: #fbfbfd; --card: #fff;
  --accent: #3559c7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #98a1b3; --line: #2c313c; --page: #14161b;
  --card: #1b1e25; --accent: #8aa4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1.2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
p { color: var(--soft); margin: .6rem 0; max-width: 60rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; margin: .6rem 0; }
.picture { background: #fff; padding: .8rem; } img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem .9rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { font-size: .82rem; color: var(--soft); } tbody th { font-weight: 400; color: var(--soft); }
tr:last-child > * { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; } td.n, pre {
  font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .86em; }
pre { margin: 0; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.45; }
pre + pre { border-top: 1px solid var(--line); } pre b { color: var(--accent); font-weight: 600; }
pre i { color: var(--soft); font-style: normal; }
summary { cursor: pointer; padding: .6rem 1rem; font-weight: 600; } summary span { color: var(--soft); font-weight: 400; }
details pre { border-top: 1px solid var(--line); }
"""


def page(runs: Sequence[History], rows: Sequence[tuple[str, list[str]]], picture: bytes) -> str:
    """The page: picture, table, what the models wrote, events, configs.

    Args:
        runs: as read.
        rows: of the table, as history.compare makes them.
        picture: PNG of the curves.
    """
    title = escape(", ".join(run.name for run in runs))
    image = base64.b64encode(picture).decode()
    parts = [
        f"<h1>{title}</h1>",
        f'<div class="card picture"><img alt="curves of {title}" src="data:image/png;base64,{image}"></div>',
        _table(runs, rows),
        _samples(runs),
        "<h2>What happened</h2>",
        *map(_events, runs),
        _configs(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _table(runs: Sequence[History], rows: Sequence[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th class="n">{escape(run.name)}</th>' for run in runs)
    body = []
    for label, cells in rows:
        numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        body.append(f"<tr><th>{escape(label)}</th>{numbers}</tr>")
    return (
        f'<h2>Figures</h2>\n<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>\n<p>Losses in nats a token. Seconds are those of training: a step that compiled counts "
        "as one of median length, evaluations and checkpoints don't count. In brackets: the distance from the first run.</p>"
    )


def _samples(runs: Sequence[History]) -> str:
    parts = []
    for run in runs:
        if shown := run.samples[-_SAMPLES:]:
            lines = "".join(
                f"<pre><i>step {s['step']:,}</i>  <b>{escape(str(s.get('prompt', '')))}</b>{escape(str(s.get('text', '')))}</pre>"
                for s in shown
            )
            parts.append(f'<h3>{escape(run.name)}</h3><div class="card">{lines}</div>')
    return "\n".join(["<h2>What they write</h2>", *parts]) if parts else ""


def _events(run: History) -> str:
    lines = [f"step {e['step']:>8,}  {e.get('time', '')}  {e.get('text', '')}{_facts(e)}" for e in run.events]
    note = "1 event" if len(lines) == 1 else f"{len(lines)} events"
    body = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    return f'<details class="card"><summary>{escape(run.name)} <span>{note}</span></summary>{body}</details>'


def _facts(event: dict[str, object]) -> str:
    facts = [f"{k}={v}" for k, v in event.items() if k not in ("kind", "step", "time", "text")]
    return f"  ({', '.join(facts)})" if facts else ""


def _configs(runs: Sequence[History]) -> str:
    parts = [
        f'<details class="card"><summary>{escape(run.name)} <span>{run.config[0]}</span></summary>'
        f"<pre>{escape(run.config[1])}</pre></details>"
        for run in runs
        if run.config
    ]
    return "\n".join(["<h2>Configs</h2>", *parts]) if parts else ""
