"""What a pass is: `def name(gm, ctx) -> PassResult`, marked exact or approximating.

A pass reads the context, rewrites the graph, and says what it touched. It knows no other pass. It recurses into the
sub-graphs of higher-order ops (`lrcompile.passes.graphs.scopes`) and leaves what it doesn't understand alone, saying so in `notes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from lrcompile.cost import Device
from lrcompile.graph.names import matches
from lrcompile.recipe import Recipe
from lrcompile.weights.form import Form


@dataclass
class Weight:
    """One parameter that the graphs multiply with: what the weight passes decide about, once for all its uses.

    Attributes:
        names: its names in the model, tied names together; the first is the key.
        shape, dtype: as stored.
        stored_in_out: whether it is stored (in_features, out_features), as Conv1D's; else (out_features, in_features).
        kinds: how each use spelled the product ("linear", "addmm", "embedding", ...).
        tokens: rows multiplied in one call of the model, over all uses.
        readers: what else reads it in the graphs, by name.
        writers: what writes to it in the graphs, by name: such a weight can't be a product.
        head: whether the graph looks like a use as output head.
        selected: whether it is to be adopted; `reason` says why not.
        rank: the pair's rank, None where there is no pair.
        held: the number format that a library has it in already; "" for a dense weight.
        base: "dense" or the number format of its frozen base; None without one.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_in_out: bool = False
    kinds: list[str] = field(default_factory=list)
    tokens: int = 0
    readers: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    head: bool = False
    selected: bool = False
    reason: str = ""
    rank: int | None = None
    held: str = ""
    base: str | None = None

    @property
    def key(self) -> str:
        return self.names[0]

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.stored_in_out else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.stored_in_out else self.shape[1]

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    def pair_numel(self, rank: int) -> int:
        """Numbers in a pair of this rank: rank * (in_features + out_features)."""
        return rank * (self.out_features + self.in_features)

    def form(self, recipe: Recipe) -> Form | None:
        """What stands in its place as decided so far; None where it stays dense."""
        if self.rank is None and (self.base is None or recipe.has_pairs):
            return None
        return self.form_at(recipe, self.rank)

    def form_at(self, recipe: Recipe, rank: int | None) -> Form:
        """The form that it would have with a pair of this rank."""
        beside = self.base is not None and rank is not None
        return Form(
            self.out_features,
            self.in_features,
            str(self.dtype).removeprefix("torch."),
            self.stored_in_out,
            rank,
            self.base,
            recipe.factors if rank is not None else None,
            recipe.alpha / rank**0.5 if beside and rank else 1.0,
            recipe.pair_dtype if beside else None,
        )

    def matches(self, glob: str, *, around: bool = True) -> bool:
        """Whether a glob matches it by one of its names (`lrcompile.graph.names.matches`)."""
        return any(matches(name, glob, around=around) for name in self.names)


KERNELS = ("auto", "triton", "inductor")


@dataclass
class PassContext:
    """What passes know and decide together.

    Attributes:
        recipe: what the user asked for.
        weights: key -> Weight, filled by canonicalize over all graphs, decided by select and allocate_ranks.
        other_bytes: bytes of all parameters of the model that are no Weight here; None where unknown.
        device: where the lowered graph will run ("cpu", "cuda", "meta").
        last: whether the graph at hand is the last of the model's call.
        target: the device of the cost table that the graph will run on; None: the CPU, or unknown.
        kernels: "auto" (the cost model decides), "triton" (our operators wherever they fit), "inductor" (never).
        energies: key of a weight -> the share of each of its singular values in ‖W‖², largest first; None where the numbers
            are out of reach.
    """

    recipe: Recipe
    weights: dict[str, Weight] = field(default_factory=dict)
    other_bytes: int | None = None
    device: str = "cpu"
    last: bool = True
    target: Device | None = None
    kernels: str = "auto"
    energies: Callable[[str], torch.Tensor] | None = None


@dataclass
class PassResult:
    """What a pass did: one line a change ("blocks.0.fc: 768x3072 -> rank 232"), and what it left alone and why."""

    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


PassFunction = Callable[[fx.GraphModule, PassContext], PassResult]


def graph_pass(
    *, exact: bool, after: str = "reassociate", weight_pass: bool = False
) -> Callable[[PassFunction], PassFunction]:
    """Mark a function as a pass.

    Args:
        exact: it keeps the numerics up to rounding; the pipeline checks that when asked to verify.
        after: the built-in pass that a user's pass is run after.
        weight_pass: it decides what weights become, and is run once, when planning; else it rewrites the program and is
            run at every compilation.
    """

    def mark(function: PassFunction) -> PassFunction:
        function.exact = exact  # type: ignore[attr-defined]
        function.after = after  # type: ignore[attr-defined]
        function.weight_pass = weight_pass  # type: ignore[attr-defined]
        return function

    return mark
