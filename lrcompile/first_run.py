"""The first run of a compiled function on an untouched model: it adopts the weights that it is given.

Dynamo passes parameters as arguments and doesn't guard on which they are, so this looks at the arguments of the very
call, finds the modules that own them, and computes on the new pairs. The next call is traced afresh.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import AdoptError
from lrcompile.follow import pair_of_old, watch
from lrcompile.graph.capture import Capture, CapturedGraph, in_recomputed_region, tracing_lock
from lrcompile.graph.names import plain_name
from lrcompile.graph.pipeline import bind_weights, copy_graph, run_passes
from lrcompile.live import Live
from lrcompile.passes import PassContext, Weight, pass_list
from lrcompile.recipe import Recipe
from lrcompile.weights.layers import AdoptedModule
from lrcompile.weights.make import computed
from lrcompile.weights.plan import Entry
from lrcompile.weights.planner import check_globs, entry_of
from lrcompile.weights.replace import (
    Change,
    Made,
    carry_out,
    left_dense,
    refuse,
    settle,
    settled,
    tell,
    warn_of_lists,
)

log = logging.getLogger("lrcompile")


class AdoptAtRun:
    """What the backend returns for a graph with weights that no Plan has decided about.

    Dynamo may enter it again with the parameters of another block or model of the same class. So what was decided when it
    was compiled counts for those parameters alone; for others it is decided anew, by their own names.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        graph: CapturedGraph,
        names: dict[int, tuple[str, ...]],
        recipe: Recipe,
        compile_dense: Callable[[fx.GraphModule], Callable[..., Any]],
    ) -> None:
        self.gm, self.last, self.recipe, self.compile_dense = gm, graph.last, recipe, compile_dense
        self.dense: Callable[..., Any] | None = None
        weights = self._decide(graph.inputs, names)
        self.entries = {i: entry_of(w, self.recipe) for i, w in weights.items()}
        # Those that the graph multiplies with or looks up; what it only takes the norm of is left to other graphs.
        self.wanted = [i for i, w in weights.items() if w.kinds]
        self.called = {i: self.entries[i].names[0] for i in self.wanted}
        self.planned = {i: weakref.ref(graph.inputs[i]) for i in self.wanted}

    def __call__(self, *args: Any) -> Any:
        if not all(settled(args[i]) for i in self.wanted):
            with tracing_lock():  # of several threads at the first call, one adopts
                pairs = self._adopt(args)
            if pairs:
                return self.gm.forward(*self._with_products(args, pairs))
        if self.dense is None:  # decided to stay dense: an ordinary compiled program
            self.dense = self.compile_dense(self.gm)
        return self.dense(*args)

    def _with_products(self, args: Sequence[Any], pairs: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> list[Any]:
        values = list(args)
        for i, (a, b) in pairs.items():
            with torch.autocast(a.device.type, enabled=False):  # the graph may leave autocast before it reads this
                product = torch.matmul(b, a)
            values[i] = product.t() if self.entries[i].stored_in_out else product
        return values

    def _decide(self, inputs: Sequence[Any], names: dict[int, tuple[str, ...]]) -> dict[int, Weight]:
        """The place of every parameter that has names here and isn't decided about yet -> what becomes of it."""
        graph = CapturedGraph(copy_graph(self.gm), list(inputs), self.last)
        named = {id(p): names[id(p)] for p in graph.parameters().values() if id(p) in names and not settled(p)}
        ctx = PassContext(self.recipe, device=device_of(inputs).type)
        bind_weights([graph], named, ctx)
        run_passes(Capture([graph], named), pass_list(self.recipe, weights=True, program=False, rewrites=False), ctx)
        keys = {i: node.meta.get("lr_weight") for i, node in enumerate(graph.placeholders)}
        return {i: ctx.weights[key] for i, key in keys.items() if key in ctx.weights}

    def _adopt(self, args: Sequence[Any]) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
        """Adopt what is still to be; the place of every weight that is a pair by now -> that pair."""
        # Another thread, which was given the same parameters, may have been first.
        pairs = {i: pair for i in self.wanted if (pair := pair_of_old(args[i])) is not None}
        open_ = [i for i in self.wanted if i not in pairs and not settled(args[i])]
        if not open_:
            return pairs
        live, entries = Live.sweep(), self.entries
        if any(self.planned[i]() is not args[i] for i in open_):
            weights = self._decide(args, self._names_again(args, live))
            entries = {i: entry_of(w, self.recipe) for i, w in weights.items()}
        todo = {i: entries[i] for i in open_ if i in entries and entries[i].rank is not None}
        if todo:
            others = [p for p in args if isinstance(p, nn.Parameter) and id(p) not in {id(args[i]) for i in todo}]
            changes = [Change(entry, args[i]) for i, entry in todo.items()]
            made = _adopt_arguments(changes, others, list(entries.values()), live, self.recipe)
            pairs |= {i: (m.leaves["_a"], m.leaves["_b"]) for i, m in zip(todo, made, strict=True)}
        elif dense := left_dense(entries.values()):
            log.info(f"adopted no weight of this graph; left dense: {dense}")
        settle([args[i] for i in open_ if i not in todo], self.recipe.to_dict())
        return pairs

    def _names_again(self, args: Sequence[Any], live: Live) -> dict[int, tuple[str, ...]]:
        """Names of parameters that Dynamo came back with: as the outermost model calls them, and as the frame would."""
        names = names_of([args[i] for i in self.wanted], {}, live, None)
        for i, called in self.called.items():
            known = names.get(id(args[i]), ())
            if any(name.endswith(f".{called}") for name in known):
                names[id(args[i])] = (called, *known)
        return names


def _adopt_arguments(
    changes: Sequence[Change], others: Sequence[nn.Parameter], seen: Sequence[Entry], live: Live, recipe: Recipe
) -> list[Made]:
    """Adopt the weights that a graph was called with; everything is checked before the first is touched."""
    start = time.perf_counter()
    if in_recomputed_region():
        raise AdoptError(
            "the first call of a compiled function adopts its weights, and can't do so inside torch.utils.checkpoint, "
            "which will run it again: call lrcompile.adopt(model, recipe, example_inputs) before training, or compile "
            "the function that calls checkpoint"
        )
    refuse(changes, live)
    tops = {id(top): top for c in changes for top in (live.top(m) for m, _ in live.owners[id(c.weight)])}
    before = _numbers(tops.values())
    made = carry_out(changes, live, computed(recipe.to_dict()), recipe.to_dict())
    watch([(m.old, *m.leaves.values()) for m in made], others)
    tell(seen, [m.entry for m in made], (before, _numbers(tops.values())), time.perf_counter() - start)
    warn_of_lists(made, live)
    return made


def names_of(
    parameters: Sequence[nn.Parameter], roots: dict[str, nn.Module], live: Live, recipe: Recipe | None
) -> dict[int, tuple[str, ...]]:
    """id(parameter) -> its names: as the compiled frame's module calls it, then as the outermost model does.

    Raises:
        PlanError: a glob of the recipe matches nothing.
    """
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
    if recipe is not None:
        check_globs([*roots.values(), *tops.values()], recipe)
    return names


def settle_copies(parameters: Iterable[nn.Parameter], live: Live) -> None:
    """The leaves of a copied or unpickled model whose original was adopted, and what stands dense among them."""
    for p in parameters:
        owner = next(
            (m for m, name in live.owners.get(id(p), ()) if isinstance(m, AdoptedModule) and name in m.lr_leaves), None
        )
        if owner is None or settled(p):
            continue
        top = live.top(owner)
        paired = [(n, m) for n, m in top.named_modules() if isinstance(m, AdoptedModule)]
        copied = [n.split(".") for n, m in paired if not all(settled(getattr(m, leaf)) for leaf in m.lr_leaves)]
        # The smallest part of the model with all of them in it: there the original's Plan has decided.
        settle(top.get_submodule(".".join(os.path.commonprefix(copied))).parameters(), {})


def _numbers(models: Iterable[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for m in models for p in m.parameters()}.values())


def device_of(inputs: Sequence[Any]) -> torch.device:
    return next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
