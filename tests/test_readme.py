"""The README's commands and code blocks are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(lrcompile bench [^`]*|make \w+)`", README)
    return [words for line in dict.fromkeys(lines) if (words := shlex.split(line, comments=True))]


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) >= 3 and len(commands()) >= 4


@pytest.mark.parametrize("block", range(len(blocks("python"))))
def test_python_block(block: int, tmp_path: Path) -> None:
    code = blocks("python")[block]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if "LowRankLinear" in code:
        assert done.stdout.split() == ["LowRankLinear"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words: list[str]) -> None:
    if words[0] == "make":  # the whole job; here only that it is a target, and that it runs something
        done = subprocess.run(["make", "-n", words[1]], capture_output=True, text=True, cwd=ROOT)
    else:
        program = [sys.executable, "-m", "lrcompile.cli", *words[1:]]
        quick = ["--quick"] if words[1] == "bench" else []
        done = subprocess.run([*program, *quick], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"\b\w+\.(?:py|md)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"*/*/{name}")), f"{name} is not in the repository"
