"""One stage of the pipeline and what can be said of it: code, diff, costs, error. Computed when asked for, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import PassError
from lrcompile.graph import measure, readable
from lrcompile.graph.capture import Capture, CapturedGraph
from lrcompile.graph.names import plain_name
from lrcompile.graph.pipeline import Snapshot
from lrcompile.passes import PassContext
from lrcompile.passes.chains import value
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.make import computed
from lrcompile.weights.planner import entry_of


class World:
    """What the stages are measured with: the inputs of the graphs, the model's parameters, the leaves (computed once)."""

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        ctx: PassContext,
        measurable: bool,
        covariances: Mapping[str, torch.Tensor],
    ) -> None:
        self.ctx, self.measurable, self._make = ctx, measurable, computed(ctx.recipe.to_dict(), covariances)
        named = list(model.named_parameters(remove_duplicate=False))
        self.parameters = {plain_name(name): p for name, p in named}
        called = {id(t): plain_name(name) for name, t in reversed([*model.named_buffers(), *named])}
        # By name: passes may add inputs, and copies of a graph keep the names of those it had.
        self.given = [dict(zip([n.name for n in g.placeholders], g.inputs, strict=True)) for g in captured.graphs]
        self.called = [{name: called[id(x)] for name, x in given.items() if id(x) in called} for given in self.given]
        self.position = {id(g): i for i, g in enumerate(captured.graphs)}
        self._made: dict[str, tuple[dict[str, torch.Tensor], float | None]] = {}
        self._numbers = {
            id(leaf): form.numbers_in(suffix)
            for module in model.modules()
            if isinstance(module, AdoptedModule)
            for name, form in module.lr_forms
            for suffix, leaf in module.lr_parts(name).items()
        }

    def size(self, held: Any, leaf: tuple[str, str] | None = None) -> tuple[int, int]:
        """(numbers, bytes) of a parameter, or of what is to be a leaf: (weight, suffix)."""
        form = self.ctx.weights[leaf[0]].form(self.ctx.recipe) if leaf else None
        numbers = form.numbers_in(leaf[1]) if leaf and form else self._numbers.get(id(held), held.numel())
        return numbers, held.numel() * held.element_size()

    def made(self, key: str) -> tuple[dict[str, torch.Tensor], float | None]:
        """The leaves of a weight by suffix, and its relative error."""
        if key not in self._made:
            entry = entry_of(self.ctx.weights[key], self.ctx.recipe)
            with torch.no_grad():
                self._made[key] = self._make(self.parameters[key], entry)
        return self._made[key]

    def matrix(self, key: str) -> torch.Tensor:
        """A weight as (out_features, in_features)."""
        matrix = self.parameters[key].detach()
        return matrix.T if self.ctx.weights[key].stored_in_out else matrix

    def values(self, graph: CapturedGraph, gm: fx.GraphModule) -> list[Any]:
        """The inputs to run a graph with at any stage."""
        return self.inputs(self.position[id(graph)], gm)

    def inputs(self, index: int, gm: fx.GraphModule) -> list[Any]:
        """The same, by the graph's position."""
        out = []
        for node in gm.graph.find_nodes(op="placeholder"):
            if node.name in self.given[index]:
                out.append(self.given[index][node.name])
            elif "lr_leaf" in node.meta:
                key, suffix = node.meta["lr_leaf"]
                leaf = self.made(key)[0][suffix]
                # A parameter, as in the adopted model: what counts as one mustn't depend on the stage.
                out.append(nn.Parameter(leaf, requires_grad=value(node).requires_grad))
            else:
                raise PassError(f"input {node.name!r} of the graph was added by a pass and has no value to run it with")
        return out

    def names(self, index: int, gm: fx.GraphModule) -> dict[str, str]:
        """Placeholder -> the model's name for it."""
        leaves = {n.name: n.meta["lr_leaf"] for n in gm.graph.find_nodes(op="placeholder") if "lr_leaf" in n.meta}
        return self.called[index] | {name: key + suffix for name, (key, suffix) in leaves.items()}


@dataclass
class Stage:
    """The graphs as one pass left them, and what can be said of them.

    Attributes:
        snapshot: from the pipeline.
        before: the stage before; None for "capture".
        world: what it is measured with.
    """

    snapshot: Snapshot
    before: Stage | None
    world: World

    @property
    def name(self) -> str:
        return self.snapshot.name

    @property
    def exact(self) -> bool:
        """Whether the pass keeps the numerics up to rounding."""
        return self.snapshot.exact

    @property
    def changed(self) -> list[str]:
        """A line for each change."""
        return self.snapshot.result.changed

    @property
    def notes(self) -> list[str]:
        """What was left alone, and why."""
        return self.snapshot.result.notes

    @property
    def seconds(self) -> float:
        return self.snapshot.seconds

    @property
    def verified(self) -> float | None:
        """Largest difference found by translation validation, 1.0 is what rounding explains; None where not run."""
        return self.snapshot.verified

    @property
    def graphs(self) -> list[fx.GraphModule]:
        return self.snapshot.graphs

    @property
    def graph(self) -> fx.GraphModule:
        """The only graph.

        Raises:
            PassError: there are several.
        """
        if len(self.graphs) != 1:
            raise PassError(f"the model was traced into {len(self.graphs)} graphs; look at `.graphs`")
        return self.graphs[0]

    @cached_property
    def _names(self) -> list[readable.Names]:
        if self.before is None:
            return [{} for _ in self.graphs]
        pairs = zip(self.before.graphs, self.graphs, self.before._names, strict=True)
        return [readable.stable_names(was, now, known) for was, now, known in pairs]

    @cached_property
    def code(self) -> str:
        """The graphs as readable Python."""
        texts = []
        for i, (gm, names) in enumerate(zip(self.graphs, self._names, strict=True)):
            title = "forward" if len(self.graphs) == 1 else f"graph_{i}"
            texts.append(readable.code(gm, self.world.names(i, gm), names, title))
        return "\n\n".join(texts)

    def diff(self) -> str:
        """The unified diff against the stage before; "" where the pass changed nothing."""
        if self.before is None:
            return ""
        return readable.diff(self.before.code, self.code, self.before.name, self.name)

    @cached_property
    def _read(self) -> dict[Any, tuple[int, int]]:
        """Parameter -> (numbers, bytes), for those the graphs read."""
        found: dict[Any, tuple[int, int]] = {}
        for gm, given in zip(self.graphs, self.world.given, strict=True):
            for node in measure.read_inputs(gm):
                held = given.get(node.name, measure.value(node))
                if isinstance(held, nn.Parameter):
                    leaf = node.meta.get("lr_leaf")
                    found[leaf or id(held)] = self.world.size(held, leaf)
        return found

    @property
    def parameters(self) -> int:
        """Numbers in the parameters that the graphs read."""
        return sum(n for n, _ in self._read.values())

    @property
    def bytes(self) -> int:
        """Their bytes."""
        return sum(size for _, size in self._read.values())

    def _model(self, index: int) -> int:
        model = {id(p): self.world.size(p) for p in self.world.parameters.values()}
        replaced = {id(self.world.parameters[key[0]]) for key in self._read if isinstance(key, tuple)}
        kept = [size for key, size in model.items() if key not in replaced or key in self._read]
        return sum(size[index] for size in kept) + sum(s[index] for k, s in self._read.items() if isinstance(k, tuple))

    @property
    def model_parameters(self) -> int:
        """Numbers in all parameters of the model, were it adopted as this stage says."""
        return self._model(0)

    @property
    def model_bytes(self) -> int:
        """Their bytes."""
        return self._model(1)

    @cached_property
    def _cost(self) -> tuple[int, int]:
        if self.before is not None and self._text == self.before._text:
            return self.before._cost
        costs = [measure.cost(gm) for gm in self.graphs]
        return sum(f for f, _ in costs), sum(s for _, s in costs)

    @cached_property
    def _text(self) -> list[str]:
        return [str(m.graph) for gm in self.graphs for m in gm.modules() if isinstance(m, fx.GraphModule)]

    @property
    def flops(self) -> int:
        """FLOPs of one forward on the example inputs, 2 for a multiply-add."""
        return self._cost[0]

    @property
    def saved(self) -> int:
        """Bytes that autograd saves for backward, parameters and inputs aside."""
        return self._cost[1]

    @cached_property
    def error(self) -> float | None:
        """Relative output error against the stage before, on the example inputs, of the worst graph.

        0.0 where the pass is exact; None where there are no numbers (meta device), or no stage before.
        """
        if self.before is None or not self.world.measurable:
            return None
        if self.exact or self._text == self.before._text:
            return 0.0
        worst = 0.0
        for i, (was, now) in enumerate(zip(self.before.graphs, self.graphs, strict=True)):
            old, new = (measure.outputs(gm, self.world.inputs(i, gm)) for gm in (was, now))
            worst = max(worst, measure.output_error(old, new))
        return worst
