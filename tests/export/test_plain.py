"""What exporting does before ExecuTorch comes in, and the dense directory: needs transformers alone."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import ExportError
from lrcompile.export.budget import too_large, weigh
from lrcompile.export.dense import export_factored, export_hf
from lrcompile.export.quantise import GROUP, best_scales
from lrcompile.export.unfold import Pair, unfold
from lrcompile.weights.layers import AdoptedModule

from .helpers import IDS, tiny

pytest.importorskip("transformers", reason="the models are transformers'")
from transformers import AutoModelForCausalLM  # noqa: E402

from lrcompile.tasks.model import load_weights  # noqa: E402

# Logits here are at most 1.4, where float32 has steps of 1.2e-7: three of them. No difference was seen of plain linears, and
# 1.5e-7 of a merged directory; other processors may sum in other orders.
ROUNDING = 4e-7


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval().requires_grad_(False)


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("build", [tiny, lambda: lrcompile.adopt(gpt2(), lrcompile.Recipe(rank=16), IDS)])
def test_pairs_become_two_plain_linears(build: Any, multiple: int) -> None:
    model = build().requires_grad_(False)
    want = model(**IDS).logits
    adopted = [name for name, m in model.named_modules() if isinstance(m, AdoptedModule)]
    unfold(model, multiple=multiple)
    torch.testing.assert_close(model(**IDS).logits, want, rtol=0, atol=ROUNDING)
    pairs = {name: m for name, m in model.named_modules() if isinstance(m, Pair)}
    assert list(pairs) == adopted and len(adopted) >= 4
    assert {pair.down.out_features for pair in pairs.values()} == {16 if multiple == 1 else 32}
    assert not any(isinstance(m, AdoptedModule) or type(m).__name__ == "Conv1D" for m in model.modules())


@pytest.mark.parametrize(
    "recipe",
    [
        lrcompile.Recipe(weights="dense", rank=4, init="zero"),
        lrcompile.Recipe(factors="int8", rank=32),
        lrcompile.Recipe(weights="int8"),
    ],
    ids=["base and pair", "quantised pair", "base alone"],
)
def test_other_forms_become_plain_linears(recipe: lrcompile.Recipe) -> None:
    pytest.importorskip("torchao", reason="the formats are torchao's")
    model = lrcompile.adopt(tiny(adopted=False).requires_grad_(False), recipe, IDS).requires_grad_(False)
    want = model(**IDS).logits
    unfold(model)
    torch.testing.assert_close(model(**IDS).logits, want, rtol=0, atol=ROUNDING)
    assert any(isinstance(m, Pair) for m in model.modules()) == (recipe.factors is not None)
    assert {type(m) for m in model.modules() if hasattr(m, "weight") and m.weight.dim() == 2} == {
        nn.Linear,
        nn.Embedding,
    }


def test_a_dense_gpt2_has_plain_linears_too() -> None:
    model = gpt2()
    want = model(**IDS).logits
    torch.testing.assert_close(unfold(model)(**IDS).logits, want, rtol=0, atol=ROUNDING)
    assert sum(type(m) is nn.Linear for m in model.modules()) == 5


def test_what_a_file_weighs() -> None:
    model = unfold(tiny())
    numbers = sum(m.weight.numel() for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head")
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert weigh(model, "none") == (4 * numbers, 4 * (128 * 64 + norms))
    assert weigh(model, "int8").rest == 128 * 64 + 4 * 128 + 4 * norms
    assert weigh(unfold(tiny(), multiple=32), "8da4w").linears > numbers / 2


def test_what_would_fit_is_told() -> None:
    model = unfold(tiny(), multiple=32)
    int8, int4 = weigh(model, "int8"), weigh(model, "8da4w")
    told = too_large(model, "int8", int4.total + 10, int8.total)
    assert f"{(int8.total - int4.total - 10) / 1e3:.2g}" in told and "--quantise 8da4w" in told
    told = too_large(model, "8da4w", int4.rest + int4.linears // 2, int4.total)
    assert "compressed 2.00x more" in told
    assert "smaller model" in too_large(model, "8da4w", int4.rest // 2, int4.total)


def test_only_what_can_be_done_is_recommended() -> None:
    """Groups of 32 inputs don't divide 100; ranks of 16 are filled up, and weigh what they will then."""
    model = unfold(tiny(adopted=False, intermediate_size=100))
    have = weigh(model, "int8")
    told = too_large(model, "int8", have.rest + have.linears // 2, have.total)
    assert "8da4w" not in told and "in int8, linears compressed 2.00x more" in told
    assert "in int8: choose a smaller model" in too_large(model, "int8", have.rest // 2, have.total)
    assert "8da4w" not in too_large(model, "none", have.rest // 2, weigh(model, "none").total)
    adopted = tiny()
    filled, model = unfold(copy.deepcopy(adopted), multiple=32), unfold(adopted)
    assert weigh(model, "8da4w") == weigh(filled, "8da4w")
    told = too_large(model, "int8", weigh(filled, "8da4w").total, weigh(model, "int8").total)
    assert "--quantise 8da4w makes it" in told


def test_four_bit_scales_have_the_least_error_of_those_tried() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    weight[0, :32] = 0
    weight[1, :32] = torch.arange(-8, 24).clamp(-8, 7) / 4  # held to the bit by the scale that clamps nothing
    groups = weight.unflatten(-1, (-1, GROUP))
    widest = (groups.abs().amax(-1) / 7.5).clamp(min=1e-7)
    widest[1, 0] = 0.25

    def errors(scale: torch.Tensor) -> torch.Tensor:
        codes = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
        return (groups - codes * scale.unsqueeze(-1)).square().sum(-1)

    scale = best_scales(weight, widest)
    assert (
        torch.equal(scale.bfloat16().float(), scale)
        and bool((scale > 0).all())
        and bool((scale <= widest * 1.11).all())
    )
    ours, plain = errors(scale), errors(widest.bfloat16().float())
    assert bool((ours <= plain).all()) and ours[0, 0] == ours[1, 0] == 0 and scale[1, 0] == 0.25
    assert ours[2:].sum() < 0.9 * plain[2:].sum()


def test_dense_directory(tmp_path: Path) -> None:
    model = tiny()
    want = model(**IDS).logits
    written = export_hf(copy.deepcopy(model), None, tmp_path / "dense")
    assert written == sum(f.stat().st_size for f in (tmp_path / "dense").iterdir()) > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(**IDS).logits, want, rtol=0, atol=ROUNDING)
    with pytest.raises(ExportError, match="is there already"):
        export_hf(model, None, tmp_path / "dense")


def test_factored_directory(tmp_path: Path) -> None:
    """Its own load.py loads it, to the bit, and nothing in it is code that transformers would be asked to trust."""
    model, folder = tiny(), tmp_path / "pairs"
    written = export_factored(model, None, folder)
    assert written == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) > 0
    again = runpy.run_path(str(folder / "load.py"))["model"]
    assert [n for n, m in again.named_modules() if isinstance(m, AdoptedModule)]
    torch.testing.assert_close(again(**IDS).logits, model(**IDS).logits, rtol=0, atol=0)
    loaded = load_weights(str(folder))  # as `lrcompile eval` and `export` do, without --base
    torch.testing.assert_close(loaded(**IDS).logits, model(**IDS).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="config.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ExportError, match="is there already"):
        export_factored(model, None, folder)
    with pytest.raises(ExportError, match="nothing in this model is factored"):
        export_factored(tiny(adopted=False), None, tmp_path / "other")


def test_without_executorch(tmp_path: Path) -> None:
    """The extra is named, before a model is loaded; and importing lrcompile imports none of it."""
    code = f"""
import sys
sys.modules["executorch"] = None  # as if it were not installed
import lrcompile
assert not any(name.split(".")[0] in ("torchao", "transformers") for name in sys.modules)
from lrcompile.errors import MissingLibraryError
from lrcompile.cli import _parser
args = _parser().parse_args(["export", "nowhere", "--to", "executorch", {str(tmp_path / "a.pte")!r}])
try:
    args.run(args)
except MissingLibraryError as error:
    assert "lrcompile[executorch]" in str(error), error
else:
    raise SystemExit("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
