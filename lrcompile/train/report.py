"""`lrcompile report RUN [RUN ...]`: what finished runs, or runs still going, have to show."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrcompile.errors import TrainError
from lrcompile.train.history import History, compare, read_all

_SUFFIXES = (".html", ".png")


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw runs side by side: losses, gradient norm, learning rate, speed, and a table of figures.

    Args:
        runs: directories of runs, each with its metrics.jsonl.
        out: a .png (the curves) or a .html (one page that stands alone: curves, table, samples, configs). Default: both,
            report.png and report.html, in the first run's directory.

    Returns:
        The file written; the page where both were.

    Raises:
        TrainError: there is no such run, it has no steps yet, a line of its log can't be read (the message has its number),
            or `out` can't be written.
        MissingLibraryError: matplotlib isn't installed.
    """
    return _write(_checked(out), read_all(runs))[-1]


def add_parser(commands: Any) -> None:
    """Add `report` to the subcommands of an argparse parser."""
    about = "curves and figures of training runs, side by side: a picture and a page"
    parser = commands.add_parser("report", help=about, description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the directory of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="a .png or .html (default: report.png and report.html in the first RUN)",
    )
    parser.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    from lrcompile.show import show

    out = _checked(args.out)
    runs = read_all(args.runs)
    show(_terminal_table(runs))
    print(f"wrote {' and '.join(map(str, _write(out, runs)))}")
    return 0


def _checked(out: str | Path | None) -> Path | None:
    """Refused before anything is drawn."""
    if out is not None and Path(out).suffix.lower() not in _SUFFIXES:
        raise TrainError(f"can't tell what to write to {out}: its name ends in neither {' nor '.join(_SUFFIXES)}")
    if out is not None and not Path(out).parent.is_dir():
        raise TrainError(f"can't write {out}: there is no directory {Path(out).parent}; make it first")
    return None if out is None else Path(out)


def _write(out: Path | None, runs: Sequence[History]) -> list[Path]:
    from lrcompile.train.figure import png
    from lrcompile.train.page import page

    picture = png(runs)
    home = runs[0].path
    files = [home / "report.png", home / "report.html"] if out is None else [out]
    for file in files:
        html = file.suffix.lower() == ".html"
        content = page(runs, compare(runs), picture).encode("utf-8", "replace") if html else picture
        try:
            file.write_bytes(content)
        except OSError as error:
            raise TrainError(f"can't write {file}: {error.strerror}") from error
    return files


def _terminal_table(runs: Sequence[History]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from lrcompile.show import PLAIN

    table = Table(**PLAIN)
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    for label, cells in compare(runs):
        table.add_row(label, *cells)
    return table
