"""Saved state: bitwise, shared weights once, refused when anything is wrong, and never half-written."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import lrcompile
from lrcompile import AdoptError, Recipe, StateError
from lrcompile.weights import state as state_module
from lrcompile.weights.layers import PairedModule

WIDTH = 32
TORCHS_MARK = {"_is_torch_compile"}  # torch.compile leaves it on a module
IDS = (torch.arange(8).reshape(2, 4),)
FILES = ("lrcompile.json", "model.safetensors")


class Model(nn.Module):
    """A shared module, a shared weight, a tied head, a buffer, a frozen weight, packed attention."""

    def __init__(self, hidden: int = 48, tie: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.attn = nn.Embedding(64, WIDTH), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up, self.down, self.side = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH), nn.Linear(WIDTH, hidden)
        self.again = self.down
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.register_buffer("scratch", None)
        if tie:
            self.side.weight, self.head.weight = self.up.weight, self.embed.weight
        self.down.weight.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x))) + self.again(torch.tanh(self.side(x)))
        return self.head(x)


def adopted(model: nn.Module | None = None, **recipe: Any) -> Any:
    return lrcompile.adopt(model or Model(), Recipe(**{"rank": 4, **recipe}), IDS)


def snapshot(model: nn.Module) -> list[Any]:
    """Objects, classes and values: equal only where nothing was changed."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    held = [
        (n, id(t), t.requires_grad, t.dtype, 0.0 if t.is_meta else t.detach().double().square().sum().item())
        for n, t in tensors
    ]
    return [held, [(n, id(m), type(m), sorted({*vars(m)} - TORCHS_MARK)) for n, m in model.named_modules()]]


def refused(dir: Path, model: nn.Module, said: str, error: type[Exception] = StateError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=said):
        lrcompile.load(dir, model)
    assert snapshot(model) == before


# --- original_state_dict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [("*",), ("*", "head")])
def test_the_original_state_fits_the_untouched_model(include: tuple[str, ...]) -> None:
    untouched = Model()
    model = adopted(include=include)
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
    model = adopted()
    compiled: Any = torch.compile(model)
    keys = list(Model().state_dict())
    assert list(lrcompile.original_state_dict(compiled)) == keys
    dense = Model()
    assert list(lrcompile.original_state_dict(dense)) == keys
    with torch.device("meta"):
        shapes = Model()
    assert all(t.is_meta for t in lrcompile.original_state_dict(adopted(shapes)).values())


def test_a_key_that_only_looks_like_extra_state() -> None:
    model = Model()
    model.register_buffer("my_extra_state", torch.ones(2))
    adopted(model)
    assert "my_extra_state" in lrcompile.original_state_dict(model)
    again = Model()
    again.register_buffer("my_extra_state", torch.zeros(2))
    state = model.state_dict()
    lrcompile.adopt_like(again, state).load_state_dict(state)
    assert again.my_extra_state.all()  # type: ignore[operator,union-attr]


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adopted(Model(dtype=dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(*IDS).float().square().mean().backward()
    optimizer.step()
    lrcompile.save(model, tmp_path / "deep" / "saved")
    fresh = Model(dtype=dtype)
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
        lrcompile.save(adopted(include=("*", "head")), tmp_path / "saved")
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
    model = adopted(include=include)
    model.up.weight_b.requires_grad_(True)
    lrcompile.save(model, tmp_path / "saved")
    with torch.device("meta"):
        shapes = Model()
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
    class Rotary(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    lrcompile.save(adopted(Rotary()), tmp_path / "saved")
    lrcompile.load(tmp_path / "saved", Rotary())
    with torch.device("meta"):
        shapes = Rotary()
    refused(tmp_path / "saved", shapes, "table is a buffer on the meta device")


def test_compiled_models(tmp_path: Path) -> None:
    model = adopted()
    compiled: Any = torch.compile(model)
    lrcompile.save(compiled, tmp_path / "outer")
    target: Any = torch.compile(Model())
    assert lrcompile.load(tmp_path / "outer", target) is target
    assert torch.equal(target._orig_mod(*IDS), model(*IDS))
    model.up = torch.compile(model.up)
    lrcompile.save(model, tmp_path / "inner")
    assert "_orig_mod" not in (tmp_path / "inner" / "lrcompile.json").read_text()
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = Model()
        fresh.up = torch.compile(fresh.up)  # type: ignore[assignment]
        lrcompile.load(tmp_path / "inner", fresh)
        assert fresh.side.weight_a is fresh.up._orig_mod.weight_a  # type: ignore[union-attr]


def test_saving_again_replaces(tmp_path: Path) -> None:
    lrcompile.save(adopted(), tmp_path / "saved")
    second = adopted(rank=6)
    lrcompile.save(second, tmp_path / "saved")
    assert torch.equal(lrcompile.load(tmp_path / "saved", Model())(*IDS), second(*IDS))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "empty").mkdir()
    lrcompile.save(second, tmp_path / "empty")


def test_saving_into_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lrcompile.save(adopted(), ".")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    lrcompile.load(tmp_path / "here", Model())


def test_loading_and_saving_over_itself(tmp_path: Path) -> None:
    lrcompile.save(adopted(), tmp_path / "saved")
    with torch.device("meta"):
        shapes = Model()
    again = lrcompile.load(tmp_path / "saved", shapes)  # its tensors may be mapped from the very file
    y = again(*IDS)
    lrcompile.save(again, tmp_path / "saved")
    assert torch.equal(again(*IDS), y) and torch.equal(lrcompile.load(tmp_path / "saved", Model())(*IDS), y)


# --- what is not saved ------------------------------------------------------------------------------------------------


def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    model = adopted()
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
    lrcompile.load(tmp_path / "ours", Model())  # what lies beside doesn't matter
    lrcompile.load(tmp_path / "link", Model())


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"anything": object()}

    odd = Model()
    odd.up = Odd(WIDTH, 48)
    with torch.device("meta"):
        shapes = Model()
    for model, said in [
        (Model(), "not adopted"),
        (adopted(shapes), "on the meta device and holds no values"),
        (adopted(odd), "up._extra_state of the state is no tensor"),
    ]:
        with pytest.raises(StateError, match=said):
            lrcompile.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# --- what is not loaded -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state") / "saved"
    lrcompile.save(adopted(), folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((saved / name).read_bytes())
    lrcompile.load(folder, Model())
    return folder


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused(name: str, copied: Path) -> None:
    whole, model = (copied / name).read_bytes(), Model()
    for size in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
        (copied / name).write_bytes(whole[:size])
        refused(copied, model, f"{name} is truncated")
    (copied / name).write_bytes(whole + b"\0")
    refused(copied, model, f"{name} is truncated")
    (copied / name).unlink()
    refused(copied, model, f"{name}")
    (copied / name).mkdir()
    refused(copied, model, f"{name}")


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_refused(name: str, copied: Path) -> None:
    whole, model = (copied / name).read_bytes(), Model()
    places = [*range(64), *range(64, len(whole), max(1, len(whole) // 150)), len(whole) - 1]
    ignored = 0
    for place in places:
        byte = bytes([whole[place] ^ 0x11])
        (copied / name).write_bytes(whole[:place] + byte + whole[place + 1 :])
        refused(copied, model, "altered|truncated|not saved by this version|lacks a part|can't be read")
        ignored += 1
    assert ignored == len(places)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """An attacker's index: altered, its checksum made right again."""
    index = json.loads((folder / "lrcompile.json").read_text())
    change(index)
    index["checksum"] = state_module._checksum(index)
    (folder / "lrcompile.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.update(format="lrcompile-model/99"),
        lambda i: i.update(plan="{}"),
        lambda i: i.update(plan=3),
        lambda i: i.update(plan=i["plan"].replace('"rank": 4', '"rank": 5')),
        lambda i: i.update(aliases=[]),
        lambda i: i.update(aliases={"up.weight_a": "nobody"}),
        lambda i: i.update(aliases={}),
        lambda i: i["aliases"].update(surprise="scale"),
        lambda i: i.update(bytes="many"),
        lambda i: i.update(sha256=None),
        *[lambda i, k=k: i.pop(k) for k in ("format", "sha256", "bytes", "aliases", "plan")],
    ],
)
def test_a_forged_index_is_refused(change: Any, copied: Path) -> None:
    rewritten(copied, change)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Model()
        refused(copied, model, str(copied))


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{}", "\x00", '{"format": "lrcompile-model/1"}'])
def test_an_index_that_is_none(text: str, copied: Path) -> None:
    (copied / "lrcompile.json").write_text(text)
    refused(copied, Model(), "altered|truncated|not saved by this version")
    (copied / "lrcompile.json").write_bytes(b"\xff\xfe\x00")
    refused(copied, Model(), "truncated or altered")


def test_other_directories_and_other_models_are_refused(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", Model(), "there is no directory")
    refused(tmp_path, Model(), "was not saved by lrcompile: it has no lrcompile.json")
    refused(saved / "model.safetensors", Model(), "there is no directory")
    refused(saved, Model(hidden=64), r"another model: 'up.weight' is \(48, 32\) there, \(64, 32\) here")
    refused(saved, Model(tie=False), "another model:.* tied")
    refused(saved, nn.Linear(3, 3), "another model")
    more, less, other = Model(), Model(), Model()
    more.register_buffer("extra", torch.zeros(2))
    del less.scale
    other.scale = torch.zeros(7)
    for model, said in [(more, "'extra' is missing there"), (less, "'scale'.*missing here"), (other, "'scale' is")]:
        refused(saved, model, f"another model: {said}")


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> tuple[Any, Any]:
    return adopted(), adopted(rank=6)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("where", ["save_file", "rename1", "rename2", "fsync1", "fsync2", "fsync3", "chmod", "write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_what_was(
    where: str,
    error: BaseException,
    earlier: bool,
    two: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, (first, second) = tmp_path / "saved", two
    if earlier:
        lrcompile.save(first, target)
    elif where == "rename2":
        pytest.skip("one rename is enough where nothing stands")
    count = int(where[-1]) if where[-1].isdigit() else 1
    name = where.rstrip("123")
    owner: Any = {"save_file": state_module, "write": Path}.get(name, os)
    attribute = "write_text" if name == "write" else name
    real, calls = getattr(owner, attribute), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            if name == "save_file":  # half a file
                Path(args[1]).write_bytes(b"\0" * 100)
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, failing)
        with pytest.raises(type(error)):
            lrcompile.save(second, target)
    assert [p.name for p in tmp_path.iterdir()] == (["saved"] if earlier else [])
    if earlier:
        assert torch.equal(lrcompile.load(target, Model())(*IDS), first(*IDS))
    lrcompile.save(second, target)
    assert torch.equal(lrcompile.load(target, Model())(*IDS), second(*IDS))


def test_dying_between_the_two_renames_tells_where_the_earlier_save_is(
    two: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, (first, second) = tmp_path / "saved", two
    lrcompile.save(first, target)
    renames, real = iter(range(9)), os.rename

    def rename(a: Any, b: Any) -> None:
        if next(renames):  # dead after the first: nothing more happens on the disk
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(state_module.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            lrcompile.save(second, target)
    with pytest.raises(StateError, match="interrupted between two renames") as error:
        lrcompile.load(target, Model())
    kept = re.search(r"whole in (\S+)$", str(error.value))
    assert kept and torch.equal(lrcompile.load(kept[1], Model())(*IDS), first(*IDS))


KILLED = """
import sys, torch, lrcompile
model = torch.load(sys.argv[2], weights_only=False)
n = 0
while True:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(n)
    lrcompile.save(model, sys.argv[1])
    if n == 0:
        print("ready", flush=True)
    n += 1
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    target, pickled = tmp_path / "saved", tmp_path / "model.pt"
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    torch.save(lrcompile.adopt(model, Recipe(rank=64), (torch.zeros(1, 256),)), pickled)

    def load() -> None:
        model = lrcompile.load(target, nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]))
        values = {v.item() for p in model.parameters() for v in (p.min(), p.max())}
        assert len(values) == 1, values  # every tensor of one and the same save

    for delay in (0.0, 0.023):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(target), str(pickled)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.05 + delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if not target.exists():  # between the two renames: the earlier one is whole beside it
            with pytest.raises(StateError, match="interrupted") as error:
                load()
            os.rename(str(error.value).rpartition(" ")[2], target)
        assert tuple(sorted(p.name for p in target.iterdir())) == FILES
        load()


def test_the_saved_plan_is_whole(saved: Path) -> None:
    plan = lrcompile.Plan.from_json(json.loads((saved / "lrcompile.json").read_text())["plan"])
    plan.check(Model())
    assert {n for e in plan.pairs for n in e.names} == {
        "attn.in_proj_weight", "attn.out_proj.weight", "up.weight", "side.weight", "down.weight", "again.weight",
    }  # fmt: skip
    model: Any = lrcompile.load(saved, Model())
    assert isinstance(model.up, PairedModule) and all(0 < e.error < 1 for e in plan.pairs if e.error is not None)
