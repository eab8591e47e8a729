"""The benches of training, as far as they go without a GPU: both sides do the same work, figures are kept and told."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrcompile.bench import driver, finetune, materialise, step, training
from lrcompile.bench.llm import LLAMA_TINY, Random, built, filled
from lrcompile.bench.results import apart
from lrcompile.errors import LrcompileError
from lrcompile.recipe import Recipe
from lrcompile.weights.layers import AdoptedModule

pytest.importorskip("transformers")


def only_file(folder: Path, name: str) -> dict[str, Any]:
    [path] = folder.glob("*.json")
    assert path.name.startswith(f"{name}-")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["torch"] == torch.__version__ and found["machine"]
    return found


# --- the driver -------------------------------------------------------------------------------------------------------


def test_driver_bench_times_both_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.run(quick=True, out=tmp_path)
    found = only_file(tmp_path, "driver")
    assert 0 <= found["waiting"] < 1
    for clock in ("wall", "cpu"):
        assert found[clock]["bare"] > 0 and found[clock]["driver"] > 0
    said = capsys.readouterr().out
    assert "overhead" in said and "waiting for data" in said


def test_loops_that_do_other_work_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = driver._Bare.step
    monkeypatch.setattr(driver._Bare, "step", lambda self, batches, rate: plain(self, batches, 3 * rate))
    with pytest.raises(AssertionError, match="not close"):
        driver.measure(driver.QUICK, tmp_path)


def test_overhead_by_hand() -> None:
    times = driver.Times([3.0, 2.2, 9.0], ([2.0, 2.0, 9.0], [2.0, 2.0, 9.0]))
    assert times.over() == pytest.approx(0.1) and times.resolution() == 0


# --- materialise ------------------------------------------------------------------------------------------------------


def test_two_ranks_materialise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    materialise.run(quick=True, out=tmp_path)
    ranks = only_file(tmp_path, "materialise")["ranks"]
    assert len(ranks) == 2 and all(rank["finite"] for rank in ranks)
    # Between them the ranks hold the model once, and what doesn't divide evenly is no part of it.
    assert sum(rank["shard_bytes"] for rank in ranks) == 4 * ranks[0]["parameters"]
    for rank in ranks:
        assert set(rank["wall"]) == set(rank["cpu"]) == set(materialise.PARTS)
        assert rank["wall"]["plan"] > 0 and rank["wall"]["decompose"] > 0 and rank["wall"]["hand out and fill"] > 0
        assert rank["peak"] > rank["shard_bytes"]
    assert "peak over the dense model" in capsys.readouterr().out


def test_a_process_that_fails_is_told() -> None:
    # Functions that a process finds without the tests on its path.
    with pytest.raises(LrcompileError, match="ValueError: "):
        apart(math.sqrt, [(-1.0,), (4.0,)])
    with pytest.raises(LrcompileError, match="died with 7"):
        apart(os._exit, [(7,)])
    with pytest.raises(LrcompileError, match="no answer within 1 s"):
        apart(time.sleep, [(60,)], timeout=1)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_models_are_filled_with_numbers_of_the_dense_size() -> None:
    model = filled(built(LLAMA_TINY, Recipe.pretrain(rank_ratio=0.25), torch.float32).model, torch.device("cpu"))
    products = [m.weight.detach() for m in model.modules() if isinstance(m, AdoptedModule)]
    assert len(products) == 14
    assert all(0.5 * 0.02 < float(w.std()) < 2 * 0.02 for w in products)
    assert bool((model.get_parameter("model.norm.weight") == 1.0).all())
    loss = model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_steps_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_against_hand", lambda quick: {})  # which the README's commands run
    wrong = replace(training.TINY[1], name="wrong", recipe={"rank_ratio": -1.0})
    monkeypatch.setattr(training, "TINY", (wrong, training.TINY[0]))
    with pytest.raises(LrcompileError, match="wrong: RecipeError: rank_ratio"):
        step.run(quick=True, out=tmp_path)
    bad, good = only_file(tmp_path, "step")["dense"]
    assert bad["error"] and not good["error"]
    assert good["linear"] == pytest.approx(3.0) and 1.3 < good["whole"] < 3.0
    assert good["speed"] > 0 and good["dense"]["parameters"] > good["ours"]["parameters"]
    for side in ("dense", "ours"):
        assert len(good[side]["seconds"]) == 3 and good[side]["tokens_per_s"] > 0
        assert good[side]["loss"] < 6.5  # ln 512 and a little, falling
    said = capsys.readouterr().out
    assert "wrong was not measured" in said and "tokens/s" in said


class Hungry:
    """A contender that has memory for one row."""

    def __init__(self) -> None:
        self.model, self.optimizers, self.figures = torch.nn.Linear(2, 2), [], training.Figures(6)
        self.rows: list[int] = []

    def step(self, ids: torch.Tensor) -> None:
        self.rows.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError

    def timed(self, ids: torch.Tensor) -> float:
        self.step(ids)
        return 1.0


def test_rows_are_halved_where_memory_runs_out() -> None:
    case = replace(training.TINY[0], rows=4)
    result = training.Compared(case.name, case.rows, case.length, case.recompute)
    pair: Any = (Hungry(), Hungry())
    ids = training._warmed(case, result, pair, torch.device("cpu"))
    assert result.rows == 1 and ids.shape == (1, case.length)
    assert pair[0].rows[:2] == [4, 2] and set(pair[0].rows[2:]) == set(pair[1].rows) == {1}


# --- finetuning -------------------------------------------------------------------------------------------------------


def test_finetuning_needs_a_gpu_for_the_real_size() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(LrcompileError, match="--quick"):
        finetune.run()


def test_both_finetune_the_same_model_with_the_same_pairs() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    ours, theirs = (finetune.measure(job) for job in finetune.jobs(quick=True)[:2])
    assert ours.trained == theirs.trained > 0
    for row in (ours, theirs):
        assert len(row.seconds) == 2 and (row.peak_bytes or 0) > 0
        assert row.loss is not None and 4.5 < row.loss < 6.5


def test_random_values_are_every_parameter_once() -> None:
    made = built(LLAMA_TINY, None, torch.bfloat16)
    values = Random(made.model, made.blocks, torch.device("cpu"))
    units = [values.unit(name) for name in (None, *made.blocks)]
    assert sorted(name for unit in units for name in unit) == sorted(name for name, _ in made.model.named_parameters())
    assert all(p.dtype == torch.bfloat16 and not p.is_meta for unit in units for p in unit.values())


def test_the_loss_of_chunks_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "CHUNK", 5)
    model: Any = filled(built(LLAMA_TINY, None, torch.float32).model, torch.device("cpu"))
    ids = torch.randint(0, 512, (2, 16))
    results = []
    for whole in (True, False):
        loss = finetune._loss(model, ids, whole)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*results, strict=True):  # rounding of sums in another order; 3e-7 is seen
        assert (one - other).abs().max() <= 2e-6 * one.abs().max()


def test_a_contender_that_fails_is_told_and_the_others_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(function: Any, each: list[Any], timeout: float) -> list[finetune.Row]:
        [(job,)] = each
        if job.theirs:
            raise LrcompileError("ImportError: no peft")
        return [finetune.Row(job.name, peak_bytes=123_000_000, loss=1.0)]

    monkeypatch.setattr(finetune, "apart", one)
    with pytest.raises(LrcompileError, match="peft QLoRA: ImportError: no peft"):
        finetune.run(quick=True, out=tmp_path)
    rows = only_file(tmp_path, "finetune")["rows"]
    assert [bool(row["error"]) for row in rows] == [False, True]
    said = capsys.readouterr().out
    assert "123 MB" in said and "peft QLoRA was not measured: ImportError: no peft" in said
