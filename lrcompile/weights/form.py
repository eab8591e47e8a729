"""The form that a weight takes: which tensors stand in its place, and how they make up the dense matrix again.

=========================  ===========================================  ====================================
form                       W =                                          leaves of a parameter `weight`
=========================  ===========================================  ====================================
plain pair                 weight_b @ weight_a                          weight_a, weight_b
quantised pair             decoded(weight_b) @ decoded(weight_a)        weight_a, weight_a_<key>…, weight_b, …
base alone                 decoded(weight_base)                         weight_base, weight_base_<key>…
base and pair              base + scale · weight_b @ weight_a           all of those
=========================  ===========================================  ====================================

A base is quantised or, as in LoRA, the dense weight itself. Packed tensors are stored as integers of the same bits: a
model's `.to(torch.bfloat16)`, or a wrapper's mixed precision, leaves integers alone, and would round scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lrcompile.kernels import lowrank_linear
from lrcompile.kernels.compose import DENSE, compose
from lrcompile.kernels.lowrank_quant_linear import lowrank_quant_linear
from lrcompile.kernels.quant_linear import quant_linear
from lrcompile.kernels.quant_lowrank_linear import quant_lowrank_linear
from lrcompile.weights.formats import Format, format_of

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Leaf(NamedTuple):
    """One tensor that stands in a weight's place.

    Attributes:
        shape, dtype: as stored.
        pair: whether it is a side of a plain pair, which can be trained.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pair: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def store(packed: torch.Tensor) -> torch.Tensor:
    """A packed tensor as it is stored: a floating one as integers of the same bits, a scalar as a vector of one."""
    packed = packed.reshape(1) if packed.dim() == 0 else packed
    return packed.view(_SAME_SIZE[packed.dtype.itemsize]) if packed.dtype.is_floating_point else packed


def run(target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """Call a function, or a method by its name: how `Form.read` computes, where a pass writes nodes instead."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


@dataclass(frozen=True)
class Form:
    """What stands in a weight's place.

    Attributes:
        out_features, in_features: of the matrix.
        dtype: of the weight, "float32".
        stored_in_out: the weight was stored (in_features, out_features), as Conv1D's.
        rank: of the pair; None without one.
        base: "dense" or the name of a number format; None without one.
        factors: number format of the pair; None for a plain one.
        scale: of the pair's product.
        pair_dtype: of a plain pair's sides; None: the weight's.
    """

    out_features: int
    in_features: int
    dtype: str
    stored_in_out: bool = False
    rank: int | None = None
    base: str | None = None
    factors: str | None = None
    scale: float = 1.0
    pair_dtype: str | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Form | None:
        """The form that a Plan's entry, as a dict, says a weight takes; None where it stays dense."""
        if told["rank"] is None and told["base"] is None:
            return None
        first, second = told["shape"]
        out, inner = (second, first) if told["stored_in_out"] else (first, second)
        kept = ("dtype", "stored_in_out", "rank", "base", "factors", "scale", "pair_dtype")
        return cls(out, inner, **{name: told[name] for name in kept})

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_pair_dtype(self) -> torch.dtype:
        return getattr(torch, self.pair_dtype or self.dtype)

    @cached_property
    def sides(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """("a", (rank, in_features)) and ("b", (out_features, rank)); nothing without a pair."""
        if self.rank is None:
            return ()
        return (("a", (self.rank, self.in_features)), ("b", (self.out_features, self.rank)))

    def format_of(self, part: str) -> Format | None:
        """The number format of "base", "a" or "b"; None for a plain tensor or an absent one."""
        name = (None if self.base == DENSE else self.base) if part == "base" else self.factors
        return format_of(name) if name else None

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """Suffix of each leaf ("_a", "_base", "_base_absmax") -> what it looks like, in the modules' order.

        Raises:
            PlanError: the format can't hold the shape or dtype.
        """
        found: dict[str, Leaf] = {}
        shape = (self.out_features, self.in_features)
        if self.base == DENSE:
            found["_base"] = Leaf((shape[1], shape[0]) if self.stored_in_out else shape, self.torch_dtype, False)
        elif self.base:
            found |= self._packed_leaves("base", shape, self.torch_dtype)
        for side, size in self.sides:
            if self.factors:
                found |= self._packed_leaves(side, size, self.torch_dtype)
            else:
                found[f"_{side}"] = Leaf(size, self.torch_pair_dtype, True)
        return found

    def _packed_leaves(self, part: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Leaf]:
        form = self.format_of(part)
        assert form is not None
        specs = form.specs(shape, dtype)
        found = {}
        for key, suffix in zip(form.keys, self.suffixes(part), strict=True):
            kept = _SAME_SIZE[specs[key].dtype.itemsize] if specs[key].dtype.is_floating_point else specs[key].dtype
            found[suffix] = Leaf(specs[key].shape or (1,), kept, False)
        return found

    def suffixes(self, part: str) -> list[str]:
        """Suffixes of the leaves of "base", "a" or "b", codes first."""
        form = self.format_of(part)
        more = form.keys[1:] if form else ()
        return [f"_{part}", *(f"_{part}_{key}" for key in more)]

    @property
    def numel(self) -> int:
        """Numbers of the weight as a model counts them: all of a base's, and the pair's."""
        return sum(map(self.numbers_in, ("_base", "_a", "_b")))

    def numbers_in(self, suffix: str) -> int:
        """Those that one leaf holds: packed codes all of their matrix's, whatever their bytes; the scales beside them none."""
        held = {f"_{side}": math.prod(shape) for side, shape in self.sides}
        if self.base:
            held["_base"] = self.out_features * self.in_features
        return held.get(suffix, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the leaves."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def packed(self, part: str, leaves: Mapping[str, Any], call: Callable[..., Any] = run) -> list[Any]:
        """The packed tensors of "base", "a" or "b" as the kernels take them, from the stored leaves by suffix."""
        form = self.format_of(part)
        assert form is not None
        shape = (self.out_features, self.in_features) if part == "base" else dict(self.sides)[part]
        specs = form.specs(shape, self.torch_dtype)
        out = []
        for key, suffix in zip(form.keys, self.suffixes(part), strict=True):
            leaf = leaves[suffix]
            leaf = call("view", leaf, specs[key].dtype) if specs[key].dtype.is_floating_point else leaf
            out.append(leaf if specs[key].shape else call("squeeze", leaf, 0))
        return out

    def read(self, leaves: Mapping[str, Any], call: Callable[..., Any] = run, dtype: torch.dtype | None = None) -> Any:
        """The dense weight, in the layout it was stored in.

        Args:
            leaves: by suffix; tensors, or the nodes of a graph.
            call: computes a call (`run`), or writes it into a graph.
            dtype: of what has a packed part, which keeps none of its own when a model is cast; None: as planned.
        """
        dtype = dtype or self.torch_dtype
        if self.base is None:
            a, b = (self.side(side, leaves, dtype, call) for side, _ in self.sides)
            product = call(torch.matmul, b, a)
            return call("t", product) if self.stored_in_out else product
        a, b = (leaves["_a"], leaves["_b"]) if self.rank is not None else (None, None)
        base = self.format_of("base")
        if base is None:
            held, layout, group = [self.dense_base(leaves, call)], DENSE, 0
        else:
            held, layout, group = self.packed("base", leaves, call), base.layout, base.group
        product = call(compose, held, layout, group, self.in_features, dtype, a, b, self.scale)
        return call("t", product) if self.stored_in_out else product

    def linear(self, x: torch.Tensor, leaves: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """x · Wᵀ + bias without ever forming W, the sides of a pair in x's dtype: (..., in_features) -> (..., out_features)."""
        if self.base is None and self.factors is None:
            return lowrank_linear.reference(x, leaves["_a"], leaves["_b"], bias)
        if self.base is None:
            parts = []
            for side, _ in self.sides:
                form = self.format_of(side)
                assert form is not None
                parts += [self.packed(side, leaves), form.layout, form.group]
            return lowrank_quant_linear(x, *parts, bias)
        form = self.format_of("base")
        if form is None:
            base = F.linear(x, self.dense_base(leaves), bias)
        elif self.rank is None:
            return quant_linear(x, self.packed("base", leaves), form.layout, form.group, bias)
        a, b = leaves["_a"].to(x.dtype), leaves["_b"].to(x.dtype)
        if form is None:
            return base + self.scale * F.linear(F.linear(x, a), b)
        packed = self.packed("base", leaves)
        return quant_lowrank_linear(x, packed, form.layout, form.group, a, b, self.scale, bias)

    def dense_base(self, leaves: Mapping[str, Any], call: Callable[..., Any] = run) -> Any:
        """A dense base as (out_features, in_features)."""
        return call("t", leaves["_base"]) if self.stored_in_out else leaves["_base"]

    def side(self, side: str, leaves: Mapping[str, Any], dtype: torch.dtype, call: Callable[..., Any] = run) -> Any:
        """Side "a" (rank, in_features) or "b" (out_features, rank) of a pair: a plain one as stored, a packed one in `dtype`."""
        form = self.format_of(side)
        if form is None:
            return leaves[f"_{side}"]
        columns = dict(self.sides)[side][1]
        return call(
            compose,
            self.packed(side, leaves, call),
            form.layout,
            form.group,
            columns,
            dtype,
            None,
            None,
            1.0,
        )

    def __str__(self) -> str:
        pair = "" if self.rank is None else f"rank {self.rank}" + (f" in {self.factors}" if self.factors else "")
        return " + ".join(part for part in (self.base, pair) if part)
