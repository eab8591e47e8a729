"""`lrcompile data`."""

import argparse
from pathlib import Path

import pytest

from lrcompile.errors import TrainError
from lrcompile.train.data import Shards
from lrcompile.train.data.command import add_parser
from tests.train.helpers_data import write_lines


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args)


def test_text_with_a_separator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one fine day\n\ntwo fine days")
    out = tmp_path / "out"
    assert (
        call(tmp_path / "a.txt", "--out", out, "--tokenizer", "bytes", "--separator", r"\n\n", "--validation", 0.3) == 0
    )
    train, held = Shards.open(out / "train"), Shards.open(out / "validation")
    assert train.documents == held.documents == 2
    printed = capsys.readouterr().out
    assert str(train.tokens) in printed and train.fingerprint[:12] in printed and held.fingerprint[:12] in printed


def test_prompts_with_a_template(tmp_path: Path) -> None:
    rows = [{"question": f"how many are {i}?", "answer": str(i)} for i in range(9)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    fields = ("--prompt", "question", "--completion", "answer", "--template", r"Q: {question}\nA: ")
    assert call(file, "--out", tmp_path / "out", "--tokenizer", "bytes", "--kind", "prompts", *fields) == 0
    shards = Shards.open(tmp_path / "out/train")
    assert bytes(shards.read(4)[0][:-1].tolist()) == b"Q: how many are 4?\nA: 4"


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(TrainError, match="--separator is for plain text"):
        call(file, "--out", tmp_path / "o", "--tokenizer", "bytes", "--kind", "prompts", "--separator", "x")
    with pytest.raises(TrainError, match="no role 'prompt'"):
        call(file, "--out", tmp_path / "o", "--tokenizer", "bytes", "--prompt", "x")
