"""inspect(): what every pass does to a model's graphs, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lrcompile.cost import Device, device_named
from lrcompile.errors import PassError, RecipeError
from lrcompile.graph.capture import Inputs, capture
from lrcompile.graph.pipeline import Snapshot, run_passes
from lrcompile.graph.stage import Stage, World
from lrcompile.kernels import launch
from lrcompile.passes import KERNELS, pass_list
from lrcompile.recipe import Recipe, as_recipe
from lrcompile.weights.adopt import moments_for, plan_of
from lrcompile.weights.factor import singular_values
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.library import as_dense
from lrcompile.weights.plan import Entry, Plan
from lrcompile.weights.planner import context_for, plan_from


def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    recipe: Recipe | None = None,
    *,
    verify: bool = False,
    target: str | None = None,
    kernels: str = "auto",
    calibration: Iterable[Inputs] | None = None,
) -> Report:
    """Run every pass over copies of the model's graphs and say what each did. Touches nothing; works on `meta`.

    Costs (FLOPs, saved bytes) and measured errors are computed when they are asked for or printed; the Report keeps the
    model's parameters alive for that.

    Args:
        model: as for `plan`. An adopted model is shown too: then only the program passes run.
        example_inputs: a tuple of positional arguments or a dict of keyword arguments, as the model is called.
        recipe: what is asked for; `Recipe()` where left out.
        verify: run the graphs before and after every exact pass, and compare outputs and gradients. The passes after
            `quantize` are checked on the leaves as they would start.
        target: a GPU of the cost table ("H100"), to show what would compute the pairs there, and how fast; left out, the
            device that the model is on.
        kernels: as the backend's option: "auto", "triton" or "inductor".
        calibration: as for `adopt`, where the recipe's start looks at data.

    Returns:
        a Report: print it, look at `report["factorize"].diff()`, write `report.to_html(path)`.

    Raises:
        RecipeError, CaptureError, PlanError: as for `plan`; or kernels is not known, which lists what is.
        KernelError: target is no GPU of the cost table; the message lists them.
        PassError: a pass failed, or says it is exact and isn't; or verify was asked of a model without numbers.
    """
    recipe = as_recipe(recipe, example_inputs)
    if kernels not in KERNELS:
        raise RecipeError(f"kernels={kernels!r} is not known; choose from {', '.join(KERNELS)}")
    numberless = any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())
    if verify and numberless:
        raise PassError("verify=True runs the graphs, and this model has no numbers (meta device); leave verify out")
    adopted = any(isinstance(m, AdoptedModule) for m in model.modules())
    idle = adopted or numberless  # nothing is computed of what there is no start, or no number, to compute from
    moments = {} if idle else moments_for([recipe.start], model, calibration, recipe)
    with as_dense(model, numbers=True):
        captured = capture(model, example_inputs)
        ctx = context_for(model, captured, recipe, moments)
        ctx.kernels = kernels
        ctx.target = device_named(target) if target else _present(model)
        world = World(model, captured, ctx, not numberless, moments)
        passes = pass_list(recipe, weights=not adopted)
        stages = run_passes(captured, passes, ctx, snapshots=True, verify=verify, values=world.values)
        plan = plan_of(model) if adopted else plan_from(model, ctx, captured)
    return Report(recipe, plan, captured.breaks, world, stages)


def _present(model: nn.Module) -> Device | None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return launch.describe(device) if device.type == "cuda" else None


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
        """Weight -> ‖W - Ŵ‖ / ‖W‖ of what stands in its place; empty on the meta device, where there is no W."""
        if not self.measurable:
            return {}
        told = {e.key: e.error for e in self.plan.adopted if e.error is not None}  # an adopted model remembers
        found = {e.key: told[e.key] if e.key in told else self._world.made(e.key)[1] for e in self._planned()}
        return {key: error for key, error in found.items() if error is not None}

    def _planned(self) -> list[Entry]:
        return [e for e in self.plan.adopted if e.error is not None or e.key in self._world.ctx.weights]

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
