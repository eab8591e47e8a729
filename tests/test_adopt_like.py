"""adopt_like: an ordinary script resumes bit for bit from a state that belongs; and merge, the way back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdoptError, PlanError

from .helpers_adopt import IDS, WIDTH, Albert, Mlp, Raw, X, adopted, close, snapshot

# --- adopt_like -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Any = None) -> None:
    x = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH) if x is None else x
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def resumed(file: Path, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What a user's script does, and the one line more."""
    saved = torch.load(file, weights_only=True)
    lrcompile.adopt_like(model, saved["model"])
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("make", [Mlp, Raw, Albert])
def test_the_usual_script_resumes_bit_for_bit(make: type[nn.Module], tmp_path: Path) -> None:
    x = IDS[0] if make is Albert else None
    model = adopted(make(), inputs=IDS if make is Albert else X)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3, x)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    train(model, optimizer, 2, x)
    again, its = resumed(tmp_path / "last.pt", make())
    train(again, its, 2, x)
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q), n
    assert repr(again) == repr(model)
    with torch.device("meta"):
        shapes = make()
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    lrcompile.adopt_like(shapes, state).load_state_dict(state, assign=True)
    assert not any(p.is_meta for p in shapes.parameters())


def test_prefixes_of_wrappers_dont_matter(process_group: None) -> None:
    model = adopted(Albert(), inputs=IDS)
    y = model(*IDS)
    compiled: Any = torch.compile(model)
    inner = copy.deepcopy(model)
    inner.layers[2] = torch.compile(inner.layers[2])
    for wrapped in (model, compiled, nn.parallel.DistributedDataParallel(model), inner):
        state = wrapped.state_dict()
        fresh: Any = Albert()
        lrcompile.adopt_like(fresh, state)
        fresh.load_state_dict({k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in state.items()})
        assert torch.equal(fresh(*IDS), y)
        fresh_compiled: Any = torch.compile(Albert())
        lrcompile.adopt_like(fresh_compiled, state)
        assert fresh_compiled._orig_mod.layers[2].up.weight_a.shape == (4, WIDTH)
    fresh_compiled.load_state_dict(compiled.state_dict())


def test_loading_with_another_prefix_tells_what_to_do(process_group: None) -> None:
    model = adopted()
    compiled: Any = torch.compile(copy.deepcopy(model))
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    fix = "load into the same wrapper, or rename the state's keys"
    for state, into, there, here in [
        (compiled.state_dict(), Mlp(), "_orig_mod.up.weight_a", "up.weight_a"),
        (model.state_dict(), torch.compile(Mlp()), "up.weight_a", "_orig_mod.up.weight_a"),
        (parallel.state_dict(), Mlp(), "module.up.weight_a", "up.weight_a"),
    ]:
        fresh: Any = lrcompile.adopt_like(into, state)
        said = f"lrcompile: the state calls {there!r} what this model calls {here!r}"
        with pytest.raises(RuntimeError, match=f"{re.escape(said)}.*{fix}"):
            fresh.load_state_dict(state)
    assert model.load_state_dict({}, strict=False).missing_keys  # nothing is known of it: torch's own answer


def test_a_whole_checkpoint_is_told_from_a_state() -> None:
    state, optimizer = adopted().state_dict(), {"state": {0: {"step": torch.zeros(())}}, "param_groups": []}
    for key in ("model", "state_dict", "model_state_dict", "net"):
        for inner in (state, Mlp().state_dict()):
            with pytest.raises(AdoptError, match=rf"whole checkpoint.*pass checkpoint\['{key}'\]"):
                lrcompile.adopt_like(Mlp(), {"step": 3, "optimizer": optimizer, key: inner})
    with pytest.raises(AdoptError, match="takes a state dict, got str; torch.load it first"):
        lrcompile.adopt_like(Mlp(), "last.pt")  # type: ignore[arg-type]
    for other in (optimizer, {0: torch.zeros(())}, {"up._extra_state": {"scale": torch.zeros(())}}):
        with pytest.raises(AdoptError, match="holds no lrcompile Plan"):
            lrcompile.adopt_like(Mlp(), other)


def test_a_child_called_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.up = Mlp(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(self.module(x))

    model = adopted(Holder(), exclude=("up",))
    state = model.state_dict()
    again = lrcompile.adopt_like(Holder(), state)
    again.load_state_dict(state)
    assert type(again.up) is nn.Linear and torch.equal(again(X[0] + 1), model(X[0] + 1))


def test_states_that_dont_belong_are_refused() -> None:
    state = adopted().state_dict()
    before_bad = {**state, "up._extra_state": torch.zeros(3, dtype=torch.uint8)}
    for model, given, error, said in [
        (Mlp(), Mlp().state_dict(), AdoptError, "holds no lrcompile Plan"),
        (Mlp(), {}, AdoptError, "holds no lrcompile Plan"),
        (Raw(), state, PlanError, "another model.*'up.weight', this model has no such parameter"),
        (Mlp(hidden=64), state, PlanError, r"another model.*'up.weight' is \(48, 32\) there, \(64, 32\) here"),
        (Mlp(), adopted(Raw()).state_dict(), PlanError, "another model"),
    ]:
        before = snapshot(model)
        with pytest.raises(error, match=said):
            lrcompile.adopt_like(model, given)
        assert snapshot(model) == before
    with pytest.raises(AdoptError, match="adopted already"):
        lrcompile.adopt_like(adopted(), state)
    half = lrcompile.adopt_like(Mlp(), before_bad)  # the other module's pair is still told
    with pytest.raises(RuntimeError):
        half.load_state_dict(before_bad)


def test_a_state_of_another_rank_or_none_is_refused() -> None:
    model = adopted(rank=4)
    with pytest.raises(
        lrcompile.StateError, match=r"'weight': 'rank 8'.*'weight': 'rank 4'.*build the dense model again.*adopt_like"
    ):
        model.load_state_dict(adopted(rank=8).state_dict())
    dense = "up.weight is adopted here and dense in the state; load it before lrcompile.adopt, or after lrcompile.merge"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=re.escape(dense)) as error:
            model.load_state_dict(Mlp().state_dict(), strict=strict)
        assert str(error.value).count("lrcompile: ") == 1  # once, and after torch's own lines
        assert str(error.value).splitlines()[-1].strip().startswith("lrcompile: ")
    with pytest.raises(RuntimeError, match="weight_a"):
        Mlp().load_state_dict(model.state_dict())


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge_gives_the_dense_model_back() -> None:
    model = Mlp()
    names = list(model.state_dict())
    adopted(model)
    x = torch.randn(4, WIDTH)
    y = model(x)
    assert lrcompile.merge(model) is model
    assert type(model.up) is nn.Linear and type(model.down) is nn.Linear and list(model.state_dict()) == names
    assert model.up.weight.is_leaf and model.up.weight.requires_grad and model.up.weight.is_contiguous()
    assert "rank" not in repr(model) and "lr_told" not in vars(model.up)
    close(model(x), y)
    with pytest.raises(AdoptError, match="nothing to merge"):
        lrcompile.merge(model)
    adopted(model, rank=4)  # of rank 4 by now: nothing is lost
    close(model(x), y, 1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_merge_in_any_mode(mode: Any) -> None:
    model = adopted(Raw())
    with mode():
        lrcompile.merge(model)
    assert not model.w.is_inference() and model.w.requires_grad
    model(X[0] + 1).sum().backward()
