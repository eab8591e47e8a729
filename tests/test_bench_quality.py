"""Twins at a toy size: trained, stopped, gone on with, and told of."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lrcompile.bench import main as bench
from lrcompile.bench.twins import label, read
from lrcompile.errors import LrcompileError, TrainError
from lrcompile.train import driver, lines
from lrcompile.train.log import RunLog
from tests.train.runs import write_data

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
TWINS = """
seeds = [3, 4]
[run]
steps = 6
batch = 4
micro_batch = 4
model.source = "{0}/config.json"
data = {{ train = "{0}/data/train", validation = "{0}/data/validation", length = 32 }}
schedule.warmup = 1
parallel = {{ precision = "float32", compile = false }}
save.every = 2
evaluate = {{ every = 3, batches = 1 }}
log = {{ live = false }}
[variants.dense]
recipe.dense = true
grid.optimizer.lr = [1e-3, 1e-2]
[variants.pairs]
recipe.rank = 4
optimizer.name = "muon"
[variants.pairs-longer]
like = "pairs"
budget = "flops"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_data(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "twins.toml").write_text(TWINS.format(tmp_path))
    return tmp_path / "twins.toml"


def steps_of(run: Path) -> list[int]:
    return [e["step"] for e in lines.entries(run / lines.NAME) if e["kind"] == "step"]


@pytest.mark.slow
def test_twins_are_trained_stopped_and_gone_on_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    begun: list[str] = []
    taken: list[str] = []
    step = RunLog.step

    def stops(log: RunLog, number: int, **told: Any) -> None:
        step(log, number, **told)
        taken.append(begun[-1])
        if begun[-1].startswith("pairs/") and number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def counted(run: Any, **options: Any) -> None:
        begun.append(str(Path(run.out).relative_to(out)))
        driver.train(run, **options)

    monkeypatch.setattr("lrcompile.bench.quality.train", counted)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "step", stops)
        with pytest.raises(TrainError, match="stopped at .*pairs/as-set/seed3; the same command goes on"):
            bench(["quality", str(config), "--out", str(out)])
    dense = [f"dense/optimizer.lr={rate}" for rate in (0.001, 0.01)]
    assert begun == [f"{dense[0]}/seed3", f"{dense[1]}/seed3", "pairs/as-set/seed3"]
    assert len(taken) < 18 and not (out / "quality.json").exists()

    begun.clear()
    bench(["quality", str(config), "--out", str(out)])
    told = json.loads((out / "quality.json").read_text())
    rows = {row["variant"]: row for row in told["variants"]}
    best = label(rows["dense"]["choice"])
    assert begun == [
        "pairs/as-set/seed3",
        f"dense/{best}/seed4",
        "pairs/as-set/seed4",
        "pairs-longer/as-set/seed3",
        "pairs-longer/as-set/seed4",
    ]
    assert steps_of(out / "pairs/as-set/seed3") == [1, 2, 3, 4, 5, 6]
    tried = {label(t["choice"]): t["loss"] for t in rows["dense"]["tried"]}
    assert min(tried, key=tried.get) == best and rows["dense"]["losses"]["3"] == tried[best]  # type: ignore[arg-type]
    assert rows["dense"]["at_edge"] and not rows["pairs"]["at_edge"]
    assert [a - b for a, b in zip(*(rows[n]["losses"].values() for n in ("pairs", "dense")), strict=True)] == (
        rows["pairs"]["gaps"]
    )
    assert rows["pairs"]["tokens"] == rows["dense"]["tokens"] == 6 * 4 * 32
    assert rows["pairs"]["flops"] < rows["dense"]["flops"]
    assert rows["pairs-longer"]["steps"] > 6
    half = rows["pairs"]["flops"] / 6 / 2  # of a step: their number is whole
    assert rows["pairs-longer"]["flops"] == pytest.approx(rows["dense"]["flops"], abs=1.01 * half)
    assert rows["pairs"]["compression"] > 2
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*/*/*/checkpoints"))
    page = (out / "quality.md").read_text()
    assert f"lrcompile bench quality {config} --out {out}" in page and "pairs-longer" in page and "equal FLOPs" in page

    begun.clear()
    bench(["quality", str(config), "--out", str(out)])
    assert begun == []
    assert json.loads((out / "quality.json").read_text()) == told
    capsys.readouterr()

    config.write_text(config.read_text().replace("steps = 6", "steps = 7"))
    with pytest.raises(TrainError, match="seed3 is of another comparison: steps was 6, is 7"):
        bench(["quality", str(config), "--out", str(out)])


def test_a_rate_that_diverges_is_told_and_not_chosen(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("[1e-3, 1e-2]", "[1e30, 1e-3]").replace("[3, 4]", "[3]")
    config.write_text(text.partition("[variants.pairs-longer]")[0])
    out = tmp_path / "out"
    for _ in range(2):  # neither the first time nor when it is found again
        bench(["quality", str(config), "--out", str(out)])
        dense = json.loads((out / "quality.json").read_text())["variants"][0]
        assert dense["choice"] == {"optimizer.lr": 1e-3}
        assert dense["tried"][0]["loss"] is None


def test_a_variant_that_could_not_start_is_refused_before_another_is_trained(config: Path, tmp_path: Path) -> None:
    for changes in ('optimizer.rates = { "*atn*" = 2.0 }', 'recipe.exclude = ["*atn*"]'):
        config.write_text(TWINS.format(tmp_path).replace("recipe.rank = 4", f"recipe.rank = 4\n{changes}"))
        with pytest.raises(LrcompileError, match=r"variant pairs: .*\*atn\*"):
            bench(["quality", str(config), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_quick_takes_a_small_part(config: Path, tmp_path: Path) -> None:
    twins = read(config, data="elsewhere", quick=True)
    assert {v.run.steps for v in twins.variants} == {4}
    assert twins.variants[0].run.data.train == "elsewhere/train"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [3, 4]", "seeds = [3, 3]", "list of different whole numbers"),
        ("seeds = [3, 4]", "seed = 3", "seed is unknown; known are seeds, run, variants"),
        ("recipe.dense = true\n", "", "twins are a variant with recipe.dense"),
        ("recipe.rank = 4", "recipe.rnk = 4", "variants.pairs: recipe.rnk is no setting; did you mean rank"),
        ("recipe.rank = 4", "steps = 4", "variants.pairs: steps must be the same for all"),
        ("recipe.rank = 4", "grid.seed = [4]", "grid can't change what must be the same"),
        ("grid.optimizer.lr = [1e-3, 1e-2]", "grid.optimizer.lr = 1e-3", "a table of lists"),
        ("grid.optimizer.lr = [1e-3, 1e-2]", "grid.optimizer.lr = [1e-3, -1.0]", "optimizer.lr=-1.0: must be above 0"),
        ('like = "pairs"', 'like = "dense"', "must name a variant above that trains pairs"),
        ('budget = "flops"', 'budget = "time"', "one of flops, seconds"),
        ('budget = "flops"', 'budget = "flops"\nrecipe.rank = 2', "leave recipe out"),
    ],
)
def test_what_makes_no_comparison(config: Path, old: str, new: str, message: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(TrainError, match=message):
        read(config)
