"""A share of what finetuning changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompile
from lrcompile.errors import ExportError
from lrcompile.export.blend import blend
from lrcompile.weights.layers import AdoptedModule

from .helpers import IDS, run, tiny

pytest.importorskip("transformers", reason="the models are transformers'")
from transformers import AutoModelForCausalLM  # noqa: E402

# Numbers are up to 1.3 (norms), where float32 has steps of 1.2e-7: two of them, for a sum and a product.
STEPS = 2.4e-7


def moved(model: Any) -> Any:
    """Every trained number somewhere else, as if it had been finetuned."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p), alpha=0.05)
    return model


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_share_of_every_change(strength: float) -> None:
    untuned = tiny(adopted=False)
    tuned = moved(copy.deepcopy(untuned))
    before, after = (dict(m.named_parameters()) for m in (untuned, copy.deepcopy(tuned)))
    made = blend(tuned, untuned, strength)
    assert made is tuned and made.lm_head.weight is made.model.embed_tokens.weight
    for name, p in made.named_parameters():
        torch.testing.assert_close(p, before[name] + strength * (after[name] - before[name]), rtol=0, atol=STEPS)


def test_pairs_beside_bases_are_merged_first() -> None:
    untuned = tiny(adopted=False)
    tuned = lrcompile.adopt(copy.deepcopy(untuned), lrcompile.Recipe(weights="dense", rank=4, init="zero"), IDS)
    moved(tuned)
    whole = lrcompile.original_state_dict(tuned)
    made = blend(tuned, untuned, 0.5)
    assert not any(isinstance(m, AdoptedModule) for m in made.modules())
    for name, p in untuned.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), (p + whole[name]) / 2, rtol=0, atol=STEPS)


def test_the_wider_dtype_is_kept() -> None:
    untuned = tiny(adopted=False)
    tuned = moved(copy.deepcopy(untuned)).to(torch.bfloat16)
    assert blend(tuned, untuned, 0.5).lm_head.weight.dtype == torch.float32


def test_what_cant_be_blended() -> None:
    untuned = tiny(adopted=False)
    for strength in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ExportError, match="above 0, and 1 at most"):
            blend(copy.deepcopy(untuned), untuned, strength)
    with pytest.raises(ExportError, match=r"self_attn.q_proj.* is a pair alone.*blend the finetuned model first"):
        blend(tiny(), untuned, 0.5)
    with pytest.raises(
        ExportError, match=r"mlp.gate_proj.weight: the model has \(96, 64\) and the untuned one has \(80"
    ):
        blend(copy.deepcopy(untuned), tiny(adopted=False, intermediate_size=80), 0.5)
    with pytest.raises(ExportError, match=r"layers.1.*: the model has none and the untuned one has"):
        blend(copy.deepcopy(untuned), tiny(adopted=False, layers=2), 0.5)


def test_the_command(tmp_path: Path) -> None:
    untuned = tiny(adopted=False)
    untuned.save_pretrained(tmp_path / "untuned")
    moved(copy.deepcopy(untuned)).save_pretrained(tmp_path / "tuned")
    given = [tmp_path / "tuned", "--to", "hf"]
    assert run("export", *given, tmp_path / "milder", "--untuned", tmp_path / "untuned") == 0
    read = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("untuned", "tuned", "milder")]
    for one, other, between in zip(*(model.parameters() for model in read), strict=True):
        torch.testing.assert_close(between, (one + other) / 2, rtol=0, atol=STEPS)
    with pytest.raises(ExportError, match="--strength goes with --untuned"):
        run("export", *given, tmp_path / "x", "--strength", "0.5")
    with pytest.raises(ExportError, match="strength=2.0: must be above 0"):
        run("export", "nowhere", "--to", "hf", tmp_path / "x", "--untuned", "nowhere", "--strength", "2")
    with pytest.raises(ExportError, match="leave one of them out"):
        run("export", *given, tmp_path / "x", "--untuned", tmp_path / "untuned", "--factored")
    lrcompile.save(tiny(), tmp_path / "pairs")
    with pytest.raises(ExportError, match="--untuned takes the dense model"):
        run("export", *given, tmp_path / "x", "--untuned", tmp_path / "pairs")
    assert not (tmp_path / "x").exists()
