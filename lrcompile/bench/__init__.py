"""The measurements users run on their own machine: `lrcompile bench NAME`.

adopt   seconds to adopt a GPT-2 124M-shaped model at 2.64x
plan    seconds and memory to plan Llama-2-7B from its config on the meta device
step    step and compile time of an adopted model against the same low-rank model written by hand, under Inductor

Times vary from run to run and machine to machine: what is compared is measured side by side, and given as a ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from lrcompile.errors import LrcompileError

NAMES = ("adopt", "plan", "step")


def main(argv: Sequence[str]) -> None:
    """Run one measurement by name and print its table."""
    parser = argparse.ArgumentParser(
        "lrcompile bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="a small model: checks that the measurement runs")
    arguments = parser.parse_args(argv)
    try:
        import_module(f"lrcompile.bench.{arguments.name}").run(quick=arguments.quick)
    except ImportError as error:
        raise LrcompileError(f'{error}; install what it needs with pip install "lrcompile[hf]"') from error
