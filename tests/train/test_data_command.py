"""`lrcompile data`."""

from pathlib import Path

import pytest

from lrcompile.errors import LrcompileError, TrainError
from lrcompile.tasks import Row, read_rows
from lrcompile.train.data import Shards
from tests.helpers_cli import command
from tests.train.helpers_data import write_lines


def call(*words: object) -> int:
    return command("data", *words)


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
    (tmp_path / "b.txt").write_text("a fine day")
    for words, message in (
        ((file, "--separator", "x"), "separator cuts .txt files into documents, and there is none"),
        ((tmp_path / "b.txt", "--separator", ""), "separator is empty, and cuts nothing"),
        ((tmp_path / "b.txt", "--field", "body"), "are of rows, and there is no .jsonl, .parquet or dataset"),
    ):
        with pytest.raises(TrainError, match=message):
            call(*words, "--out", tmp_path / "o", "--tokenizer", "bytes")
        assert not (tmp_path / "o").exists()
    for kind in ("text", "prompts"):
        with pytest.raises(TrainError, match="--kind is of SOURCE, and --tasks decide it themselves"):
            call("--tasks", "fpb", "--data", tmp_path, "--out", tmp_path / "o", "--tokenizer", "bytes", "--kind", kind)
    with pytest.raises(TrainError, match="no role 'prompt'"):
        call(file, "--out", tmp_path / "o", "--tokenizer", "bytes", "--prompt", "x")


def sentences(folder: Path, count: int = 200) -> Path:
    """Financial PhraseBank's form."""
    folder.mkdir(exist_ok=True)
    lines = [f"Sales of firm {n} grew .@{('negative', 'neutral', 'positive')[n % 3]}" for n in range(count)]
    (folder / "fpb_50Agree.txt").write_text("\n".join(lines), encoding="latin-1")
    return folder


def texts(part: Path) -> list[str]:
    shards = Shards.open(part)
    return [bytes(shards.read(n)[0][:-1].tolist()).decode() for n in range(shards.documents)]


def test_tasks_are_asked_as_eval_asks_them_and_never_of_the_test_side(tmp_path: Path) -> None:
    data, out = sentences(tmp_path / "sets"), tmp_path / "out"
    assert call("--tasks", "fpb", "--data", data, "--out", out, "--tokenizer", "bytes") == 0
    sides = {side: read_rows("fpb", data, side)[0] for side in ("train", "validation", "test")}
    for part in ("train", "validation"):
        expected = [f"{row.prompt} {row.choices[row.answer]}" for row in sides[part]]
        assert texts(out / part) == expected and len(expected) > 10
    asked = {row.prompt for row in sides["test"]}
    assert len(asked) > 20
    for part in ("train", "validation"):
        shards = Shards.open(out / part)
        tokens, mask = shards.read(0)
        assert shards.kind == "prompts" and bytes(tokens[mask][:-1].tolist()).startswith(b" ")
        assert not any(text.startswith(prompt) for text in texts(out / part) for prompt in asked)


def test_rows_of_a_task_are_a_fair_sample(tmp_path: Path) -> None:
    data, out = sentences(tmp_path / "sets"), tmp_path / "out"
    given = ("--data", data, "--tokenizer", "bytes")
    call("--tasks", "fpb:20", *given, "--out", out)
    call("--tasks", "fpb", *given, "--out", tmp_path / "all")
    assert texts(out / "train") == texts(tmp_path / "all" / "train")[:20]
    call("--tasks", "fpb:20", *given, "--out", out)  # done already
    with pytest.raises(TrainError, match=r"was prepared with tasks \['fpb:20'\], not tasks \['fpb:30'\]"):
        call("--tasks", "fpb:30", *given, "--out", out)
    sentences(data, 210)
    with pytest.raises(TrainError, match="the source fpb has changed since"):
        call("--tasks", "fpb:20", *given, "--out", out)


def test_an_ending_is_trained_on_after_the_right_choice() -> None:
    row = Row("The cup fits _ well.", "", ("The cup fits a", "The cup fits b"), 1, "well.")
    assert row.trained == ("The cup fits b", " well.")
    assert Row("x", "Question: x?\nAnswer:", ("no", "yes"), 1).trained == ("Question: x?\nAnswer:", " yes")


def test_tasks_that_can_not_be_trained_on_are_refused(tmp_path: Path) -> None:
    data, out = sentences(tmp_path / "sets"), tmp_path / "out"
    usual = ["--out", out, "--tokenizer", "bytes"]
    rows = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    for given, told in [
        ([], "nothing to prepare: name a SOURCE, or tasks"),
        (["--tasks", "fpb"], "tasks are read from files: say with data"),
        (["--data", data, rows], "is where tasks are read from: name some"),
        ([rows, "--tasks", "fpb", "--data", data], "give sources or tasks, not both"),
        (
            ["--tasks", "fpb", "--data", data, "--validation", 0.1],
            "prompts and sides of their own; leave validation out",
        ),
        (["--tasks", "fpb", "--data", data, "--template", "{prompt}"], "leave template out"),
        (["--tasks", "fpb", "--data", data, "--prompt", "x"], "leave fields out"),
        (["--tasks", "fpb:0", "--data", data], "'fpb:0': after the colon stands how many rows"),
        (["--tasks", "fpb:many", "--data", data], "'fpb:many': after the colon"),
        (["--tasks", "fpb,fpb:3", "--data", data], "the task fpb is named twice"),
        (["--tasks", "cola", "--data", data], "no task 'cola'; there are fpb"),
        (["--tasks", "fpb", "--data", tmp_path / "absent"], "there is no folder"),
        (["--tasks", "tfns", "--data", data], "tfns: no tfns_valid.csv"),
    ]:
        with pytest.raises(LrcompileError, match=told):
            call(*given, *usual)
    (data / "fpb_50Agree.txt").write_text("Sales grew .@good", encoding="latin-1")
    with pytest.raises(LrcompileError, match="fpb_50Agree.txt, line 1: the label 'good' is none of"):
        call("--tasks", "fpb", "--data", data, *usual)
    assert not out.exists()
