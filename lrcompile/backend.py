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
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import AdoptError, RecipeError
from lrcompile.follow import follow, refuse_started
from lrcompile.graph.capture import Capture, CapturedGraph, frame_goes_on, frame_modules
from lrcompile.graph.names import plain_name
from lrcompile.graph.pipeline import bind_weights, copy_graph, run_passes
from lrcompile.live import Live
from lrcompile.passes import PassContext, pass_list
from lrcompile.recipe import Recipe
from lrcompile.weights.adopt import adoption_line, factored, make_leaves, refuse_taken, settle, settled
from lrcompile.weights.layers import PairedModule, install_pair
from lrcompile.weights.plan import Entry
from lrcompile.weights.planner import check_globs, entry_of

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
    """

    inner: str = "inductor"
    inductor: dict[str, Any] | None = None
    adopt: bool = True
    verify: bool = False


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
        untouched = copy_graph(gm)
        ctx = PassContext(recipe, device=_device(example_inputs))
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
        settle(parameters)
        if dense := [f"{e.key}: {e.reason}" for e in entries.values() if e.tokens]:
            log.info(f"adopted 0 of {len(dense)} linear weights; {'; '.join(dense)}")
        return compile_program(CapturedGraph(untouched, graph.inputs), settings, recipe, mode)
    return compile_program(graph, settings, recipe, mode)


def compile_program(graph: CapturedGraph, settings: Settings, recipe: Recipe, mode: str | None) -> Callable[..., Any]:
    """Program passes, then the inner compiler."""
    ctx = PassContext(recipe, device=_device(graph.inputs))
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
        todo = {i: e for i, e in self.entries.items() if e.rank is not None and not settled(args[i])}
        if not todo:  # decided elsewhere to stay dense: an ordinary compiled program
            if self.dense is None:
                own = {"inner": self.settings.inner, "inductor": self.settings.inductor, "adopt": False}
                self.dense = torch.compile(self.gm, backend=lambda g, x: lrcompile(g, x, options=own, mode=self.mode))
            return self.dense(*args)
        pairs = _adopt_arguments(args, todo, self.entries, self.recipe)
        values = list(args)
        for i, (a, b) in pairs.items():
            with torch.autocast(a.device.type, enabled=False):  # the graph may leave autocast before it reads this
                product = torch.matmul(b, a)
            values[i] = product.t() if self.entries[i].stored_in_out else product
        return self.gm.forward(*values)


def _adopt_arguments(
    args: Sequence[Any], todo: dict[int, Entry], seen: dict[int, Entry], recipe: Recipe
) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """Adopt the owners of these parameters; everything is checked and computed before the first is touched."""
    start = time.perf_counter()
    live = Live.sweep()
    owners = {i: _owners(args[i], e, live) for i, e in todo.items()}
    refuse_started(live.optimizers, [args[i] for i in todo], [e.key for e in todo.values()])
    for i, entry in todo.items():
        refuse_taken(owners[i], entry.key)
    made: dict[int, tuple[nn.Parameter, nn.Parameter, Entry]] = {}
    for i, entry in todo.items():
        a, b, error = make_leaves(args[i], entry, lambda w, e: factored(w, e, recipe.svd))
        made[i] = (a, b, replace(entry, error=error))
    tops = {id(top): top for places in owners.values() for top in (live.top(m) for m, _ in places)}
    before = _numbers(tops.values())
    for i, (a, b, entry) in made.items():
        for module, name in owners[i]:
            install_pair(module, name, a, b, entry.stored_in_out, asdict(entry))
    others = [p for p in args if isinstance(p, nn.Parameter) and id(p) not in {id(args[i]) for i in todo}]
    settle([*others, *(leaf for a, b, _ in made.values() for leaf in (a, b))])
    follow(live.optimizers, [(args[i], a, b) for i, (a, b, _) in made.items()], others)
    after = _numbers(tops.values())
    done = [entry for _, _, entry in made.values()]
    log.info(adoption_line(list(seen.values()), done, (before, after), time.perf_counter() - start))
    return {i: (a, b) for i, (a, b, _) in made.items()}


def _owners(parameter: nn.Parameter, entry: Entry, live: Live) -> list[tuple[nn.Module, str]]:
    from torch.distributed.tensor import DTensor

    fix = "call lrcompile.adopt(model, recipe, example_inputs) before"
    if isinstance(parameter, DTensor):
        raise AdoptError(f"{entry.key} is a DTensor (sharded): {fix} fully_shard")
    owners = live.owners.get(id(parameter), [])
    for module, _ in owners:
        wrapper = live.wrapper_of(module)
        if wrapper is not None:
            raise AdoptError(f"{entry.key} is in the hands of {wrapper} already: {fix} wrapping the model")
    if not owners:
        raise AdoptError(f"no live module owns {entry.key}: {fix} torch.compile")
    return owners


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
            settle(list(root.parameters()))


def _numbers(models: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for m in models for p in m.parameters()}.values())


def _device(inputs: Sequence[Any]) -> str:
    return next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
