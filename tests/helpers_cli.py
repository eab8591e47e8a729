"""The command line as a function that raises."""

from __future__ import annotations

from lrcompile import cli


def command(*words: object) -> int:
    """Run `lrcompile WORDS`; returns the exit status. Errors are raised and not printed, unlike from `cli.main`."""
    args = cli._parser().parse_args([*map(str, words)])
    return int(args.run(args))
