"""The passes, in order: the table of contents of the compiler.

canonicalize    every product with a parameter in one form            exact
select          which weights are adopted, with a base or without     decides
allocate_ranks  one dial -> a rank each                               decides
factorize       weight -> weight_b @ weight_a                         approximating
quantize        weight -> base + scale · weight_b @ weight_a          approximating
reassociate     x (B A)ᵀ -> (x Aᵀ) Bᵀ                                 exact
fuse_epilogue   what follows a pair, in its kernel                    exact
share_input     pairs over one input, in one kernel                   exact
lower           how each site is computed on this device              exact

Weight passes (select, allocate_ranks, factorize, quantize) run once, when a model is planned. Program passes (the others) run at
every compilation. A user's pass stands after the built-in one it names.
"""

from __future__ import annotations

from lrcompile.errors import RecipeError
from lrcompile.passes.allocate_ranks import allocate_ranks
from lrcompile.passes.canonicalize import canonicalize
from lrcompile.passes.contract import KERNELS, PassContext, PassFunction, PassResult, Weight, graph_pass
from lrcompile.passes.factorize import factorize
from lrcompile.passes.fuse_epilogue import fuse_epilogue
from lrcompile.passes.lower import lower
from lrcompile.passes.quantize import quantize
from lrcompile.passes.reassociate import reassociate
from lrcompile.passes.select import select
from lrcompile.passes.share_input import share_input
from lrcompile.recipe import Recipe

__all__ = [
    "KERNELS",
    "PASSES",
    "PassContext",
    "PassFunction",
    "PassResult",
    "Weight",
    "graph_pass",
    "pass_list",
]

PASSES: tuple[PassFunction, ...] = (
    canonicalize,
    select,
    allocate_ranks,
    factorize,
    quantize,
    reassociate,
    fuse_epilogue,
    share_input,
    lower,
)


def pass_list(recipe: Recipe, *, weights: bool, program: bool = True, rewrites: bool = True) -> list[PassFunction]:
    """The passes to run, the recipe's own in their places.

    Args:
        recipe: whose `passes` are inserted.
        weights: whether the weight passes are wanted.
        program: whether the program passes are wanted (canonicalize always is).
        rewrites: whether the graph is to show what the weights become; planning needs the decisions alone.

    Raises:
        RecipeError: a user's pass wants to stand after a pass that doesn't exist.
    """
    known = [p.__name__ for p in PASSES]
    for own in recipe.passes:
        if own.after not in known:  # type: ignore[attr-defined]
            raise RecipeError(f"pass {own.__name__} wants to run after {own.after!r}; known are {', '.join(known)}")  # type: ignore[attr-defined]
    out: list[PassFunction] = []
    for built_in in PASSES:
        out.append(built_in)
        out += [own for own in recipe.passes if own.after == built_in.__name__]  # type: ignore[attr-defined]
    return [
        p
        for p in out
        if (p is canonicalize or (weights if p.weight_pass else program))  # type: ignore[attr-defined]
        and (rewrites or p not in (factorize, quantize))
    ]
