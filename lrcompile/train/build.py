"""The model of a run: planned, adopted on the `meta` device, and where its first values will come from."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompile.errors import TrainError
from lrcompile.recipe import CALIBRATED, Recipe
from lrcompile.sources import load_source
from lrcompile.train.language import blocks, check_decoder, check_length, example
from lrcompile.train.values import Drawn, Held, Values, parameters_on_meta
from lrcompile.weights.adopt import adopt
from lrcompile.weights.plan import Plan
from lrcompile.weights.planner import plan


@dataclass
class Built:
    """A model that is still to be given its values.

    Attributes:
        model: adopted, its parameters on `meta`, its buffers real, on the CPU.
        plan: what was decided; None for a model that stays dense.
        values: the dense values that it starts from.
        blocks: names of the layers that are sharded, compiled and recomputed one by one.
    """

    model: nn.Module
    plan: Plan | None
    values: Values
    blocks: list[str]


def build(
    source: str,
    recipe: Recipe | None,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    length: int = 32,
    seed: int = 0,
) -> Built:
    """Build a model of a source, plan it and adopt the Plan, all without its values.

    Args:
        source: as for the command line (`lrcompile.sources`): a config.json is drawn from the seed; a directory, GGUF file
            or module:factory gives values, which every rank holds on its CPU until they are handed out.
        recipe: None leaves the model dense.
        dtype: of the parameters.
        attention: transformers' name of an implementation, such as "sdpa".
        length: tokens of the example that is captured.
        seed: of drawn values; and set before module:factory is called.

    Raises:
        TrainError: a recipe that looks at data for a model without weights, an encoder-decoder, a model with too few positions
            for `length`, or a factory's model without values.
    """
    torch.manual_seed(seed)
    dense, _ = load_source(source)
    drawn = any(p.is_meta for p in dense.parameters())
    check(dense, source, recipe, length=length, drawn=drawn)
    _settle(dense, dtype, attention)
    names = blocks(dense)
    if drawn and not Path(source).is_file():
        raise TrainError(
            f"{source} gives a model on the meta device, and nothing tells its values: return it with values, on the CPU (only a "
            "transformers config.json is drawn from the seed)"
        )
    the_plan = None if recipe is None else plan(dense, example(dense, length), recipe)
    if drawn:
        model = _with_buffers(Path(source), dtype, attention)
        values: Values = Drawn(copy.deepcopy(model), names, seed)
    else:
        model, values = _on_meta(dense), Held(dense, names)
    if the_plan is not None:
        adopt(model, the_plan)
    return Built(model, the_plan, values, names)


def check(model: nn.Module, source: str, recipe: Recipe | None, *, length: int, drawn: bool) -> None:
    """Raise TrainError for a dense model that can't be trained as asked; `drawn` is one of a source without weights."""
    check_decoder(model)
    check_length(model, length)
    if drawn and recipe is not None and recipe.start in CALIBRATED:
        raise TrainError(
            f"init={recipe.start!r} keeps what a trained model makes of data, and {source} has no weights: choose another start"
        )


def _settle(model: Any, dtype: torch.dtype, attention: str | None) -> None:
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    if attention is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)


def _with_buffers(config: Path, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The model of a transformers config with its parameters on `meta` and its buffers real."""
    drawing = importlib.import_module("transformers.initialization")
    with parameters_on_meta(), drawing.no_init_weights():
        model: Any = load_source(str(config), device=None)[0]
    model.tie_weights()
    _settle(model, dtype, attention)
    assert isinstance(model, nn.Module)
    return model


def _on_meta(model: nn.Module) -> nn.Module:
    """A twin without the parameters' values; its buffers are copies."""
    # A parameter on meta for each, ties kept; deepcopy takes what the memo has instead of copying.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
