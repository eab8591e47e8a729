"""Calibration: what goes into every linear weight while the model runs, as its second moment Σ x xᵀ.

The graphs that Dynamo makes of the model are brought into canonical form, and before every product a node is written
that adds xᵀ x to a total. It gets the weight itself as an operand, in the bodies of higher-order ops too: Dynamo enters
one compiled graph with several blocks' parameters, so which weight it is only the very call tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import CaptureError, LrcompileError, PlanError
from lrcompile.graph.capture import (
    Capture,
    CapturedGraph,
    Inputs,
    cause,
    check_signature,
    check_torch,
    split_inputs,
    traced,
)
from lrcompile.graph.names import parameter_names
from lrcompile.graph.pipeline import bind_weights, run_passes
from lrcompile.passes import PassContext, Weight, canonicalize
from lrcompile.passes.chains import is_written, target_name, value
from lrcompile.passes.graphs import Site, sites
from lrcompile.recipe import Recipe
from lrcompile.weights.layers import plainly
from lrcompile.weights.planner import check_globs, refuse_adopted

# Views of the same rows, as long as the last axis stays.
_RESHAPES = {"view", "reshape", "flatten", "contiguous", "unsqueeze"}


def covariances(model: nn.Module, batches: Iterable[Inputs], recipe: Recipe | None = None) -> dict[str, Tensor]:
    """The uncentred second moments of the inputs of the model's linear weights.

    The model runs without gradients, in the mode it is in (`model.eval()` is the caller's to say), once over the
    batches; its buffers and the random state are as before afterwards. Every row of an input counts, padding too: leave
    it out of the batches where that matters.

    Args:
        model: with its weights, on any device but `meta`.
        batches: each a tuple of positional arguments or a dict of keyword arguments, as the model is called.
        recipe: whose include and exclude say which weights; all of them where left out.

    Returns:
        weight -> Σ x xᵀ, (in_features, in_features), on the device of its inputs, float32 (float64 for float64 inputs).
        A weight is called by the first of its names, as in a Plan. Weights that always read the same inputs (q, k and v)
        have one tensor together. A weight used several times has the sum over its uses, those with the matrix the same
        way round as the first, and with all of its in_features; one that no batch reaches is not in it.

    Raises:
        CaptureError: no batch, one that doesn't fit or has NaN or Inf in it (its index is told, and the weight), a
            model on `meta`.
        PlanError: a glob that matches nothing, a model that multiplies with no weight.
        AdoptError: the model is adopted already.
    """
    check_torch()
    plain = getattr(model, "_orig_mod", model)
    refuse_adopted(plain)
    if any(p.is_meta for p in plain.parameters()):
        raise CaptureError(
            f"{type(plain).__name__} is on the meta device, and calibration computes: load its weights first"
        )
    if isinstance(batches, Tensor) or hasattr(batches, "keys"):
        raise CaptureError(f"batches is one {type(batches).__name__}; give a list of them: [batch]")
    recipe = recipe or Recipe()
    check_globs(plain, recipe)
    totals = _Totals(plain, recipe)
    index = -1
    with torch.no_grad(), traced(plain, totals.backend) as run:
        for index, batch in enumerate(batches):
            try:
                args, kwargs = split_inputs(batch)
                check_signature(plain, args, kwargs)
                run(*args, **kwargs)
            except LrcompileError as error:
                raise type(error)(f"calibration batch {index}: {error}") from error
            except Exception as error:
                raise CaptureError(
                    f"{type(plain).__name__} could not be run with calibration batch {index}: {cause(error)}. Pass the "
                    "batches as the model is called: each a tuple of positional or a dict of keyword arguments."
                ) from error
            totals.check(index)
    if index < 0:
        raise CaptureError("there is no calibration batch; give at least one (a generator gives its batches only once)")
    if not totals.sums:
        raise PlanError(f"{type(plain).__name__} multiplies with none of the weights asked for; nothing to calibrate")
    return totals.by_name()


Uses = tuple[tuple[int, int], ...]  # (id(parameter), how often), of all weights that read one x


class _Totals:
    """The sums so far: one for each set of weights that read the same x, so that q, k and v share one."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.names = parameter_names(model)
        self.wanted = {id(p): self.names[id(p)][0] for p in model.parameters() if self._asked_for(p, recipe)}
        self.sums: dict[tuple[Uses, torch.dtype], Tensor] = {}
        self.stored_in_out: dict[int, bool] = {}  # as the first use has it

    def _asked_for(self, p: nn.Parameter, recipe: Recipe) -> bool:
        weight = Weight(self.names[id(p)], tuple(p.shape), p.dtype)
        included = any(map(weight.matches, recipe.include)) and not any(map(weight.matches, recipe.exclude))
        return p.dim() == 2 and included

    def backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's: the graph with its additions written in, run as it is."""
        graph = CapturedGraph(gm, list(inputs), last=False)
        ctx = PassContext(Recipe())
        bind_weights([graph], self.names, ctx)
        run_passes(Capture([graph], {}), [canonicalize], ctx)
        together: dict[Any, list[Site]] = {}
        for site in sites(gm):
            if site.kind != "embedding" and site.chain.source.op == "placeholder":
                together.setdefault(_rows(site), []).append(site)
        for readers in together.values():
            first = readers[0]
            leaves, turned = [s.chain.source for s in readers], [s.chain.transposed for s in readers]
            with first.scope.gm.graph.inserting_before(first.node):
                first.scope.gm.graph.call_function(self.add, (first.x, leaves, turned))
        for scope_gm in {id(s.scope.gm): s.scope.gm for readers in together.values() for s in readers}.values():
            scope_gm.recompile()
        return gm.forward

    def add(self, x: Tensor, leaves: list[Tensor], turned: list[bool]) -> None:
        """Called in the graphs: these weights are multiplied with x, (..., in_features)."""
        uses: Counter[int] = Counter()
        for leaf, stored_in_out in zip(leaves, turned, strict=True):
            key = id(leaf)
            if key not in self.wanted or x.shape[-1] != leaf.shape[0 if stored_in_out else 1]:
                continue
            if self.stored_in_out.setdefault(key, stored_in_out) == stored_in_out:
                uses[key] += 1
        if not uses or not x.numel():
            return
        with plainly(x):
            rows = x.detach().reshape(-1, x.shape[-1])
            rows = rows if rows.dtype == torch.float64 else rows.float()
            place = tuple(uses.items()), rows.dtype
            if place not in self.sums:
                self.sums[place] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.sums[place].addmm_(rows.T, rows)

    def check(self, batch: int) -> None:
        """Raise CaptureError where a batch has brought NaN or Inf into a total: they show on its diagonal."""
        for (uses, _), total in self.sums.items():
            if not torch.isfinite(total.diagonal()).all():
                raise CaptureError(
                    f"calibration batch {batch} brings NaN, Inf or numbers whose squares overflow into the inputs of "
                    f"{self.wanted[uses[0][0]]}: leave it out, or look at what the model makes of it"
                )

    def by_name(self) -> dict[str, Tensor]:
        """A tensor for every weight; the same one for those with the same uses."""
        made: dict[Any, Tensor] = {}
        found = {}
        for key, name in self.wanted.items():
            parts = [(k, n) for k in self.sums for i, n in k[0] if i == key]
            if not parts:
                continue
            if parts == [(parts[0][0], 1)]:
                found[name] = self.sums[parts[0][0]]
            else:
                if tuple(parts) not in made:
                    made[tuple(parts)] = sum(self.sums[k] * n for k, n in parts)  # type: ignore[assignment]
                found[name] = made[tuple(parts)]
        return found


def _rows(site: Site) -> Any:
    """What tells the rows that a site reads from others': the node they come from, before any reshaping of it."""
    x = site.x
    if is_written(x):
        return site.node  # another site may read other numbers there
    while x.op in ("call_method", "call_function") and target_name(x) in _RESHAPES and isinstance(x.args[0], fx.Node):
        before, after = value(x.args[0]), value(x)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dim() == 0:
            break
        if before.shape[-1] != after.shape[-1] or is_written(x.args[0]):
            break
        x = x.args[0]
    return x
