"""The pair alone: saved, loaded beside the same base to the bit, and refused beside any other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrcompile
from lrcompile import Recipe, StateError
from lrcompile.files import sha256
from lrcompile.weights import adapters, folder

from .helpers_adopt import IDS, Mlp, Shared, X, adopted, adopted_shared, snapshot

FILES = ("adapter.json", "adapter.safetensors")
FORMS = [("nf4", "zero"), ("nf4", "pissa"), ("int8", "loftq"), ("dense", "zero"), ("dense", "pissa")]


def finetuned(weights: str = "nf4", init: str = "pissa", dense: nn.Module | None = None, **recipe: Any) -> Any:
    """Adopted with bases, not trained yet; the same weights in each call."""
    torch.manual_seed(1)
    recipe = {"rank": 4, "pair_dtype": "float32", "trainable": ["attn.out_proj.bias", "head"], **recipe}
    return adopted_shared(dense or Shared(), weights=weights, init=init, **recipe)


def train(model: nn.Module, optimizer: Any = None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(*IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def refused(model: nn.Module, dir: Path, said: str) -> None:
    before = snapshot(model)
    with pytest.raises(StateError, match=said):
        lrcompile.load_adapter(model, dir)
    assert snapshot(model) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = finetuned()
    train(model)
    target = tmp_path_factory.mktemp("adapters") / "saved"
    lrcompile.save_adapter(model, target)
    return target


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "init"), FORMS)
def test_bitwise(weights: str, init: str, tmp_path: Path) -> None:
    model = finetuned(weights, init)
    start = model(*IDS)
    train(model)
    assert not torch.equal(model(*IDS), start)
    lrcompile.save_adapter(model, tmp_path / "deep" / "saved")
    again = finetuned(weights, init)
    assert torch.equal(again(*IDS), start)
    assert lrcompile.load_adapter(again, str(tmp_path / "deep" / "saved")) is again
    assert torch.equal(again(*IDS), model(*IDS))
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]


def test_what_is_in_the_directory(saved: Path) -> None:
    assert tuple(sorted(p.name for p in saved.iterdir())) == FILES
    tensors = load_file(saved / "adapter.safetensors")
    weights = ["attn.in_proj_weight", "attn.out_proj.weight", "up.weight", "down.weight"]
    # What is shared is there once: side.weight is up.weight, again is down; the head is the embedding.
    assert set(tensors) == {f"{w}_{s}" for w in weights for s in "ab"} | {"attn.out_proj.bias", "embed.weight"}
    index = json.loads((saved / "adapter.json").read_text())
    assert index["format"] == "lrcompile-adapter/1"
    assert index["entries"]["up.weight"] == {"rank": 4, "scale": 8.0, "base": "nf4", "init": "pissa"}
    assert {"up.weight_base", "up.weight_base_absmax", "up.bias", "scale"} <= set(index["base"])
    assert not set(index["base"]) & set(tensors)


def test_it_is_small(tmp_path: Path) -> None:
    model = adopted(Mlp(512, 512), inputs=(torch.zeros(1, 512),), rank=2, weights="nf4", trainable=[])
    lrcompile.save_adapter(model, tmp_path / "alone")
    lrcompile.save(model, tmp_path / "whole")
    alone, whole = (tmp_path / "alone" / "adapter.safetensors", tmp_path / "whole" / "model.safetensors")
    assert alone.stat().st_size < 2 * 4 * 2 * (512 + 512) + 3000 < whole.stat().st_size / 5


def test_frozen_for_inference_it_still_fits(saved: Path) -> None:
    model, other = finetuned(), finetuned().requires_grad_(False)
    lrcompile.load_adapter(model, saved)
    lrcompile.load_adapter(other, saved)
    # Without gradients torch may take other kernels, which round otherwise on some processors.
    torch.testing.assert_close(other(*IDS), model(*IDS).detach())
    assert not any(p.requires_grad for p in other.parameters())


def test_the_optimizer_goes_on(saved: Path) -> None:
    models = [finetuned(), finetuned()]
    optimizers = [train(m) for m in models]
    assert torch.equal(models[0](*IDS), models[1](*IDS))
    train(models[0], optimizers[0])
    lrcompile.load_adapter(models[0], saved)  # as it was after the first two steps
    assert torch.equal(models[0](*IDS), models[1](*IDS))
    train(models[0], optimizers[0])
    assert not torch.equal(models[0](*IDS), models[1](*IDS))


def test_wrapped_models(tmp_path: Path, saved: Path) -> None:
    model = finetuned()
    compiled: Any = torch.compile(model)
    assert lrcompile.load_adapter(compiled, saved) is compiled
    lrcompile.save_adapter(compiled, tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter.safetensors").read_bytes() == (saved / "adapter.safetensors").read_bytes()
    inner = finetuned()
    inner.up = torch.compile(inner.up)
    lrcompile.load_adapter(inner, saved)
    assert torch.equal(inner(*IDS), model(*IDS))


def test_one_start_may_take_the_place_of_another_beside_the_same_base(tmp_path: Path) -> None:
    model, calibration = finetuned("nf4", "zero"), finetuned("nf4", "zero")
    train(model)
    lrcompile.save_adapter(model, tmp_path / "saved")
    for entry in calibration.modules():  # as "qera" has it: another pair, the plainly quantised base
        for name in getattr(entry, "lr_told", {}):
            entry.lr_told[name] = {**entry.lr_told[name], "init": "qera"}
    lrcompile.load_adapter(calibration, tmp_path / "saved")
    assert torch.equal(calibration(*IDS), model(*IDS))


def test_a_plain_pair_that_is_trained_is_kept_too(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(2)
        model = Mlp()
        plan = lrcompile.plan(model, X, Recipe(rank=4, weights="dense", init="zero"))
        plan.entries[1].base, plan.entries[1].scale, plan.entries[1].init = None, 1.0, "svd"
        return lrcompile.adopt(model, plan)

    model, x = build(), torch.randn(3, 32)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    lrcompile.save_adapter(model, tmp_path / "saved")
    assert torch.equal(lrcompile.load_adapter(build(), tmp_path / "saved")(x), model(x))


def test_saving_again_replaces_and_nothing_else(tmp_path: Path) -> None:
    model = finetuned()
    lrcompile.save_adapter(model, tmp_path / "saved")
    train(model)
    lrcompile.save_adapter(model, tmp_path / "saved")
    assert torch.equal(lrcompile.load_adapter(finetuned(), tmp_path / "saved")(*IDS), model(*IDS))
    lrcompile.save(model, tmp_path / "whole")
    with pytest.raises(StateError, match=r"whole exists and was not saved by lrcompile.save_adapter"):
        lrcompile.save_adapter(model, tmp_path / "whole")
    with pytest.raises(StateError, match=r"saved exists and was not saved by lrcompile;"):
        lrcompile.save(model, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "whole"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_nothing_to_keep(tmp_path: Path, saved: Path) -> None:
    quantised = lrcompile.adopt(Shared().requires_grad_(False), Recipe(weights="nf4"), IDS)
    with torch.device("meta"):
        shapes = Shared()
    for model, said in [
        (Shared(), "no weight of the model has a pair beside a base"),
        (adopted(), "no weight of the model has a pair beside a base"),
        (quantised, "no weight of the model has a pair beside a base"),
        (finetuned(dense=shapes, init="zero"), "on the meta device and holds no values"),
    ]:
        with pytest.raises(StateError, match=said):
            lrcompile.save_adapter(model, tmp_path / "saved")
        refused(model, saved, said)
    assert not list(tmp_path.iterdir())


def other_numbers(model: Any) -> Any:
    with torch.no_grad():
        model.up.bias.view(-1)[0] += 1e-6
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: finetuned(rank=3), r"'attn.in_proj_weight' has rank 4 there, 3 here; adopt the model by the recipe"),
        (lambda: finetuned(alpha=8), r"has scale 8.0 there, 4.0 here"),
        (lambda: finetuned("int8"), r"has base 'nf4' there, 'int8' here"),
        (lambda: finetuned(exclude=["up"]), r"the model has no pair beside a base for 'up.weight'"),
        (lambda: finetuned(include=["*", "head"]), r"the adapter has no pair beside a base for 'embed.weight'"),
        (lambda: finetuned(pair_dtype="bfloat16"), r"'[\w.]+_[ab]' is float32 \[\d+, \d+\] there, bfloat16"),
        (lambda: finetuned(init="zero"), r"another base: '[\w.]+_base\w*' holds other .*'pissa' there, 'zero' here\); build"),
        (lambda: finetuned(init="loftq"), r"another base: '[\w.]+_base\w*' holds other .*'pissa' there, 'loftq' here"),
        (lambda: other_numbers(finetuned()), r"another base: 'up.bias' holds other numbers; build it from the same"),
        (lambda: other_buffer(finetuned()), r"another base: 'scale' holds other numbers"),
        (lambda: more(finetuned()), r"another base: 'more.weight' is missing there, float32 \[2, 2\] here"),
    ],
)  # fmt: skip
def test_another_base_is_refused(build: Callable[[], nn.Module], said: str, saved: Path) -> None:
    refused(build(), saved, said)


def other_buffer(model: Any) -> Any:
    model.scale += 1
    return model


def more(model: Any) -> Any:
    model.more = nn.Linear(2, 2)
    return model


def test_other_weights_of_the_same_shapes_are_refused(saved: Path) -> None:
    torch.manual_seed(7)
    other = Shared()
    torch.manual_seed(1)
    refused(finetuned(dense=other), saved, "is an adapter of another base: .* holds other numbers")


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    copied, model = tmp_path / "copied", finetuned()
    copied.mkdir()
    for file in FILES:
        (copied / file).write_bytes((saved / file).read_bytes())
    lrcompile.load_adapter(copy.deepcopy(model), copied)
    whole = (copied / name).read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (copied / name).write_bytes(whole[:size])
        refused(model, copied, f"{name} is truncated")
    altered = bytearray(whole)
    altered[-20] ^= 1
    (copied / name).write_bytes(altered)
    refused(model, copied, f"{name} (was|is truncated or) altered")
    (copied / name).unlink()
    refused(model, copied, name)
    refused(model, tmp_path / "nowhere", "there is no directory")
    lrcompile.save(model, tmp_path / "whole")
    refused(model, tmp_path / "whole", "was not saved by lrcompile.save_adapter: it has no adapter.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, i: t.pop("up.weight_a"), "lacks 'up.weight_a'"),
        (lambda t, i: t.update(other=torch.zeros(1)), "it holds 'other', which this model has not"),
        (lambda t, i: i.pop("entries"), "can't be read: KeyError: 'entries'"),
        (lambda t, i: i.pop("fingerprint"), "lacks a part that lrcompile writes"),
        (lambda t, i: i.update(base=3), "can't be read: TypeError"),
    ],
)
def test_forgeries_with_right_checksums_are_refused(
    change: Callable[[Any, Any], object], said: str, saved: Path, tmp_path: Path
) -> None:
    tensors = load_file(saved / "adapter.safetensors")
    index = json.loads((saved / "adapter.json").read_text())
    change(tensors, index)
    (tmp_path / "forged").mkdir()
    path = tmp_path / "forged" / "adapter.safetensors"
    save_file(tensors, path)
    index |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    index["checksum"] = folder.checksum(index)
    (tmp_path / "forged" / "adapter.json").write_text(json.dumps(index))
    refused(finetuned(), tmp_path / "forged", said)


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finetuned()
    lrcompile.save_adapter(model, tmp_path / "saved")
    before = [(tmp_path / "saved" / name).read_bytes() for name in FILES]
    train(model)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_file", lambda tensors, path, metadata: Path(path).write_bytes(b"\0") / 0)
        with pytest.raises(ZeroDivisionError):
            lrcompile.save_adapter(model, tmp_path / "saved")
    assert [(tmp_path / "saved" / name).read_bytes() for name in FILES] == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_every_part_of_the_base_counts() -> None:
    model = finetuned()
    entries, sides = adapters.beside_bases(model)
    assert set(entries) >= {"up.weight", "side.weight", "down.weight"} and len(sides) == 8
    kept = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = adapters._digests(model, kept)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        flat = p.detach().view(-1)
        was = flat[0].clone()
        flat[0] += 1
        changed = {n for n, d in adapters._digests(model, kept).items() if before[n] != d}
        assert changed == (set() if name in kept else {name})
        flat[0] = was
    assert adapters._digests(model, kept) == before
