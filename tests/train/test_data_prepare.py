"""Files to shards: the same bytes whoever does it and whenever it is killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompile.errors import TrainError
from lrcompile.files import commit
from lrcompile.train.data import Shards, load_tokenizer, prepare
from tests.train.helpers_data import files_below, write_lines

WORDS = "the profit of this quarter rose by three percent and shareholders were told so in a letter".split()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    draw = random.Random(0)
    (tmp_path / "in").mkdir()
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))} for _ in range(120)]
    write_lines(tmp_path / "in/a.jsonl", [*rows[:60], {"text": ""}, *rows[60:]])
    (tmp_path / "in/b.txt").write_text("One more.\nAnd a line.")
    return tmp_path / "in"


def decoded(folder: Path) -> list[str]:
    shards = Shards.open(folder, verify="checksums")
    tokenizer = load_tokenizer(folder)
    found = []
    for document in range(shards.documents):
        tokens, mask = shards.read(document)
        assert mask is None and tokens[-1] == tokenizer.end and (tokens[:-1] != tokenizer.end).all()
        found.append(tokenizer.decode(tokens.tolist()))
    return found


def wanted(source: Path) -> list[str]:
    import json

    lines = [json.loads(line)["text"] for line in (source / "a.jsonl").read_text().splitlines()]
    return [*(text for text in lines if text), (source / "b.txt").read_text()]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_documents_come_back_from_their_shards(source: Path, tmp_path: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    prepare([source], out, tokenizer, shard_tokens=500, workers=1)
    assert decoded(out / "train") == wanted(source)
    shards = Shards.open(out / "train")
    assert shards.documents == 121 and shards.tokens == shards.lengths.sum() and shards.kind == "text"
    assert len(list((out / "train").glob("*.tokens"))) > 3
    assert not (out / "validation").exists() and not list(out.rglob("*.partial"))
    assert shards.read(0)[0].dtype == np.uint16


def test_train_and_validation_are_the_documents_cut_in_two(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path / "out", "bpe:300", validation=0.2, shard_tokens=300, workers=1)
    train, held = decoded(tmp_path / "out/train"), decoded(tmp_path / "out/validation")
    assert "".join(sorted("".join(train + held))) == "".join(sorted("".join(wanted(source))))
    long = [text for text in wanted(source) if len(text) > 40]
    assert len(held) >= len(long)
    for text in long:
        assert any(text.startswith(t) and text.removeprefix(t) in held for t in train)
    # Both parts must be read with one tokenizer, which has not seen what is held out.
    assert load_tokenizer(tmp_path / "out/train").fingerprint == load_tokenizer(tmp_path / "out/validation").fingerprint


def test_a_large_vocabulary_takes_four_bytes(source: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(70_000)} | {word: 70_000 + i for i, word in enumerate(sorted(set(WORDS)))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    prepare([source / "a.jsonl"], tmp_path / "out", str(tmp_path / "tokenizer.json"), end_token="w1", workers=1)
    tokens, _ = Shards.open(tmp_path / "out/train").read(0)
    assert tokens.dtype == np.uint32 and tokens[:-1].min() >= 70_000 and tokens[-1] == 1


def test_prompts_have_a_mask_and_equal_prompts_stay_together(tmp_path: Path) -> None:
    rows = [{"q": f"question {i % 40}", "a": f" answer {i}", "n": "x"} for i in range(200)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    fields = {"prompt": "q", "completion": "a"}
    options: dict[str, Any] = {"kind": "prompts", "fields": fields, "template": "Q({n}): {q}\nA:", "workers": 1}
    prepare([file], tmp_path / "out", "bytes", validation=0.3, **options)
    sides = []
    for part in ("train", "validation"):
        shards = Shards.open(tmp_path / "out" / part)
        texts = [(tokens.tolist(), mask) for tokens, mask in map(shards.read, range(shards.documents))]
        sides.append(
            [
                (bytes(t for t, m in zip(tokens, mask, strict=True) if not m), tokens[mask.argmax() :])
                for tokens, mask in texts
            ]
        )
    assert not {p for p, _ in sides[0]} & {p for p, _ in sides[1]}
    found = sorted((p.decode(), bytes(c[:-1]).decode(), c[-1]) for side in sides for p, c in side)
    assert found == sorted((f"Q(x): {r['q']}\nA:", r["a"], 256) for r in rows)


def test_more_processes_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        prepare([source], tmp_path / name, "bpe:300", validation=0.1, shard_tokens=400, workers=workers)
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


class Killed(BaseException):
    """As a kill: nothing that handles errors sees it."""


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 6000), ("bpe:300", 3000)])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, size: int, torn: bool
) -> None:
    def call(out: Path) -> None:
        prepare([source], out, tokenizer, validation=0.1, shard_tokens=size, workers=1)

    call(tmp_path / "whole")
    want = files_below(tmp_path / "whole")
    alive, out = 0, tmp_path / "out"

    def dying(file: Path, data: bytes) -> None:
        nonlocal alive
        if alive == 0:
            if torn:
                file.with_name(file.name + ".partial").write_bytes(data[: len(data) // 2])
            raise Killed
        alive -= 1
        commit(file, data)

    for allowed in range(100):
        shutil.rmtree(out, ignore_errors=True)
        alive = allowed
        with monkeypatch.context() as patch:
            for module in ("write", "tokens"):
                patch.setattr(f"lrcompile.train.data.{module}.commit", dying)
            try:
                call(out)
                break
            except Killed:
                pass
        with pytest.raises(TrainError, match="no prepared data|is not finished|has no index"):
            Shards.open(out / "train")
        before = {p: p.stat().st_mtime_ns for p in out.rglob("shard-*") if p.suffix != ".partial"}
        call(out)
        found = files_below(out)
        assert {name: found[name] for name in want} == want
        assert not (out / "progress.json").exists() and not list(out.rglob("*.partial"))
        # What progress.json tells of is not done again; at most the last shard of each part is.
        again = [p for p, when in before.items() if p.stat().st_mtime_ns != when]
        assert len({p.stem for p in again}) <= 1
    assert allowed > 10  # it has been killed at every write there is, and in the end not at all


_SCRIPT = """
import multiprocessing, os, signal, sys
from lrcompile.train.data import prepare

if __name__ == "__main__":
    calls = 0
    def progress(told):
        global calls
        calls += 1
        if calls == 3:
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    prepare([sys.argv[1]], sys.argv[2], "bytes", shard_tokens=1000, workers=2, progress=progress)
"""


def test_kill_9_with_processes_leaves_none_behind_and_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, tmp_path / "script.py", source, out], capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pids = [int(pid) for pid in killed.stdout.split()]
    assert len(pids) == 2 and (out / "progress.json").exists()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    prepare([source], out, "bytes", shard_tokens=1000, workers=1)
    prepare([source], tmp_path / "whole", "bytes", shard_tokens=1000, workers=1)
    assert files_below(out) == files_below(tmp_path / "whole")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie, where nobody reaps orphans, no longer runs
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_call_does_nothing_and_another_one_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def call(tokenizer: str = "bytes", sources: Path = source, **options: Any) -> None:
        prepare([sources], out, tokenizer, **{"validation": 0.1, "workers": 1, **options})

    call()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    call()
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for options, words in (
        ({"tokenizer": "bpe:300"}, "was prepared with tokenizer .*, not tokenizer 'bpe:300'"),
        ({"validation": 0.2}, "was prepared with validation 0.1, not validation 0.2"),
        ({"validation": 0.0}, "was prepared with validation 0.1, not validation 0.0"),
        ({"separator": "x"}, "separator None, not separator 'x'"),
        ({"sources": source / "b.txt"}, "the source a.jsonl is gone since"),
    ):
        with pytest.raises(TrainError, match=words):
            call(**options)
    (source / "b.txt").write_text("One more. And more.")
    with pytest.raises(TrainError, match="the source b.txt has changed since"):
        call()
    (source / "b.txt").unlink()
    (source / "c.txt").write_text("c")
    with pytest.raises(TrainError, match="the source b.txt is gone since"):
        call()


def test_a_source_that_changed_since_a_kill_is_refused(source: Path, tmp_path: Path) -> None:
    def kill(told: Any) -> None:
        raise Killed

    options: dict[str, Any] = {"shard_tokens": 500, "workers": 1}
    with pytest.raises(Killed):
        prepare([source], tmp_path / "out", "bytes", progress=kill, **options)
    with pytest.raises(TrainError, match="train is not finished; run the"):
        Shards.open(tmp_path / "out/train")
    (source / "b.txt").write_text("changed")
    with pytest.raises(TrainError, match="the source b.txt has changed since"):
        prepare([source], tmp_path / "out", "bytes", **options)


def test_a_shard_or_a_record_that_was_lost_since_a_kill_is_refused(source: Path, tmp_path: Path) -> None:
    def call(progress: Any = None) -> None:
        prepare([source], tmp_path / "out", "bytes", shard_tokens=1000, workers=1, progress=progress)

    def kill(told: Any) -> None:
        if told.tokens > 5000:
            raise Killed

    with pytest.raises(Killed):
        call(kill)
    shard = tmp_path / "out/train/shard-00002.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(TrainError, match="shard-00002.tokens is truncated or altered"):
        call()
    shard.write_bytes(whole)
    for text in ("{", "[]", "{}"):
        record = (tmp_path / "out/progress.json").read_text()
        (tmp_path / "out/progress.json").write_text(text)
        with pytest.raises(TrainError, match="progress.json can't be read .* remove .*out and prepare the data again"):
            call()
        (tmp_path / "out/progress.json").write_text(record)
    call()
    assert decoded(tmp_path / "out/train") == wanted(source)


def test_a_malformed_row_stops_it_and_a_mended_file_needs_a_new_directory(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}])
    with pytest.raises(TrainError, match="a.jsonl, line 2: the field 'text' must be text, it is int"):
        prepare([file], tmp_path / "out", "bytes", workers=1)
    write_lines(file, [{"text": "a"}, {"text": "3"}])
    with pytest.raises(
        TrainError, match="a.jsonl has changed since .* give another directory than .*out, or remove it"
    ):
        prepare([file], tmp_path / "out", "bytes", workers=1)


def test_a_full_disk_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if list((tmp_path / "out").rglob("*.tokens.partial")):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(TrainError, match="No space left on device; mend that and run the same command again"):
            prepare([source], tmp_path / "out", "bytes", workers=1)
    prepare([source], tmp_path / "out", "bytes", workers=1)
    assert decoded(tmp_path / "out/train") == wanted(source)


def test_requests_without_sense_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken/train").mkdir(parents=True)
    (tmp_path / "taken/train/thesis.doc").touch()
    write_lines(tmp_path / "empty.jsonl", [{"text": " "}])
    write_lines(tmp_path / "short.jsonl", [{"text": "abc"}])
    for args, options, words in (
        (([source], tmp_path / "o", "bytes"), {"kind": "prompts"}, "b.txt is plain text"),
        (([source], tmp_path / "o", "bytes"), {"workers": 0}, "at least 1, got 0"),
        (([source], tmp_path / "o", "bpe:many"), {}, "a new BPE is bpe:SIZE"),
        (([source], tmp_path / "o", "bpe:300"), {"end_token": "x"}, "makes its own end"),
        (([source], tmp_path / "taken", "bytes"), {}, "thesis.doc, which is not prepared data"),
        (([tmp_path / "empty.jsonl"], tmp_path / "e", "bytes"), {}, "no document is left for .*train"),
        (
            ([tmp_path / "short.jsonl"], tmp_path / "s", "bytes"),
            {"validation": 0.1},
            "no document is left for .*validation",
        ),
    ):
        with pytest.raises(TrainError, match=words):
            prepare(*args, **{"workers": 1, **options})


def test_a_process_that_tokenises_has_no_torch() -> None:
    """It would take seconds to start, and some hundred MB, in each of many processes."""
    code = "import sys, lrcompile.train.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
