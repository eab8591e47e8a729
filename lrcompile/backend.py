"""The torch.compile entry point: `torch.compile(model, backend="lrcompile", options={...})`.

On an adopted model: program passes, then Inductor. On an untouched one it adopts by itself: the first call decides on
the graph and returns a function that, when it first *runs*, adopts the owners of the parameters it is given (Dynamo is
still building guards over the old parameters while the backend runs) and computes this one call on the new pairs; the
guards fail on the next call, which is traced afresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import RecipeError
from lrcompile.first_run import AdoptAtRun, device_of, names_of, settle_copies
from lrcompile.graph.capture import Capture, CapturedGraph, frame_goes_on, frame_modules
from lrcompile.graph.inline import inline_regions
from lrcompile.graph.pipeline import copy_graph, run_passes
from lrcompile.kernels import launch
from lrcompile.live import Live
from lrcompile.passes import KERNELS, PassContext, pass_list
from lrcompile.recipe import CALIBRATED, Recipe
from lrcompile.weights.replace import settled, settled_by

log = logging.getLogger("lrcompile")
INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Settings:
    """The backend's own options, beside those of a Recipe.

    Attributes:
        inner: what compiles the lowered graph: "inductor", "aot_eager" or "eager".
        inductor: options for Inductor, as torch.compile's own `options`.
        adopt: False leaves an untouched model as it is and only runs the program passes.
        verify: check every exact pass on the inputs of the first call (slow).
        kernels: what computes the pairs: "auto" asks the cost model (always Inductor on the CPU), "triton" takes our
            operators wherever they fit, "inductor" never.
    """

    inner: str = "inductor"
    inductor: dict[str, Any] | None = None
    adopt: bool = True
    verify: bool = False
    kernels: str = "auto"


def parse_options(options: dict[str, Any] | None) -> tuple[Settings, Recipe]:
    """Split torch.compile's options into the backend's and the Recipe's.

    Raises:
        RecipeError: an unknown option (the known ones are listed), a value out of range.
    """
    rest = dict(options or {})
    own = {f.name: rest.pop(f.name) for f in fields(Settings) if f.name in rest}
    recipe = rest.pop("recipe", None)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(f"the option recipe takes a lrcompile.Recipe, got {type(recipe).__name__}")
    if recipe is not None and rest:
        raise RecipeError(f"put {', '.join(rest)} into the recipe, or leave the recipe out")
    known = [f.name for f in fields(Recipe)]
    unknown = sorted(set(rest) - set(known))
    if unknown:
        every = [*(f.name for f in fields(Settings)), "recipe", *known]
        raise RecipeError(f"unknown option {', '.join(map(repr, unknown))}; known are {', '.join(every)}")
    settings = Settings(**own)
    if settings.inner not in INNER:
        raise RecipeError(f"inner={settings.inner!r} is not known; choose from {', '.join(INNER)}")
    if settings.kernels not in KERNELS:
        raise RecipeError(f"kernels={settings.kernels!r} is not known; choose from {', '.join(KERNELS)}")
    if settings.inductor is not None and settings.inner != "inductor":
        raise RecipeError(f"the option inductor has no effect with inner={settings.inner!r}")
    return settings, recipe or Recipe.from_options(rest)


def lrcompile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that torch.compile finds by its name.

    Args:
        gm: a Dynamo graph.
        example_inputs: parameters (the real ones), buffers, inputs, ints.
        options: `Settings` and Recipe fields, or `recipe=Recipe(...)`.
        mode: torch.compile's, handed to Inductor.

    Returns:
        the compiled function.

    Raises:
        RecipeError, PlanError, PassError: before anything is changed.
    """
    settings, recipe = parse_options(options)
    graph = CapturedGraph(gm, list(example_inputs), last=not frame_goes_on())
    matrices = [p for p in graph.parameters().values() if p.dim() > 1]
    if settings.adopt and not all(map(settled, matrices)):
        _refuse_whole_model(recipe)
        live = Live.sweep()
        settle_copies(matrices, live)
        inline_regions(gm)
        untouched = copy_graph(gm)
        own = {**asdict(settings), "adopt": False}

        def dense(gm: fx.GraphModule) -> Callable[..., Any]:
            return torch.compile(gm, backend=lambda gm, inputs: lrcompile(gm, inputs, options=own, mode=mode))

        first = AdoptAtRun(untouched, graph, names_of(matrices, frame_modules(), live, recipe), recipe, dense)
        if first.wanted:
            return first
    if set(options or {}) - {f.name for f in fields(Settings)}:
        _warn_of_another_recipe(matrices, recipe)
    return compile_program(graph, settings, recipe, mode)


def _refuse_whole_model(recipe: Recipe) -> None:
    """What takes the whole model, or data, is not done at the first call: the backend sees a graph and its arguments."""
    asked = [name for name in ("weights", "factors", "trainable") if getattr(recipe, name) is not None]
    asked += [f"init={recipe.init!r}"] * (recipe.init in CALIBRATED)
    asked += [f"allocation={recipe.allocation!r}"] * (recipe.allocation == "importance")
    if asked:
        raise RecipeError(
            f"{', '.join(asked)}: at its first call the backend makes plain pairs; call lrcompile.adopt(model, recipe, "
            "example_inputs) before torch.compile, which then finds the model adopted"
        )


def _warn_of_another_recipe(parameters: Sequence[nn.Parameter], recipe: Recipe) -> None:
    asked = recipe.to_dict()
    for was in (settled_by(p) or {} for p in parameters):
        known = was.keys() - {"trainable"}  # all that a copied model tells of its recipe
        changed = {k for k in {**asked, **was} if known and asked.get(k) != was.get(k)} - {"passes"}
        if changed:
            log.warning(
                f"the model is adopted already: the options for what weights become ({', '.join(sorted(changed))}) "
                "have no effect on it; lrcompile.merge(model) first to adopt it anew"
            )
            return


def compile_program(graph: CapturedGraph, settings: Settings, recipe: Recipe, mode: str | None) -> Callable[..., Any]:
    """Program passes, then the inner compiler."""
    device = device_of(graph.inputs)
    target = launch.describe(device) if device.type == "cuda" else None
    ctx = PassContext(recipe, device=device.type, target=target, kernels=settings.kernels)
    run_passes(Capture([graph], {}), pass_list(recipe, weights=False), ctx, verify=settings.verify)
    return _inner(graph.gm, graph.inputs, settings, mode)


def _inner(gm: fx.GraphModule, inputs: list[Any], settings: Settings, mode: str | None) -> Callable[..., Any]:
    if settings.inner == "eager":
        return gm.forward
    if settings.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **(settings.inductor or {})}
    return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]
