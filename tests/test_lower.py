"""What the last pass says of how each site is computed."""

from __future__ import annotations

import torch

from lrcompile import Recipe

from .helpers import ALL, Stack, run


def test_lower_tells_every_pair_and_its_rank():
    captured, _, stages = run(Stack(), (torch.randn(3, 32),), ALL, Recipe(rank=3))
    assert len(stages[-1].result.changed) == 4
    assert "blocks.0.up: two thin linears of rank 3 (cpu)" in stages[-1].result.changed
