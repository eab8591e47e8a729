"""The shipped comparisons: read as the command reads them, and of the sizes that they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompile.bench.twins import read
from lrcompile.train.build import build

FOLDER = Path(__file__).parents[1] / "examples" / "configs" / "quality"
SIZES = {"3m": 3.4e6, "5m": 5.1e6, "30m": 30.7e6}


def test_all_are_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_its_twins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[2])
    twins = read(FOLDER / f"{name}.toml")
    text = (FOLDER / f"{name}.toml").read_text()
    assert f"lrcompile bench quality examples/configs/quality/{name}.toml" in text
    assert {v.dense for v in twins.variants} == {True, False}
    dense, pairs = ([v for v in twins.variants if v.dense is side and v.like is None] for side in (True, False))
    for optimizer in {v.run.optimizer.name for v in dense}:
        rates = {
            tuple(tuple(c.values()) for c in v.grid) for v in (*dense, *pairs) if v.run.optimizer.name == optimizer
        }
        assert len(rates) == 1, f"{optimizer} has another grid for the dense twin than for the pairs"
    for run in {repr(v.run.recipe): v.run for v in pairs}.values():
        built = build(run.model.source, run.recipe.make(), length=run.data.length)
        assert built.plan is not None
        assert built.plan.compression >= 2.64
        weights = [e.dense_numel for e in built.plan.adopted]
        assert sum(weights) == pytest.approx(SIZES[name], rel=0.02)
