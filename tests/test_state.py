"""Saved state: the original names and shapes, save and load bitwise, shared weights once, nothing else overwritten."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lrcompile
from lrcompile import AdoptError, StateError

from .helpers_adopt import FILES, IDS, WIDTH, Shared, adopted_shared, refused_load

# --- original_state_dict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [("*",), ("*", "head")])
def test_the_original_state_fits_the_untouched_model(include: tuple[str, ...]) -> None:
    untouched = Shared()
    model = adopted_shared(include=include)
    dense = lrcompile.original_state_dict(model)
    plain = untouched.state_dict()
    assert list(dense) == list(plain)
    assert {k: (v.shape, v.dtype) for k, v in dense.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    assert dense._metadata == plain._metadata  # type: ignore[attr-defined]
    assert not any(v.requires_grad for v in dense.values()) and all(v.is_contiguous() for v in dense.values())
    assert (
        dense["side.weight"] is dense["up.weight"]
        and dense["head.weight"].data_ptr() == dense["embed.weight"].data_ptr()
    )
    untouched.load_state_dict(dense, strict=True)
    torch.testing.assert_close(untouched(*IDS), model(*IDS), rtol=1e-5, atol=1e-5)


def test_the_original_state_of_wrapped_and_dense_models() -> None:
    model = adopted_shared()
    compiled: Any = torch.compile(model)
    keys = list(Shared().state_dict())
    assert list(lrcompile.original_state_dict(compiled)) == keys
    dense = Shared()
    assert list(lrcompile.original_state_dict(dense)) == keys
    with torch.device("meta"):
        shapes = Shared()
    assert all(t.is_meta for t in lrcompile.original_state_dict(adopted_shared(shapes)).values())


def test_a_key_that_only_looks_like_extra_state() -> None:
    model = Shared()
    model.register_buffer("my_extra_state", torch.ones(2))
    adopted_shared(model)
    assert "my_extra_state" in lrcompile.original_state_dict(model)
    again = Shared()
    again.register_buffer("my_extra_state", torch.zeros(2))
    state = model.state_dict()
    lrcompile.adopt_like(again, state).load_state_dict(state)
    assert again.my_extra_state.all()  # type: ignore[operator,union-attr]


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adopted_shared(Shared(dtype=dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(*IDS).float().square().mean().backward()
    optimizer.step()
    lrcompile.save(model, tmp_path / "deep" / "saved")
    fresh = Shared(dtype=dtype)
    again = lrcompile.load(str(tmp_path / "deep" / "saved"), fresh)
    assert again is fresh and torch.equal(again(*IDS), model(*IDS))
    for (n, p), (m, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q) and p.requires_grad == q.requires_grad and p.dtype == q.dtype
    assert repr(again) == repr(model)
    with pytest.raises(AdoptError, match="adopted already"):
        lrcompile.load(tmp_path / "deep" / "saved", again)
    lrcompile.merge(again)


def test_what_is_in_the_directory(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        lrcompile.save(adopted_shared(include=("*", "head")), tmp_path / "saved")
    finally:
        os.umask(old)
    assert tuple(sorted(p.name for p in (tmp_path / "saved").iterdir())) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o750
    for name in FILES:
        assert stat.S_IMODE((tmp_path / "saved" / name).stat().st_mode) == 0o640, name
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    index = json.loads((tmp_path / "saved" / "lrcompile.json").read_text())
    assert "embed.weight_a" in tensors and "head.weight_a" not in tensors and "side.weight_b" not in tensors
    assert index["aliases"]["head.weight_a"] == "embed.weight_a"
    assert index["aliases"]["again.bias"] == "down.bias"
    assert sum(n == "down.bias" or n == "again.bias" for n in tensors) == 1
    for name in FILES:  # neither pickle's nor zip's first bytes
        assert (tmp_path / "saved" / name).read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")


@pytest.mark.parametrize("include", [("*",), ("*", "head")])
def test_a_meta_model_is_filled(include: tuple[str, ...], tmp_path: Path) -> None:
    model = adopted_shared(include=include)
    model.up.weight_b.requires_grad_(True)
    lrcompile.save(model, tmp_path / "saved")
    with torch.device("meta"):
        shapes = Shared()
    again: Any = lrcompile.load(tmp_path / "saved", shapes)
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert torch.equal(again(*IDS), model(*IDS))
    assert again.side.weight_a is again.up.weight_a and again.side.weight_b is again.up.weight_b
    assert again.again is again.down
    if "head" in include:
        assert again.head.weight_a is again.embed.weight_a and again.head.weight_b is again.embed.weight_b
    else:
        assert again.head.weight is again.embed.weight
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in again.parameters())
    torch.optim.SGD([p for p in again.parameters() if p.requires_grad], 0.1).step()


def test_a_meta_model_with_a_buffer_that_no_file_holds(tmp_path: Path) -> None:
    class Rotary(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    lrcompile.save(adopted_shared(Rotary()), tmp_path / "saved")
    lrcompile.load(tmp_path / "saved", Rotary())
    with torch.device("meta"):
        shapes = Rotary()
    refused_load(tmp_path / "saved", shapes, "table is a buffer on the meta device")


def test_compiled_models(tmp_path: Path) -> None:
    model = adopted_shared()
    compiled: Any = torch.compile(model)
    lrcompile.save(compiled, tmp_path / "outer")
    target: Any = torch.compile(Shared())
    assert lrcompile.load(tmp_path / "outer", target) is target
    assert torch.equal(target._orig_mod(*IDS), model(*IDS))
    model.up = torch.compile(model.up)
    lrcompile.save(model, tmp_path / "inner")
    assert "_orig_mod" not in (tmp_path / "inner" / "lrcompile.json").read_text()
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = Shared()
        fresh.up = torch.compile(fresh.up)  # type: ignore[assignment]
        lrcompile.load(tmp_path / "inner", fresh)
        assert fresh.side.weight_a is fresh.up._orig_mod.weight_a  # type: ignore[union-attr]


def test_saving_again_replaces(tmp_path: Path) -> None:
    lrcompile.save(adopted_shared(), tmp_path / "saved")
    second = adopted_shared(rank=6)
    lrcompile.save(second, tmp_path / "saved")
    assert torch.equal(lrcompile.load(tmp_path / "saved", Shared())(*IDS), second(*IDS))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "empty").mkdir()
    lrcompile.save(second, tmp_path / "empty")


def test_saving_into_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lrcompile.save(adopted_shared(), ".")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    lrcompile.load(tmp_path / "here", Shared())


def test_loading_and_saving_over_itself(tmp_path: Path) -> None:
    lrcompile.save(adopted_shared(), tmp_path / "saved")
    with torch.device("meta"):
        shapes = Shared()
    again = lrcompile.load(tmp_path / "saved", shapes)  # its tensors may be mapped from the very file
    y = again(*IDS)
    lrcompile.save(again, tmp_path / "saved")
    assert torch.equal(again(*IDS), y) and torch.equal(lrcompile.load(tmp_path / "saved", Shared())(*IDS), y)


# --- what is not saved ------------------------------------------------------------------------------------------------


def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    model = adopted_shared()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    lrcompile.save(model, tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("foreign", "file", "link", "dangling", "pipe"):
        with pytest.raises(StateError, match=f"{name} exists and was not saved by lrcompile"):
            lrcompile.save(model, tmp_path / name)
    (tmp_path / "ours" / "tokenizer.json").write_text("precious")
    with pytest.raises(StateError, match=r"also holds tokenizer.json, which would be lost"):
        lrcompile.save(model, tmp_path / "ours")
    assert (tmp_path / "foreign" / "model.safetensors").read_text() == "precious"
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "precious"
    assert not list(tmp_path.glob(".*"))
    lrcompile.load(tmp_path / "ours", Shared())  # what lies beside doesn't matter
    lrcompile.load(tmp_path / "link", Shared())


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"anything": object()}

    odd = Shared()
    odd.up = Odd(WIDTH, 48)
    with torch.device("meta"):
        shapes = Shared()
    for model, said in [
        (Shared(), "not adopted"),
        (adopted_shared(shapes), "on the meta device and holds no values"),
        (adopted_shared(odd), "up._extra_state of the state is no tensor"),
    ]:
        with pytest.raises(StateError, match=said):
            lrcompile.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
