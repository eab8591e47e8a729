"""Rows of every kind of file, and what is malformed in them."""

from pathlib import Path

import pytest

from lrcompile.errors import TrainError
from lrcompile.train.data.documents import Reading
from lrcompile.train.data.sources import Row, find_sources, read
from tests.train.helpers_data import write_lines

pytest.importorskip("pyarrow")


def texts(path: Path, **options) -> list[str]:
    return [row.values["text"] for source in find_sources([path]) for row in read(source, ["text"], **options)]


def test_every_kind_of_file_gives_its_documents_in_order(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [{"text": f"text {i} ünï\r\n", "other": i} for i in range(2500)]
    wanted = [row["text"] for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    write_lines(tmp_path / "a.jsonl", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "set", num_shards=2)
    (tmp_path / "a.txt").write_bytes("<>".join(wanted).encode())
    for name in ("a.parquet", "a.jsonl", "set"):
        assert texts(tmp_path / name) == wanted, name
    assert texts(tmp_path / "a.txt", separator="<>") == wanted
    assert texts(tmp_path / "a.txt") == ["<>".join(wanted)]


def test_a_separator_across_two_reads_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("ß<end>two<end>thrée", encoding="utf-8-sig")
    for size in range(1, 12):
        monkeypatch.setattr("lrcompile.train.data.sources._CHUNK", size)
        assert texts(tmp_path / "a.txt", separator="<end>") == ["ß", "two", "thrée"]


def test_sources_are_sorted_and_none_is_taken_twice(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "deep/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [s.path.name for s in find_sources([tmp_path])]
    assert names == ["a.txt", "b.txt", "c.jsonl"]
    assert [s.path.name for s in find_sources([tmp_path / "deep", f"{tmp_path}/*.txt"])] == [
        "c.jsonl",
        "a.txt",
        "b.txt",
    ]
    for given, words in (
        ([tmp_path, tmp_path / "b.txt"], "b.txt is given twice"),
        ([tmp_path / "deep/notes.md"], "can't read .md; known are .txt"),
        ([tmp_path / "nothing"], "no such file"),
        ([f"{tmp_path}/*.parquet"], "no such file"),
    ):
        with pytest.raises(TrainError, match=words):
            find_sources(given)


def test_datasets_that_are_a_set_or_lack_a_file_are_told(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    part = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "all")
    with pytest.raises(TrainError, match="name one of .*all/test, .*all/train"):
        find_sources([tmp_path / "all"])
    (data,) = (tmp_path / "all/train").glob("*.arrow")
    data.unlink()
    with pytest.raises(TrainError, match=f"{data.name} is missing"):
        find_sources([tmp_path / "all/train"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', r"line 2 is no JSON \("),
        (b"", "line 2 is empty"),
        (b"[1]", "line 2 is a JSON list"),
        (b'{"txt": "a"}', "line 2 has no field 'text'; it has txt"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_told_with_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(TrainError, match=rf"a\.jsonl, {words}"):
        texts(tmp_path / "a.jsonl")


def test_other_files_that_are_malformed_are_told(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x" * 5000]}), tmp_path / "a.parquet")
    with pytest.raises(TrainError, match="no field 'text'; it has body"):
        texts(tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(TrainError, match="cut.parquet is no parquet file, or a truncated one"):
        texts(tmp_path / "cut.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "page.parquet").write_bytes(whole[:4] + b"\xff" * 9 + whole[13:])
    buffers = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    foreign = pa.table({"body": pa.Array.from_buffers(pa.string(), 1, buffers)})  # Arrow doesn't look
    pq.write_table(foreign, tmp_path / "latin.parquet")
    for name in ("page", "latin"):
        with pytest.raises(TrainError, match=f"(?s){name}.parquet can't be read to its end .* copy or write it again"):
            list(read(*find_sources([tmp_path / f"{name}.parquet"]), ["body"]))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(TrainError, match="not UTF-8 .near byte 3.*iconv"):
        texts(tmp_path / "a.txt")


# --- rows to pieces ---------------------------------------------------------------------------------------------------


def row(**values) -> Row:
    return Row(values, "f.jsonl, line 7", 0)


def test_the_end_of_every_document_is_held_out_at_a_word() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    kept, held = Reading(validation=0.2).pieces(row(text=text))
    assert kept.text + held.text == text and not kept.held_out and held.held_out
    assert held.text.startswith(" word") and len(held.text) == pytest.approx(0.2 * len(text), abs=8)
    lines = Reading(validation=0.2).pieces(row(text=text[:500] + "\n" + text[500:]))
    assert lines[1].text.startswith("\n")  # a line's end is the better cut
    unbroken = Reading(validation=0.25).pieces(row(text="x" * 1000))
    assert [len(p.text) for p in unbroken] == [750, 250]
    assert [p.held_out for p in Reading(validation=0.1).pieces(row(text="abc"))] == [False]
    assert Reading().pieces(row(text=" \n")) == []


def test_prompts_are_held_out_by_what_they_ask() -> None:
    reading = Reading("prompts", validation=0.3)
    sides = [reading.pieces(row(prompt=f"q{i}", completion="a"))[0].held_out for i in range(1000)]
    assert 250 < sum(sides) < 350  # 3.5 standard deviations
    again = [reading.pieces(row(prompt=f"q{i}", completion="another"))[0].held_out for i in range(1000)]
    assert sides == again


def test_a_template_is_filled_by_the_row() -> None:
    reading = Reading("prompts", {"prompt": "q", "completion": "a"}, template='{"of": {unit}} {prompt}? ')
    assert set(reading.needed) == {"q", "a", "unit"}
    (piece,) = reading.pieces(row(q="how {a} many", a="3", unit="kg"))
    assert (piece.prompt, piece.text) == ('{"of": kg} how {a} many? ', "3")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": 3, "completion": "a"}, "field 'prompt' must be text, it is int"),
        ({"prompt": "q", "completion": None}, "field 'completion' must be text, it is null"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"prompt": "q", "completion": ""}, "the completion is empty"),
        ({"prompt": "a\ud800", "completion": "a"}, "half a surrogate pair at character 1"),
    ],
)
def test_a_row_without_sense_is_told_with_its_line(values: dict, words: str) -> None:
    with pytest.raises(TrainError, match=f"f.jsonl, line 7: .*{words}"):
        Reading("prompts").pieces(row(**values))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "chat"}, "known are text, prompts"),
        ({"fields": {"prompt": "q"}}, "no role 'prompt'"),
        ({"validation": 1.0}, r"in \[0, 1\)"),
        ({"template": "{prompt}"}, 'belongs to kind="prompts"'),
        ({"kind": "prompts", "template": "none"}, "names no field"),
    ],
)
def test_options_without_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        Reading(**options)


def test_a_document_too_long_to_tokenise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrcompile.train.data.documents._LONGEST", 10)
    with pytest.raises(TrainError, match="11 characters is too long .* separator="):
        Reading().pieces(row(text="x" * 11))
