"""The kernel bench, as far as it goes without a GPU: every contender computes the same, results are kept and shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lrcompile.bench import main as bench
from lrcompile.bench.contenders import FORMATS, Case, cases, contenders, expected
from lrcompile.bench.kernels import Result, Row, picture, run
from lrcompile.cost import device_named
from lrcompile.errors import LrcompileError

from .kernels.numbers import assert_same

PAIR = Case("lowrank_linear", "toy", 5, 64, 96, 8)


OTHERS = [Case(family, "toy", 5, 64, 96, 8) for family in ("lowrank_group", "lowrank_epilogue")]
QUANTISED = [Case("quant_linear", "toy", 5, 256, 256, 0, form) for form in FORMATS]
BESIDE = [Case("quant_lowrank_linear", "toy", 5, 256, 256, 16, form) for form in FORMATS]


@pytest.mark.parametrize("case", [PAIR, *OTHERS, *QUANTISED, *BESIDE], ids=lambda case: f"{case.family}-{case.form}")
def test_contenders_compute_the_same(case: Case) -> None:
    if case.form:
        pytest.importorskip("bitsandbytes" if case.form == "nf4" else "torchao")
    results = {}
    for name, make in contenders(case, compiled=False, device="cpu"):
        if name in ("torchao", "gemlite"):
            continue  # their kernels are CUDA's
        forward, inputs = make()
        y = forward()
        gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))
        assert [g.shape for g in gradients] == [t.shape for t in inputs]
        if name not in ("dense", "ours, no pair"):
            results[name] = (y, *gradients)
    assert len(results) >= 2
    for tensors in results.values():
        for got, want in zip(tensors, results["library"], strict=True):
            assert_same(got, want, torch.bfloat16)


def test_every_family_size_and_rank_is_a_case() -> None:
    every = list(cases())
    assert len(every) == len(set(every))
    assert {case.tokens for case in every} == {1, 16, 256, 4096, 16384}
    assert {case.family for case in every} == {c.family for c in (PAIR, *OTHERS, *QUANTISED, *BESIDE)}
    llama = {
        c.rank for c in every if c.model == "llama-3-8b" and c.family == "lowrank_linear" and c.out_features == 14336
    }
    assert llama == {64, 128, 256, 1024}


def test_work_counts_by_hand() -> None:
    flops, moved = PAIR.work(backward=False)
    assert flops == 2 * 5 * 8 * (64 + 96) and moved == 2 * (5 * (64 + 96) + 8 * (64 + 96))
    assert PAIR.work(backward=True)[0] == 3 * flops


def test_results_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = expected(PAIR, device_named("H100"))
    rows = [Row(PAIR, name, 1e-5, 3e-5, 0.5, 1 << 20, told.get(name)) for name in ("dense", "library", "ours")]
    result = Result("TOY GPU", "2.13", 3e12, 7e14, [*rows, Row(PAIR, "torchao", error="RuntimeError: no")], 3)
    path = tmp_path / "kernels-TOY.json"
    path.write_text(json.dumps(asdict(result)))
    assert Result.read(path).rows[0].case == PAIR
    run(show=path)
    said = capsys.readouterr().out
    assert "TOY GPU" in said and "3 cases were not reached" in said
    assert "torchao was not measured: RuntimeError: no" in said
    line = next(line for line in said.splitlines() if " ours " in line)
    assert line.split()[-7:-2] == ["ours", "10", "30", "0.5", "1.05"]  # µs, µs, part of the roofline, MB; the model's
    assert max(map(len, said.splitlines())) <= 80
    pytest.importorskip("matplotlib")
    picture(result, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LrcompileError, match="is no result of"):
        run(show=tmp_path / "bad.json")


def test_without_a_gpu_the_expected_figures_stand_beside_empty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run(quick=True, target="A100", out=tmp_path)
    said = capsys.readouterr().out
    assert "A100, expected by the cost model and not measured: no GPU here" in said
    assert f"nothing was measured, so nothing is written to {tmp_path}" in said and not list(tmp_path.iterdir())
    case = list(cases())[0]
    both = expected(case, device_named("A100"))["library"]
    line = next(line for line in said.splitlines() if " library " in line)
    assert line.split() == ["library", *(f"{float(f'{1e6 * seconds:.3g}'):g}" for seconds in both)]
    run(target="H100")
    said = capsys.readouterr().out
    assert "…" not in said and "e+" not in said and max(map(len, said.splitlines())) <= 80
    assert said.count("ours") > len(list(cases()))


STUB = """#!/usr/bin/env bash
printf "%s\\n" "$*" >>"$LOG"
[[ "$*" != *"$FAILS"* ]]
"""


FIRST = {
    "pytest": ("gpu-tests.txt", None),
    "kernels": ("gpu-bench.txt", {"quick": False, "show": None, "minutes": 4.0, "target": "H100"}),
}
TRAIN = {
    "step": ("gpu-step.txt", {"quick": False, "minutes": 0.5}),
    "finetune": ("gpu-finetune.txt", {"quick": False}),
}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("more", "fails"),
    [
        ((), ""),
        ((), "torch.cuda"),
        ((), "-m gpu"),
        ((), "bench kernels"),
        (("train",), "bench step"),
        (("train",), "bench finetune"),
        (("wheels", "train"), ""),
        (("", "train"), ""),
    ],
)
def test_the_gpu_script_runs_all_there_is_and_fails_where_a_part_does(
    tmp_path: Path, root: Path, more: tuple[str, ...], fails: str
) -> None:
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    log, out = tmp_path / "log", tmp_path / "out"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "FAILS": fails or "nothing"}
    script = ["bash", str(root / "examples" / "gpu.sh"), str(out), *more]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (not fails), done.stderr
    ran = log.read_text().splitlines()
    installs = [line for line in ran if line.startswith("-m pip")]
    assert len(installs) == 1 + ("wheels" in more)
    ran = ran[len(installs) :]
    assert "torch.cuda" in ran[0]
    if fails == "torch.cuda":
        assert "no GPU" in done.stderr and len(ran) == 1
        return
    parts = TRAIN if "train" in more else FIRST
    assert {file.name for file in out.iterdir()} == {file for file, _ in parts.values()}
    assert len(ran) == 1 + len(parts)
    for line, (name, (_, options)) in zip(ran[1:], parts.items(), strict=True):
        if options is None:
            assert line.split()[:2] == ["-m", name] and (root / line.split()[-1]).is_dir()
            continue
        called: list[dict[str, object]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"lrcompile.bench.{name}.run", lambda called=called, **given: called.append(given))
            bench(line.split()[3:])
        assert called == [{**options, "out": out}]
