"""Runs of the training driver as users start them, in processes of their own that can be killed and signalled.

The processes are forked from a server that has imported the driver already: importing torch takes longer than a small run.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import runpy
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lrcompile.train import lines
from lrcompile.train.data import prepare

HERE = Path(__file__).resolve().parent
# --- what they are told -----------------------------------------------------------------------------------------------


def write_data(folder: Path, word: str = "state", documents: int = 120, tokenizer: str = "bytes") -> Path:
    """Prepared shards of short documents, DIR/train and DIR/validation."""
    rows = random.Random(0)
    texts = [
        f"the {word} of the union {rows.random()} is strong{'~' * (i % 10 == 0)}" * rows.randint(1, 3)
        for i in range(documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([source], folder / "data", tokenizer, validation=0.1, workers=1, shard_tokens=4000)
    return folder / "data"


def settings(data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """A small run's settings; a dict among the changes is merged into the table of its name."""
    told: dict[str, Any] = {
        "steps": 8,
        "batch": 8,
        "micro_batch": 2,
        "out": str(out),
        "model": {"source": "inside:tiny"},
        "recipe": {"rank": 8},
        "data": {"train": str(data / "train"), "validation": str(data / "validation"), "length": 32},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 2},
        "parallel": {"precision": "float32", "compile": False},
        "save": {"every": 4},
        "evaluate": {"every": 4, "batches": 1},
        "log": {"live": False},
    }
    for name, value in changes.items():
        told[name] = {**told[name], **value} if isinstance(value, Mapping) else value
    return told


# --- processes --------------------------------------------------------------------------------------------------------

_SERVER = mp.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("lrcompile.train.driver", "lrcompile.train.config", "lrcompile.graph.capture", "lrcompile.weights.formats"),
        *(
            "torch._dynamo.repro.after_dynamo",
            "torch.export._trace",
            "pydantic.json_schema",
            "tyro",
            "typeguard",
            "pytest",
        ),
    ]
)


class Started:
    """Ranks of a run. What they print goes to a file each."""

    def __init__(
        self,
        told: Mapping[str, Any],
        *options: str,
        ranks: int = 1,
        before: str | None = None,
        said: Path | None = None,
        **more: str,
    ) -> None:
        """A function of inside.py is called `before` the command, and `more` is for its environment; `said`: where files go."""
        out = Path(told["out"])
        beside = out.parent if said is None else said
        beside.mkdir(parents=True, exist_ok=True)
        config = beside / f"{out.name}.config.json"
        config.write_text(json.dumps(told))
        self.said = [beside / f"{out.name}.rank{rank}.txt" for rank in range(ranks)]
        argv = ["pretrain", str(config), *options]
        env: dict[str, str] = {**more, "TOLD": str(beside / f"{out.name}.told")}
        if ranks > 1:
            # As under torchrun the store is nobody's rank.
            self._store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(ranks)}
            env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        script = HERE / "inside.py"
        self.processes = []
        for rank, file in enumerate(self.said):
            given = {
                "ARGV": argv,
                "SAID": str(file),
                "BEFORE": before,
                "ENV": {**env, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
            }
            # By its path: what the ranks unpickle must be importable without the repository's root on their path.
            self.processes.append(_SERVER.Process(target=runpy.run_path, args=(str(script), given, "rank")))
        for process in self.processes:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        """To these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def end(self, within: float = 120.0) -> list[int]:
        """The exit codes, by rank; minus the signal's number where one ended it."""
        until = time.monotonic() + within
        try:
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
            codes = [process.exitcode for process in self.processes]
            assert None not in codes, f"still running after {within} s: {codes}\n{self.text()}"
        finally:
            self.signal(signal.SIGKILL)
            for process in self.processes:
                process.join()
        return codes  # type: ignore[return-value]

    def text(self) -> str:
        return "\n".join(f"--- rank {rank}\n{path.read_text()}" for rank, path in enumerate(self.said) if path.exists())


def finished(told: Mapping[str, Any], *options: str, **more: Any) -> Path:
    """Run to the end; the run's directory."""
    started = Started(told, *options, **more)
    codes = started.end()
    assert codes == [0] * len(codes), f"{codes}\n{started.text()}"
    return Path(told["out"])


def refused(told: Mapping[str, Any], *options: str, **more: Any) -> str:
    """The one line with which a run is refused: the first rank prints it, and all exit with status 2."""
    started = Started(told, *options, **more)
    codes = started.end(60)
    said = started.text()
    assert codes == [2] * len(codes), f"{codes}\n{said}"
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    return errors[0]


# --- what they leave --------------------------------------------------------------------------------------------------


def losses(out: Path, what: str = "step") -> dict[int, float]:
    """The loss of each step, or each evaluation ("eval")."""
    found = [(e["step"], e["loss"]) for e in lines.entries(out / lines.NAME) if e["kind"] == what]
    assert len(found) == len(dict(found)), "a step is told twice"
    return dict(found)


def events(out: Path) -> list[str]:
    return [e["text"] for e in lines.entries(out / lines.NAME) if e["kind"] == "event"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The finished model's tensors."""
    folder = out / "model" if (out / "model").exists() else out / "merged"
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    assert found
    return found


def same_weights(left: Path, right: Path) -> None:
    """Equal bit for bit."""
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


def same_run(left: Path, right: Path) -> None:
    """The same losses, told once each, and the same finished weights, bit for bit."""
    for what in ("step", "eval"):
        assert losses(left, what) == losses(right, what)
    same_weights(left, right)


def documents(out: Path, ranks: int = 1) -> dict[int, list[list[int]]]:
    """The documents of each row of each step (from 0), as the ranks told them last."""
    found: dict[int, dict[int, list[list[int]]]] = {}
    for rank in range(ranks):
        for line in told_lines(out, rank):
            if line.startswith("documents "):
                step, rows = json.loads(line.removeprefix("documents "))
                found.setdefault(step, {})[rank] = rows
    return {step: [row for rank in sorted(parts) for row in parts[rank]] for step, parts in found.items()}


def told_lines(out: Path, rank: int = 0) -> list[str]:
    path = out.parent / f"{out.name}.told.{rank}"
    return path.read_text().splitlines() if path.exists() else []
