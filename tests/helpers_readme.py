"""Commands out of a README: its blocks, the words of their lines, and how one is run as a user would."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def words_of(text: str) -> list[list[str]]:
    """The words of every command; one goes on after a backslash, and inside quotes."""
    found, held = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        held += line
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quotation that isn't closed yet
            held += "\n"
            continue
        held = ""
        if words:
            found.append(words)
    assert not held, f"a quotation is never closed: {held}"
    return found


def run_line(
    words: Sequence[str], place: Path, *, names: Mapping[str, str], more: Mapping[str, Sequence[str]]
) -> subprocess.CompletedProcess[str]:
    """Run `lrcompile …`, `python …` or `torchrun …` with this interpreter, in a directory; it must succeed.

    Args:
        names: words that stand for something of the test's.
        more: word of the line (a command, a script) -> options that are added.
    """
    start = {
        "lrcompile": ["-m", "lrcompile.cli"],
        "torchrun": ["-m", "torch.distributed.run"],
        "python": [],
    }[words[0]]
    given = [names.get(word, word) for word in words[1:]]
    added = next((list(options) for word, options in more.items() if word in given), [])
    done = subprocess.run([sys.executable, *start, *given, *added], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, (words, done.stdout[-1000:], done.stderr[-3000:])
    return done
