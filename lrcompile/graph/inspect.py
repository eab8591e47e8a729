"""inspect(): what every pass does to a model's graphs, without touching the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.errors import PassError
from lrcompile.graph import measure, readable
from lrcompile.graph.capture import Capture, CapturedGraph, Inputs, capture
from lrcompile.graph.names import plain_name
from lrcompile.graph.pipeline import Snapshot, run_passes
from lrcompile.passes import PassContext, pass_list
from lrcompile.recipe import Recipe
from lrcompile.weights.adopt import plan_of
from lrcompile.weights.factor import Pair, singular_values, svd_pair
from lrcompile.weights.layers import PairedModule
from lrcompile.weights.plan import Entry, Plan
from lrcompile.weights.planner import context_for, plan_from


def inspect(model: nn.Module, example_inputs: Inputs, recipe: Recipe | None = None, *, verify: bool = False) -> Report:
    """Run every pass over copies of the model's graphs and say what each did. Touches nothing; works on `meta`.

    Costs (FLOPs, saved bytes) and measured errors are computed when they are asked for or printed; the Report keeps the
    model's parameters alive for that.

    Args:
        model: as for `plan`. An adopted model is shown too: then only the program passes run.
        example_inputs: a tuple of positional arguments or a dict of keyword arguments, as the model is called.
        recipe: what is asked for; `Recipe()` where left out.
        verify: run the graphs before and after every exact pass, and compare outputs and gradients. The passes after
            `factorize` are checked on the truncated SVD of the weights.

    Returns:
        a Report: print it, look at `report["factorize"].diff()`, write `report.to_html(path)`.

    Raises:
        CaptureError, PlanError: as for `plan`.
        PassError: a pass failed, or says it is exact and isn't; or verify was asked of a model without numbers.
    """
    recipe = recipe or Recipe()
    numberless = any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())
    if verify and numberless:
        raise PassError("verify=True runs the graphs, and this model has no numbers (meta device); leave verify out")
    adopted = any(isinstance(m, PairedModule) for m in model.modules())
    captured = capture(model, example_inputs)
    ctx = context_for(model, captured, recipe)
    world = World(model, captured, ctx, not numberless)
    passes = pass_list(recipe, weights=not adopted)
    stages = run_passes(captured, passes, ctx, snapshots=True, verify=verify, values=world.values)
    plan = plan_of(model) if adopted else plan_from(model, ctx, captured)
    return Report(recipe, plan, captured.breaks, world, stages)


class World:
    """What the stages are measured with: the inputs of the graphs, the model's parameters, the pairs (computed once)."""

    def __init__(self, model: nn.Module, captured: Capture, ctx: PassContext, measurable: bool) -> None:
        self.ctx, self.measurable = ctx, measurable
        named = list(model.named_parameters(remove_duplicate=False))
        self.parameters = {plain_name(name): p for name, p in named}
        called = {id(t): plain_name(name) for name, t in reversed([*model.named_buffers(), *named])}
        # By name: passes may add inputs, and copies of a graph keep the names of those it had.
        self.given = [dict(zip([n.name for n in g.placeholders], g.inputs, strict=True)) for g in captured.graphs]
        self.called = [{name: called[id(x)] for name, x in given.items() if id(x) in called} for given in self.given]
        self.position = {id(g): i for i, g in enumerate(captured.graphs)}
        self._pairs: dict[str, Pair] = {}

    def pair(self, key: str) -> Pair:
        """The pair of a weight: its truncated SVD."""
        if key not in self._pairs:
            weight = self.ctx.weights[key]
            assert weight.rank is not None
            self._pairs[key] = svd_pair(self.matrix(key), weight.rank, self.ctx.recipe.svd, key)
        return self._pairs[key]

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
                key, side = node.meta["lr_leaf"]
                pair = self.pair(key)
                # A parameter, as in the adopted model: what counts as one mustn't depend on the stage.
                out.append(nn.Parameter(pair.weight_a if side == "a" else pair.weight_b))
            else:
                raise PassError(f"input {node.name!r} of the graph was added by a pass and has no value to run it with")
        return out

    def names(self, index: int, gm: fx.GraphModule) -> dict[str, str]:
        """Placeholder -> the model's name for it."""
        leaves = {n.name: n.meta["lr_leaf"] for n in gm.graph.find_nodes(op="placeholder") if "lr_leaf" in n.meta}
        return self.called[index] | {name: f"{key}_{side}" for name, (key, side) in leaves.items()}


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
                    found[node.meta.get("lr_leaf") or id(held)] = measure.numbers(held)
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
        model = {id(p): measure.numbers(p) for p in self.world.parameters.values()}
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


class Report:
    """What `inspect` saw; printed, a table pass by pass.

    Attributes:
        recipe: what was asked for.
        plan: what the weight passes decided.
        breaks: why the trace broke; empty for one whole graph.
        stages: "capture" and then every pass, in order; also by name: `report["factorize"]`.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, breaks: list[str], world: World, snapshots: Sequence[Snapshot]
    ) -> None:
        self.recipe, self.plan, self.breaks, self._world = recipe, plan, breaks, world
        self.stages: list[Stage] = []
        for snapshot in snapshots:
            self.stages.append(Stage(snapshot, self.stages[-1] if self.stages else None, world))

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage {name!r}; there are {', '.join(s.name for s in self.stages)}")

    @property
    def measurable(self) -> bool:
        """Whether the model has numbers to measure with."""
        return self._world.measurable

    @property
    def weights(self) -> list[str]:
        """Keys of the weights that the graphs multiply with or look up."""
        return list(self._world.ctx.weights)

    @cached_property
    def errors(self) -> dict[str, float]:
        """Weight -> ‖W - weight_b @ weight_a‖ / ‖W‖ of its pair; empty on the meta device, where there is no W."""
        if not self.measurable:
            return {}
        told = {e.key: e.error for e in self.plan.pairs if e.error is not None}  # an adopted model remembers
        return {e.key: told[e.key] if e.key in told else self._world.pair(e.key).error for e in self._planned()}

    def _planned(self) -> list[Entry]:
        return [e for e in self.plan.pairs if e.error is not None or e.key in self._world.ctx.weights]

    def spectrum(self, key: str) -> torch.Tensor:
        """All singular values of a weight, largest first, (min(out, in),) in float64.

        Raises:
            PassError: the model has no numbers, or no such weight.
        """
        if not self.measurable:
            raise PassError("the model has no numbers (meta device), so no singular values")
        if key not in self._world.ctx.weights:
            raise PassError(f"no graph reads a weight {key!r}; there are {', '.join(self._world.ctx.weights)}")
        return singular_values(self._world.matrix(key))

    def __rich__(self) -> Any:
        from lrcompile.show import report_table

        return report_table(self)

    def __str__(self) -> str:
        from lrcompile.show import as_text, report_table

        return as_text(report_table(self))

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page: the table, the errors, the spectra, the diff of every pass."""
        from lrcompile.graph.html import page

        Path(path).write_text(page(self), encoding="utf-8")
