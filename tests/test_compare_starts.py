"""examples/compare_starts.py on a random model: every kind of start computes, and a second run only prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lrcompile.cli import main


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two texts of one tokenizer, as `lrcompile data` writes them."""
    made = []
    for name, tokenizer in (("banks", "bpe:260"), ("speeches", str(tmp_path / "banks" / "train"))):
        source = tmp_path / f"{name}.txt"
        source.write_text("\n".join(f"the {name} lost my payment number {n} and charged a fee" for n in range(400)))
        made.append(tmp_path / name)
        assert main(["data", str(source), "--out", str(made[-1]), "--tokenizer", tokenizer, "--validation", "0.2"]) == 0
    return made


def test_variants_are_measured_once(root: Path, texts: list[Path], tmp_path: Path):
    out = tmp_path / "starts"
    script = [sys.executable, str(root / "examples" / "compare_starts.py")]
    sizes = ["--tokens", "1024", "--calibration", "2048"]
    given = [word for text in texts for word in ("--text", str(text))]
    only = [word for name in ("dense", "rank 4", "40% fewer") for word in ("--only", name)]
    command = [*script, "--tiny", *given, "--out", str(out), *sizes, *only]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert len(found) == 7
    assert all(variant["perplexity"].keys() == {"banks", "speeches"} for variant in found.values())
    assert all(value > 1 for variant in found.values() for value in variant["perplexity"].values())
    assert (
        found["nf4, rank 4, loftq"]["error"]
        < 0.1
        < found["40% fewer, svd"]["error"]
        < found["40% fewer, data"]["error"]
    )
    named = [*script, "--tiny", *given, "--out", str(out), *sizes, "--as", "healed"]
    assert subprocess.run(named, cwd=tmp_path, timeout=600).returncode == 0
    assert json.loads((out / "healed.json").read_text()) == found["dense"]  # the same model, as it is
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shown = subprocess.run([*script, "--show", str(out)], capture_output=True, text=True, timeout=600)
    assert "40% fewer, svd" in shown.stdout and "healed" in shown.stdout and "perplexity" in shown.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_without_text_it_says_what_to_give(root: Path, tmp_path: Path):
    script = [sys.executable, str(root / "examples" / "compare_starts.py"), "--out", str(tmp_path)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "give --text DIR" in done.stderr
