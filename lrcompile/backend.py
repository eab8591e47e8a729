"""The torch.compile entry point: `torch.compile(model, backend="lrcompile", options={...})`.

On an adopted model: program passes, then Inductor. On an untouched one it adopts by itself: the first call decides on
the graph and returns a function that, when it first *runs*, adopts the owners of the parameters it is given (Dynamo is
still building guards over the old parameters while the backend runs) and computes this one call on the new pairs; the
guards fail on the next call, which is traced afresh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import AdoptError, RecipeError
from lrcompile.follow import pair_of_old, watch
from lrcompile.graph.capture import (
    Capture,
    CapturedGraph,
    frame_goes_on,
    frame_modules,
    in_recomputed_region,
    tracing_lock,
)
from lrcompile.graph.inline import inline_regions
from lrcompile.graph.names import plain_name
from lrcompile.graph.pipeline import bind_weights, copy_graph, run_passes
from lrcompile.kernels import launch
from lrcompile.live import Live
from lrcompile.passes import KERNELS, PassContext, pass_list
from lrcompile.recipe import Recipe
from lrcompile.weights.layers import PairedModule
from lrcompile.weights.plan import Entry
from lrcompile.weights.planner import check_globs, entry_of
from lrcompile.weights.replace import (
    Change,
    Pair,
    carry_out,
    factored,
    left_dense,
    refuse,
    settle,
    settled,
    settled_by,
    tell,
    warn_of_lists,
)

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
    parameters = list(graph.parameters().values())
    roots = frame_modules()
    _settle_copies(roots.values())
    if settings.adopt and any(not settled(p) for p in parameters):
        names = _names(parameters, roots, recipe)
        inline_regions(gm)
        untouched = copy_graph(gm)
        ctx = PassContext(recipe, device=_device(example_inputs).type)
        bind_weights([graph], names, ctx)
        decide = [p for p in pass_list(recipe, weights=True, program=False) if p.__name__ != "factorize"]
        run_passes(Capture([graph], names), decide, ctx)
        entries = {
            i: entry_of(ctx.weights[node.meta["lr_weight"]])
            for i, node in enumerate(graph.placeholders)
            if node.meta.get("lr_weight") in ctx.weights
        }
        if any(e.rank is not None for e in entries.values()):
            return _AdoptAtRun(untouched, entries, recipe, settings, mode)
        settle(parameters, recipe.to_dict())
        if dense := left_dense(entries.values()):
            log.info(f"adopted no weight of this graph; left dense: {dense}")
        return compile_program(CapturedGraph(untouched, graph.inputs), settings, recipe, mode)
    if set(options or {}) - {f.name for f in fields(Settings)}:
        _warn_of_another_recipe(parameters, recipe)
    return compile_program(graph, settings, recipe, mode)


def _warn_of_another_recipe(parameters: Sequence[nn.Parameter], recipe: Recipe) -> None:
    asked = recipe.to_dict()
    for was in (settled_by(p) for p in parameters):
        changed = {k for k in {**asked, **(was or {})} if was and asked.get(k) != was.get(k)} - {"passes"}
        if changed:
            log.warning(
                f"the model is adopted already: the options for what weights become ({', '.join(sorted(changed))}) "
                "have no effect on it; lrcompile.merge(model) first to adopt it anew"
            )
            return


def compile_program(graph: CapturedGraph, settings: Settings, recipe: Recipe, mode: str | None) -> Callable[..., Any]:
    """Program passes, then the inner compiler."""
    device = _device(graph.inputs)
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


class _AdoptAtRun:
    """What the backend returns for an untouched model.

    Dynamo may enter it again with the parameters of another block or model of the same class, so nothing is remembered
    of the parameters it was compiled with but their places among the arguments.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        entries: dict[int, Entry],
        recipe: Recipe,
        settings: Settings,
        mode: str | None,
    ) -> None:
        self.gm, self.entries, self.recipe, self.settings, self.mode = gm, entries, recipe, settings, mode
        self.dense: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        with tracing_lock():  # of several threads at the first call, one adopts
            pairs = self._adopt(args)
        if not pairs:  # decided elsewhere to stay dense: an ordinary compiled program
            if self.dense is None:
                own = {"inner": self.settings.inner, "inductor": self.settings.inductor, "adopt": False}
                self.dense = torch.compile(self.gm, backend=lambda g, x: lrcompile(g, x, options=own, mode=self.mode))
            return self.dense(*args)
        values = list(args)
        for i, (a, b) in pairs.items():
            with torch.autocast(a.device.type, enabled=False):  # the graph may leave autocast before it reads this
                product = torch.matmul(b, a)
            values[i] = product.t() if self.entries[i].stored_in_out else product
        return self.gm.forward(*values)

    def _adopt(self, args: Sequence[Any]) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
        """Adopt what is still to be; the place of every weight that is a pair by now -> that pair."""
        planned = {i: e for i, e in self.entries.items() if e.rank is not None}
        # Another thread, which was given the same parameters, may have been first.
        pairs = {i: pair for i in planned if (pair := pair_of_old(args[i])) is not None}
        todo = {i: e for i, e in planned.items() if i not in pairs and not settled(args[i])}
        if todo:
            others = [p for p in args if isinstance(p, nn.Parameter) and id(p) not in {id(args[i]) for i in todo}]
            made = _adopt_arguments([Change(e, args[i]) for i, e in todo.items()], others, self.entries, self.recipe)
            pairs |= {i: (pair.a, pair.b) for i, pair in zip(todo, made, strict=True)}
        return pairs


def _adopt_arguments(
    changes: Sequence[Change], others: Sequence[nn.Parameter], seen: dict[int, Entry], recipe: Recipe
) -> list[Pair]:
    """Adopt the weights that a graph was called with; everything is checked before the first is touched."""
    start = time.perf_counter()
    if in_recomputed_region():
        raise AdoptError(
            "the first call of a compiled function adopts its weights, and can't do so inside torch.utils.checkpoint, "
            "which will run it again: call lrcompile.adopt(model, recipe, example_inputs) before training, or compile "
            "the function that calls checkpoint"
        )
    live = Live.sweep()
    refuse(changes, live)
    tops = {id(top): top for c in changes for top in (live.top(m) for m, _ in live.owners[id(c.weight)])}
    before = _numbers(tops.values())
    pairs = carry_out(changes, live, factored(recipe.svd), recipe.to_dict())
    settle(others, recipe.to_dict())
    watch([(pair.old, pair.a, pair.b) for pair in pairs], others)
    tell(list(seen.values()), [p.entry for p in pairs], (before, _numbers(tops.values())), time.perf_counter() - start)
    warn_of_lists(pairs, live)
    return pairs


def _names(
    parameters: Sequence[nn.Parameter], roots: dict[str, nn.Module], recipe: Recipe
) -> dict[int, tuple[str, ...]]:
    """id(parameter) -> its names: as the compiled frame's module calls it, then as the outermost model does."""
    live = Live.sweep()
    names: dict[int, tuple[str, ...]] = {}

    def add(module: nn.Module, prefix: str = "") -> None:
        for name, p in module.named_parameters(remove_duplicate=False):
            if (known := prefix + plain_name(name)) not in names.get(id(p), ()):
                names[id(p)] = (*names.get(id(p), ()), known)

    for variable, root in roots.items():
        add(root, f"{variable}." if len(roots) > 1 else "")
    # The frame may hold a module only in something else (a trainer's attribute): then its owners tell.
    owners = [m for p in parameters for m, _ in live.owners.get(id(p), ())[:1]]
    tops = {id(top): top for top in map(live.top, [*roots.values(), *owners])}
    for top in tops.values():
        add(top, f"{type(top).__name__}." if len(tops) > 1 and not roots else "")
    check_globs([*roots.values(), *tops.values()], recipe)
    return names


def _settle_copies(roots: Iterable[nn.Module]) -> None:
    """A copied or unpickled model whose original was adopted: what is dense in it was left so on purpose."""
    for root in roots:
        pairs = [(m, name) for m in root.modules() if isinstance(m, PairedModule) for name, _ in m.lr_names]
        if any(not settled(getattr(m, f"{name}_a")) for m, name in pairs):
            settle(root.parameters(), {})


def _numbers(models: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for m in models for p in m.parameters()}.values())


def _device(inputs: Sequence[Any]) -> torch.device:
    return next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
