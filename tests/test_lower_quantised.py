"""What the inspection says of quantised sites: the operator, which implementation it takes, and the predicted times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import Recipe

FORMS = {
    "quant_linear": {"weights": "nf4", "trainable": []},
    "quant_lowrank_linear": {"weights": "nf4", "rank": 16},
    "lowrank_quant_linear": {"rank": 64, "factors": "int8", "trainable": []},
}


@pytest.mark.parametrize("op", FORMS)
def test_every_site_is_told(op: str):
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 9)).to(
        torch.bfloat16
    )
    x = (torch.randn(4, 256, dtype=torch.bfloat16),)
    here = lrcompile.inspect(model, x, Recipe(**FORMS[op]))["lower"].changed
    assert here == [f"{i}: lrcompile::{op}, decoded into a temporary, library products (cpu)" for i in (0, 2)]
    there = lrcompile.inspect(model, x, Recipe(**FORMS[op]), target="H100")["lower"].changed
    assert len(there) == 2
    for line in there:
        assert (
            f"lrcompile::{op}, decoded in" in line and "predicted for H100" in line and "gemms" in line and "µs" in line
        )
    assert any("decoded inside the product" in line for line in there)
