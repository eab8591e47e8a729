"""What a run starts from where the start looks at data, and what its first step holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lrcompile
from lrcompile.errors import TrainError
from lrcompile.recipe import Recipe
from lrcompile.train import lines
from lrcompile.train.build import build
from lrcompile.train.data import Sampler, Shards
from lrcompile.train.language import inputs
from lrcompile.train.materialise import materialise
from lrcompile.train.optimizers import optimizers
from lrcompile.train.state import held_bytes

from .inside import WIDTH, Tiny
from .runs import finished, losses, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("recipe", [Recipe(rank=4, init="data"), Recipe(weights="nf4", rank=4, init="qera")])
def test_a_start_from_data_is_that_of_adopt(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sampler = Sampler(Shards.open(data / "train"), length=32, batch=4, seed=0)
    batches = [sampler.rows(step, 0, 4) for step in range(3)]
    built = build("inside:tiny", recipe, length=32)
    model = copy.deepcopy(built.values.model).eval()  # type: ignore[attr-defined]
    materialise(built, torch.device("cpu"), batches)
    calls = [inputs(model, batch.tokens, batch.positions) for batch in batches]
    lrcompile.adopt(model, recipe, calls[0], calibration=calls)
    state, found = dict(model.named_parameters()), dict(built.model.named_parameters())
    assert found.keys() == state.keys() and any(name.endswith("weight_a") for name in state)
    for name, value in state.items():
        assert torch.equal(found[name], value), name


def test_a_run_starts_from_its_data_on_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """Five sequences in calls of two: the last call has one."""
    told = settings(data, tmp_path / "one", recipe={"init": "data"}, data={"calibration": 5}, steps=3)
    one = losses(finished(told))
    two = losses(finished({**told, "out": str(tmp_path / "two")}, ranks=2))
    assert list(one) == [1, 2, 3]
    assert two == pytest.approx(one, rel=1e-5)
    other = losses(finished(settings(data, tmp_path / "svd", steps=3)))
    assert abs(other[1] - one[1]) > 1e-4, "the start of the SVD is another"


def test_what_has_no_weights_has_nothing_to_keep(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    tf.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"init='data' keeps what .* has no weights: choose another start"):
        build(str(tmp_path / "config.json"), Recipe(rank=4, init="data"))


def test_bytes_of_a_step_by_hand(data: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight  # tied: once
    made = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 8)).sum().backward()
    made.step()
    assert held_bytes(model, [made]) == {"weights": 256, "gradients": 256, "optimizer": 512 + 4}
    # Of a run on two ranks each holds its half, the step counts aside.
    out = finished(
        settings(data, tmp_path / "out", recipe={"dense": True}, steps=3, optimizer={"name": "adamw"}), ranks=2
    )
    told = [entry["held"] for entry in lines.entries(out / lines.NAME) if "held" in entry]
    whole = 4 * sum(p.numel() for p in Tiny().parameters())
    assert len(told) == 1 and told[0]["weights"] == told[0]["gradients"]
    assert whole / 2 <= told[0]["weights"] <= whole / 2 + 4 * 4 * WIDTH  # an odd row or bias is rank 0's
    assert 2 * told[0]["weights"] < told[0]["optimizer"] < 2 * told[0]["weights"] + 200


def test_states_in_eight_bits_are_counted_inside() -> None:
    pytest.importorskip("torchao")
    model = torch.nn.Linear(256, 256, bias=False)
    made = optimizers(model, "adamw8bit", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    model(torch.randn(2, 256)).sum().backward()
    for optimizer in made:
        optimizer.step()
    count = 256 * 256
    assert 2 * count < held_bytes(model, made)["optimizer"] < 2 * count * 1.1
