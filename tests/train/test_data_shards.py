"""Prepared directories that are truncated, altered, incomplete or foreign are refused, with the reason."""

import json
from pathlib import Path

import pytest

from lrcompile.errors import TrainError
from lrcompile.train.data import Shards, prepare
from lrcompile.train.data.shards import checksum
from tests.train.helpers_data import write_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"this is text {i}"} for i in range(50)])
    prepare([file], tmp_path / "out", "bpe:270", shard_tokens=200, workers=1)
    return tmp_path / "out/train"


def alter(file: Path, at: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def refused(folder: Path, words: str, verify: str = "sizes") -> None:
    with pytest.raises(TrainError, match=words):
        Shards.open(folder, verify=verify)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "shard-00001.tokens").unlink()
    refused(folder, "shard-00001.tokens is missing")


@pytest.mark.parametrize("part", ["tokens", "documents"])
def test_a_truncated_shard(folder: Path, part: str) -> None:
    file = folder / f"shard-00001.{part}"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-8])
    refused(folder, rf"shard-00001.{part} is truncated or altered: {size - 8} bytes, must be {size}")


def test_altered_tokens_are_seen_when_asked_for(folder: Path) -> None:
    alter(folder / "shard-00001.tokens", 10)
    Shards.open(folder)
    refused(folder, "shard-00001.tokens has been altered", verify="checksums")


def test_altered_bounds_of_documents_are_seen_always(folder: Path) -> None:
    alter(folder / "shard-00001.documents")
    refused(folder, "shard-00001.documents has been altered")


def test_a_changed_tokenizer(folder: Path) -> None:
    alter(folder / "tokenizer.json", -2)
    refused(folder, "the tokenizer in .* is not the one its shards were made with")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json can't be read")


def test_a_changed_end(folder: Path) -> None:
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace("<|end|>", "t"))
    refused(folder, "the tokenizer in .* is not the one")


def test_an_altered_index(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["tokens"] -= 1
    (folder / "index.json").write_text(json.dumps(index))
    refused(folder, "index.json has been altered")
    # Even one whose own checksum was made to fit: the data's fingerprint doesn't.
    index = {**index, "kind": "prompts"}
    del index["checksum"]
    index["checksum"] = checksum(index)
    (folder / "index.json").write_text(json.dumps(index))
    refused(folder, "index.json has been altered")
    for text in ("{", "[]", "{}"):
        (folder / "index.json").write_text(text)
        refused(folder, "index.json can't be read")
    (folder / "index.json").write_text('{"format": "other-2", "checksum": ""}')
    refused(folder, "of the format 'other-2', this version reads lrcompile-shards-1")


def test_other_directories(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such directory; make it with `lrcompile data`")
    refused(tmp_path, "was not made by `lrcompile data`")
    refused(folder.parent, "name one: .*out/train")
    refused(folder, '"sizes" or "checksums"', verify="all")


def test_the_fingerprint_tells_of_the_tokens_and_not_of_names(tmp_path: Path) -> None:
    found = {}
    for name, text in (("a", "one two"), ("b", "one two"), ("c", "one twp")):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text}])
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, "bytes", workers=1)
        found[name] = Shards.open(tmp_path / name / "train").fingerprint
    assert found["a"] == found["b"] != found["c"]


def test_the_data_is_read_only(folder: Path) -> None:
    tokens, _ = Shards.open(folder).read(3)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
