"""Loaders on rows in the public forms: what they make of them, and what they refuse, with the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lrcompile.errors import EvalError
from lrcompile.tasks import TASKS, Row, read_rows
from lrcompile.tasks.rows import split

from .helpers import write_sets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def by_text(rows: list[Row]) -> dict[str, Row]:
    return {row.text: row for row in rows}


def test_every_task_has_rows_in_a_fixed_order(data: Path) -> None:
    sizes = {}
    for name in TASKS:
        rows, paths = read_rows(name, data)
        assert rows == read_rows(name, data)[0] and all(path.is_file() for path in paths)
        assert all(row.choices[row.answer] for row in rows)
        sizes[name] = len(rows)
    expected = {"fiqa": 7, "tfns": 9, "nwgi": 2, "headline": 3, "ner": 2, "xbrl_term": 2, "boolq": 2, "piqa": 2}
    expected |= {"winogrande": 2, "arc_easy": 2, "openbookqa": 2}
    assert 0 < sizes.pop("fpb") < 60 and sizes == expected


def test_sentiments_are_asked_as_fingpt_asks(data: Path) -> None:
    row = read_rows("fpb", data)[0][0]
    number = int(row.text.split()[-2])
    assert row.prompt == (
        "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.\n"
        f"Input: {row.text}\nAnswer:"
    )
    assert row.choices == ("negative", "neutral", "positive") and row.answer == number % 3
    tweets = by_text(read_rows("tfns", data)[0])
    assert tweets['$A4 up, "so" they say'].answer == 2, "1 is bullish; the link is cut out"
    assert [tweets[f'$A{n} up, "so" they say'].answer for n in (0, 2)] == [0, 1]
    assert "sentiment of this tweet?" in tweets['$A0 up, "so" they say'].prompt


def test_fiqa_scores_become_labels_and_every_target_counts(data: Path) -> None:
    rows, paths = read_rows("fiqa", data)
    found = sorted((row.text, row.answer) for row in rows)
    headlines = [("headline 0", 0), ("headline 0", 2), ("headline 1", 1), ("headline 2", 2)]
    assert found == [*headlines, ("post 0", 1), ("post 0", 2), ("post 1", 2)] and len(paths) == 2
    assert all(("this tweet" in row.prompt) == row.text.startswith("post") for row in rows)


def test_finloras_prompts_say_which_labels_there_are(data: Path) -> None:
    rows = read_rows("nwgi", data)[0]
    assert sorted((len(row.choices), row.choices[row.answer]) for row in rows) == [
        (3, "positive"),
        (7, "moderately negative"),
    ]
    assert all(row.prompt.endswith("Answer:") for row in rows)
    assert sorted(row.choices[row.answer] for row in read_rows("headline", data)[0]) == ["No", "Yes", "Yes"]
    assert {row.choices[row.answer] for row in read_rows("ner", data)[0]} == {"organization", "person"}
    assert {row.choices for row in read_rows("xbrl_term", data)[0]} == {("The cash outflow.",), ("An amount.",)}


def test_general_sets_are_asked_as_lm_eval_asks(data: Path) -> None:
    boolq = by_text(read_rows("boolq", data)[0])
    assert boolq["is it wet"] == Row("is it wet", "Question: is it wet?\nAnswer:", ("no", "yes"), 1)
    piqa = {row.prompt: row for row in read_rows("piqa", data)[0]}["Question: To eat\nAnswer:"]
    assert piqa.choices == ("use a hat", "use a fork") and piqa.answer == 1
    wino = {row.ending: row for row in read_rows("winogrande", data)[0]}["smiled."]
    assert (wino.prompt, wino.choices, wino.answer) == ("", ("Ann met Eve and Ann", "Ann met Eve and Eve"), 0)
    arc = {len(row.choices): row for row in read_rows("arc_easy", data)[0]}
    assert arc[4].prompt == "Question: ARC-Easy 4?\nAnswer:" and arc[4].choices[arc[4].answer] == "three parts"
    assert arc[3].choices == ("a", "b", "c") and arc[3].answer == 0
    assert {row.prompt for row in read_rows("openbookqa", data)[0]} == {"openbookqa 4?", "openbookqa 3?"}


def test_no_text_is_on_two_sides(data: Path) -> None:
    texts = [row.text for side in ("train", "validation", "test") for row in read_rows("fpb", data, side)[0]]
    assert len(texts) == len(set(texts)) == 60
    left = [row.text for row in read_rows("tfns", data, "train")[0]]
    assert left == ["Another tweet"], "nine of its texts are on the test side"
    sides = split([(str(n), n) for n in range(2000)], None)
    # The hash is the same everywhere. Expected of the first byte are 51/256 and 26/256: 398 and 203, give or take 18 and 13.
    assert {side: len(rows) for side, rows in sides.items()} == {"train": 1378, "validation": 208, "test": 414}
    for side in sides.values():
        assert [n for _, n in side] != sorted(n for _, n in side)


def edited(path: Path, edit: Callable[[str], str]) -> None:
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")


def changed(key: str, value: object) -> Callable[[str], str]:
    """Another value under a key of a JSON array's second row."""

    def edit(text: str) -> str:
        rows = json.loads(text)
        rows[1][key] = value
        return json.dumps(rows, indent=4)

    return edit


BAD: list[tuple[str, str, Callable[[str], str], str]] = [
    ("fpb", "fpb/Sentences_50Agree.txt", lambda t: t.replace("@neutral", "@flat", 1), r"line 2: the label 'flat'"),
    (
        "fpb",
        "fpb/Sentences_50Agree.txt",
        lambda t: t.replace("@positive", "", 1),
        r"line 3: sentence@label is expected",
    ),
    ("tfns", "tfns_valid.csv", lambda t: t.replace(",1\n", ",3\n", 1), r"line 3: the label '3'"),
    ("tfns", "tfns_valid.csv", lambda t: t.replace("text,label", "tweet,label"), "line 1: the columns text,label"),
    ("tfns", "tfns_valid.csv", lambda t: t + "a\n", "line 11: two columns are expected, there are 1"),
    ("tfns", "tfns_valid.csv", lambda t: t + '"a\nb,0\n', "line 11: this is no CSV"),
    ("fiqa", "task1_post_ABSA_test.json", lambda t: t.replace('"0.9"', '"9"'), "line 16: sentiment_score must be"),
    (
        "fiqa",
        "task1_post_ABSA_test.json",
        lambda t: t.replace('"sentence"', '"text"', 1),
        "line 2: the row has no 'sent",
    ),
    (
        "fiqa",
        "task1_post_ABSA_test.json",
        lambda t: t.replace('"info": [', '"info": ', 1),
        r"line \d+: this is no JSON",
    ),
    (
        "nwgi",
        "nwgi_test.jsonl",
        lambda t: t.replace('"positive"', '"mildly positive"'),
        "line 2: the target 'mildly pos",
    ),
    (
        "headline",
        "headline_test.jsonl",
        lambda t: t.replace('"No"', '"Maybe"'),
        "line 2: the target 'Maybe' is none of Yes",
    ),
    ("headline", "headline_test.jsonl", lambda t: t + "\n{", "line 5: this is no JSON"),
    (
        "ner",
        "ner-test.jsonl",
        lambda t: t.replace('"person"', '"Ann is a person"'),
        "line 2: the target 'Ann is a pers",
    ),
    ("xbrl_term", "xbrl_term_test.jsonl", lambda t: t.replace('"An amount."', "7"), "line 2: 'target' must be a text"),
    ("xbrl_term", "xbrl_term_test.jsonl", lambda t: "[]\n" + t, "line 1: an object is expected, this is list"),
    ("boolq", "boolq/test.json", changed("answer", "yes"), "line 8: the answer 'yes' is none of false, true"),
    ("piqa", "piqa_test.json", changed("instruction", "What?"), "line 8: the instruction isn't in the form"),
    ("winogrande", "winogrande_test.json", lambda t: t.replace("_ smiled", "she smiled"), "line 2: one blank"),
    (
        "arc_easy",
        "ARC-Easy_test.json",
        lambda t: t.replace("Answer2: b ", ""),
        "line 8: 3 answers are told, 2 are there",
    ),
    ("openbookqa", "openbookqa_test.json", changed("answer", "answer4"), "line 8: the answer 'answer4' is none of"),
    ("openbookqa", "openbookqa_test.json", lambda t: "3", "line 1: a JSON array or object"),
    ("openbookqa", "openbookqa_test.json", lambda t: "[]", "has no row on the test side"),
]


@pytest.mark.parametrize("name, file, edit, told", BAD, ids=[f"{n}-{told[:24]}" for n, _, _, told in BAD])
def test_malformed_rows_are_refused_with_the_line(
    tmp_path: Path, name: str, file: str, edit: Callable[[str], str], told: str
) -> None:
    write_sets(tmp_path)
    edited(tmp_path / file, edit)
    with pytest.raises(EvalError, match=told) as caught:
        read_rows(name, tmp_path)
    assert Path(file).name in str(caught.value)


def test_a_missing_file_is_told_with_its_source_and_licence(tmp_path: Path) -> None:
    for name in TASKS:
        with pytest.raises(
            EvalError, match=f"{name}: no .* two folders below. It is .* Nothing is downloaded"
        ) as caught:
            read_rows(name, tmp_path)
        told = str(caught.value)
        assert any(licence in told for licence in ("CC BY", "MIT", "AFL", "Apache", "for research", "licence: see")), (
            told
        )
        assert any(place in told for place in ("github.com/", "huggingface.co/", "sites.google.com/")), told
    with pytest.raises(EvalError, match="there is no folder"):
        read_rows("fpb", tmp_path / "absent")
    with pytest.raises(EvalError, match="no task 'fbp'; there are fpb, fiqa"):
        read_rows("fbp", tmp_path)
    write_sets(tmp_path)
    with pytest.raises(EvalError, match="no side 'dev'"):
        read_rows("fpb", tmp_path, "dev")
    with pytest.raises(EvalError, match="no nwgi_train.jsonl"):
        read_rows("nwgi", tmp_path, "train")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "nwgi_test.jsonl").write_text("")
    with pytest.raises(EvalError, match="which one is meant"):
        read_rows("nwgi", tmp_path)
    (tmp_path / "tfns_valid.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(EvalError, match="is no text in utf-8"):
        read_rows("tfns", tmp_path)
