"""Checkpoints of several ranks: real processes over gloo, other world sizes, ranks that fail and ranks that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrcompile.errors import TrainError
from lrcompile.train.checkpoint import Checkpoints

from . import checkpoint_ranks
from .checkpoint_ranks import same, whole
from .test_checkpoint import forged


def on_ranks(scenario: str, dir: Path) -> None:
    command = [sys.executable, checkpoint_ranks.__file__, scenario, str(dir)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_any_number_of_ranks(tmp_path: Path) -> None:
    on_ranks("reshard", tmp_path)
    run = Checkpoints(tmp_path / "turn0")
    for turn, files in enumerate((2, 1, 3, 4, 2)):
        filled = {name: torch.zeros_like(value) for name, value in whole().items()}
        path = tmp_path / f"turn{turn}" / "step-00000001"
        assert len(list(path.glob("*.safetensors"))) == files  # every rank wrote some
        assert run.load(path, filled) == {"turn": turn} and same(filled, whole())
    # A rank's file is gone and nothing tells of it: the manifest is forged.
    path = tmp_path / "turn2" / "step-00000001"
    gone = sorted(p.name for p in path.glob("*.safetensors"))[1]
    (path / gone).unlink()
    with pytest.raises(TrainError, match=f"lacks {gone}; copy the whole directory again"):
        run.load(path, filled)
    forged(path, lambda m: m["files"].pop(gone))
    with pytest.raises(TrainError, match="parts of 'even' are missing there"):
        run.load(path, filled)
    run.close()


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    on_ranks("faults", tmp_path)


def test_ranks_killed_at_any_moment(tmp_path: Path) -> None:
    on_ranks("kills", tmp_path)
