"""Every shipped configuration, compiled for every target it is shipped for, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lrcompile import cost
from lrcompile.errors import KernelError
from lrcompile.kernels import launch

FAMILIES = sorted(Path(launch.__file__).with_name("tuning").glob("*.json"))
NVIDIA = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [pytest.param(["sm_80", "sm_120"], marks=pytest.mark.important), sorted(cost.SHARED_BYTES)],
    ids=["oldest and newest", "every"],
)
def test_shipped_tiles_fit_every_target(targets: list[str]):
    pytest.importorskip("triton")
    # Compiled in a process of its own, one for all, which shares the cores out: this one may run Triton's interpreter.
    families = [file.stem for file in FAMILIES]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lrcompile.kernels.aot", *families, *targets]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for family in families:
        rows = [row for rows in launch.table(family).values() for row in rows]
        assert (
            sum(told["family"] == family for told in found)
            == sum(arch in targets for row in rows for arch in row["arch"])
            > 0
        )
    for told in found:
        assert told["fits"], told
        assert told["shared_bytes"] <= cost.SHARED_BYTES[told["arch"]], told
        assert told["spilled_bytes"] <= (64 if told["arch"] in NVIDIA else 0), told
        assert told["tensor_cores"], told
        assert told["registers"] > 0, told


@pytest.mark.parametrize("family", [file.stem for file in FAMILIES])
def test_a_table_serves_all_targets_alike(family: str):
    """Every kernel has tiles for each target, and the first row that fits is the one for the smallest limits."""
    for kernel, rows in launch.table(family).items():
        targets = Counter(arch for row in rows for arch in row["arch"])
        assert set(targets) == set(cost.SHARED_BYTES), kernel
        served: dict[tuple[str, str], list[list[int]]] = {}
        for row in rows:
            launch.Tile(**row["tile"])
            for arch in row["arch"]:
                served.setdefault((arch, row["precision"]), []).append(list(row["up_to"].values()))
        for limits in served.values():
            assert limits == sorted(limits) and len({str(limit) for limit in limits}) == len(limits), kernel


def test_the_interpreters_process_does_not_compile(interpreter: None):
    from lrcompile.kernels import aot, lowrank_linear_triton

    row = launch.table("lowrank_linear")["fused"][0]
    with pytest.raises(KernelError, match="TRITON_INTERPRET"):
        aot.compile_for("sm_90", lowrank_linear_triton.specimen("fused", row), launch.Tile(**row["tile"]))
