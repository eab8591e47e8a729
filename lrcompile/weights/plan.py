"""The Plan: what the weight passes decided for every weight of a model, and whose Plan it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lrcompile.errors import LrcompileError, PlanError
from lrcompile.graph.names import parameter_names
from lrcompile.recipe import BASE_INITS, INITS, PAIR_DTYPES, PLAIN_INITS, SVD_METHODS
from lrcompile.weights.form import Form
from lrcompile.words import fold

FORMAT = "lrcompile-plan/1"
NO_SAVING = "a pair of rank"  # how the reason begins of a weight that stays dense because its pair would be no smaller


@dataclass
class Entry:
    """One weight.

    Attributes:
        names: its names in the model, tied names together.
        shape: as stored.
        dtype: as stored when planned, "float32".
        stored_in_out: stored (in_features, out_features), as Conv1D's, else (out_features, in_features).
        rank: of its pair; None where it stays dense.
        reason: why it stays dense.
        tokens: rows multiplied in one call on the example inputs, over all uses.
        error: relative Frobenius error of what stands in its place, once adopted; None before.
        base: "dense" or the number format of the frozen base; None without one.
        factors: the number format of the pair; None for a plain one.
        init: how the pair starts, one of `recipe.INITS`; means nothing without a pair.
        scale: of the pair's product.
        pair_dtype: of a pair beside a base; None: the weight's.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    stored_in_out: bool = False
    rank: int | None = None
    reason: str = ""
    tokens: int = 0
    error: float | None = None
    base: str | None = None
    factors: str | None = None
    init: str = "svd"
    scale: float = 1.0
    pair_dtype: str | None = None

    @property
    def form(self) -> Form | None:
        """What stands in its place; None where it stays dense."""
        return Form.of(asdict(self))

    @property
    def fate(self) -> str:
        """What becomes of it: "rank 64", "nf4 + rank 16", "dense"."""
        return str(self.form or "dense")

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
    def dense_numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def numel(self) -> int:
        """Numbers after adoption: a base's all, and the pair's."""
        form = self.form
        return self.dense_numel if form is None else form.numel

    @property
    def nbytes(self) -> int:
        """Bytes after adoption."""
        form = self.form
        return self.dense_numel * getattr(torch, self.dtype).itemsize if form is None else form.nbytes

    @property
    def flops(self) -> int:
        """FLOPs of one forward on the example inputs: 2 per multiply-add."""
        return 2 * self.tokens * self.numel


@dataclass
class Plan:
    """What becomes of a model's weights.

    Attributes:
        entries: every weight that the graphs multiply with or look up, planned or left dense.
        model: name -> shape of every parameter of the model: the fingerprint, readable.
        tied: groups of names that share one parameter.
        bytes_per_number: name -> bytes of one number as stored when planned.
        recipe: what was asked for (`Recipe.to_dict()`).
        breaks: where the trace broke, as Dynamo tells it.
    """

    entries: list[Entry]
    model: dict[str, tuple[int, ...]]
    tied: list[tuple[str, ...]] = field(default_factory=list)
    bytes_per_number: dict[str, int] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)

    @property
    def adopted(self) -> list[Entry]:
        """The entries that don't stay dense."""
        return [e for e in self.entries if e.rank is not None or e.base is not None]

    @property
    def left(self) -> list[Entry]:
        """The entries that were to become pairs, and stay dense because a pair would hold no fewer numbers."""
        # Where a pair of rank 1 would be no smaller, nobody asked for one.
        told = [e for e in self.entries if e.form is None and e.reason.startswith(NO_SAVING)]
        return [e for e in told if not e.reason.startswith(f"{NO_SAVING} 1 ")]

    @property
    def asked_compression(self) -> float:
        """Numbers in the adopted weights and in those `left` before, over those after: what Recipe(compression=) asks for."""
        after = sum(e.numel for e in (*self.adopted, *self.left))
        return sum(e.dense_numel for e in (*self.adopted, *self.left)) / after if after else 1.0

    @property
    def compression(self) -> float:
        """Numbers in the adopted weights before, over those after; 1 where nothing is adopted."""
        after = sum(e.numel for e in self.adopted)
        return sum(e.dense_numel for e in self.adopted) / after if after else 1.0

    @property
    def byte_compression(self) -> float:
        """Bytes of the adopted weights before, over those after; 1 where nothing is adopted."""
        after = sum(e.nbytes for e in self.adopted)
        before = sum(e.dense_numel * self.bytes_per_number.get(e.key, 4) for e in self.adopted)
        return before / after if after else 1.0

    @property
    def by_bytes(self) -> bool:
        """Whether number formats are part of it, so that bytes tell more than numbers."""
        return any(e.base or e.factors for e in self.adopted)

    def groups(self) -> list[list[Entry]]:
        """The entries, repeated layers of the same fate together."""
        groups: dict[Any, list[Entry]] = {}
        for e in self.entries:
            pattern = re.sub(r"\b\d+\b", "#", " = ".join(e.names))
            groups.setdefault((pattern, e.shape, e.fate, e.reason), []).append(e)
        return list(groups.values())

    def _totals(self) -> tuple[int, int, int, int]:
        skipped = {name for group in self.tied for name in group[1:]}
        before = {n: _numel(shape) for n, shape in self.model.items() if n not in skipped}
        after = dict(before)
        size = {n: self.bytes_per_number.get(n, 4) for n in before}
        stored = {n: before[n] * size[n] for n in before}
        kept = dict(stored)
        for e in self.adopted:
            after[e.key], kept[e.key] = e.numel, e.nbytes
        return sum(before.values()), sum(after.values()), sum(stored.values()), sum(kept.values())

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers in the whole model, before and after."""
        return self._totals()[:2]

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the whole model's parameters, before and after."""
        return self._totals()[2:]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and ties of the model it belongs to."""
        text = json.dumps([sorted((n, list(s)) for n, s in self.model.items()), sorted(map(list, self.tied))])
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, model: nn.Module) -> None:
        """Refuse another model.

        Raises:
            PlanError: naming the first difference.
        """
        shapes, tied = describe(model)
        for name, shape in self.model.items():
            if name not in shapes:
                raise PlanError(f"this Plan belongs to another model: it has a parameter {name!r}, this model has none")
            if shapes[name] != shape:
                raise PlanError(f"this Plan belongs to another model: {name!r} is {shape} there, {shapes[name]} here")
        for name in shapes:
            if name not in self.model:
                raise PlanError(
                    f"this Plan belongs to another model: this one has a parameter {name!r}, the Plan's has none"
                )
        if sorted(tied) != sorted(self.tied):
            odd = sorted(set(tied) ^ set(self.tied))[0]
            raise PlanError(f"this Plan belongs to another model: {' = '.join(odd)} are tied in one of them only")

    def to_json(self) -> str:
        """Readable JSON, with the fingerprint."""
        body = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A Plan from its JSON.

        Raises:
            PlanError: not JSON, not a Plan, or altered since it was written.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise PlanError(f"not a Plan: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PlanError(f"not a Plan of this version of lrcompile (its format is not {FORMAT!r})")
        try:
            plan = cls(
                entries=[
                    Entry(**{**e, "names": tuple(e["names"]), "shape": tuple(e["shape"])}) for e in body["entries"]
                ],
                model={n: tuple(s) for n, s in body["model"].items()},
                tied=[tuple(group) for group in body["tied"]],
                bytes_per_number=body["bytes_per_number"],
                recipe=body["recipe"],
                breaks=body["breaks"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"a Plan with a missing or unknown part: {error}") from error
        if plan.fingerprint != body.get("fingerprint"):
            raise PlanError("the Plan's model description was altered: its fingerprint doesn't match")
        _check_recipe(plan.recipe)
        seen: set[str] = set()
        for e in plan.entries:
            _check_entry(e, plan, seen)
        return plan

    def __str__(self) -> str:
        lines = []
        for group in self.groups():
            e, times = group[0], f" ×{len(group)}" if len(group) > 1 else ""
            fate = e.fate if e.form else f"dense, {e.reason}"
            lines.append(f"{group_name(group)} ({'x'.join(map(str, e.shape))}{times}): {fate}")
        made = f"{len(self.adopted)} of {len(self.entries)} weights"
        before, after = self.bytes if self.by_bytes else self.parameters
        told, unit = (
            (f"{made} are adopted, {self.byte_compression:.2f}x fewer bytes", "bytes")
            if self.by_bytes
            else (f"{made} become pairs, {self.compression:.2f}x", "numbers")
        )
        lines.append(f"{told}; whole model {before:,} -> {after:,} {unit}, {before / after:.2f}x")
        return "\n".join(lines)


def group_name(group: Sequence[Entry]) -> str:
    """The folded names of one group, ".weight" dropped, tied names joined."""
    columns = [fold(e.names[i].removesuffix(".weight") for e in group) for i in range(len(group[0].names))]
    return " = ".join(", ".join(column) for column in columns[:3]) + (" = …" if len(columns) > 3 else "")


def describe(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], list[tuple[str, ...]]]:
    """(name -> shape of every parameter, groups of tied names) of a model that isn't adopted."""
    groups = parameter_names(model)
    by_id = {id(p): p for p in model.parameters()}
    shapes = {name: tuple(by_id[key].shape) for key, names in groups.items() for name in names}
    return shapes, [names for names in groups.values() if len(names) > 1]


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _check_entry(e: Entry, plan: Plan, seen: set[str]) -> None:
    """Refuse what no planner wrote; a rank may be edited by hand, within what fits."""
    for name in e.names:
        if plan.model.get(name) != e.shape or name in seen:
            raise PlanError(f"the Plan says of {name!r} what doesn't go with its own description of the model")
        seen.add(name)
    named = " = ".join(e.names)
    whole = type(e.rank) is int and type(e.tokens) is int and type(e.stored_in_out) is bool
    if not e.names or (e.rank is not None and not (whole and len(e.shape) == 2 and 1 <= e.rank <= min(e.shape))):
        raise PlanError(f"{named}: rank {e.rank!r} doesn't fit a weight of shape {e.shape}")
    if e.init not in INITS:
        raise PlanError(f"{named}: init {e.init!r} is not known; choose from {', '.join(INITS)}")
    if e.pair_dtype not in (None, *PAIR_DTYPES):
        raise PlanError(f"{named}: pair_dtype {e.pair_dtype!r} is not known; choose from {', '.join(PAIR_DTYPES)}")
    number = type(e.scale) in (int, float) and 0 < e.scale < float("inf")
    if e.base and (len(e.shape) != 2 or e.factors or not number or (e.base == "dense" and e.rank is None)):
        raise PlanError(
            f"{named}: base {e.base!r} doesn't go with shape {e.shape}, factors {e.factors!r}, scale {e.scale!r}"
        )
    if e.base is None and e.rank is not None and (e.scale != 1 or e.pair_dtype is not None):
        raise PlanError(
            f"{named}: scale {e.scale!r} and pair_dtype {e.pair_dtype!r} are of a pair beside a base, and there is no base: "
            "write 1.0 and null, or name a base"
        )
    fitting = PLAIN_INITS if e.base is None else ("zero", "pissa") if e.base == "dense" else BASE_INITS
    if e.rank is not None and e.init not in fitting:
        raise PlanError(f"{named}: init {e.init!r} doesn't go with base {e.base!r}; choose from {', '.join(fitting)}")
    check_form(e)


def check_form(e: Entry) -> None:
    """Raise PlanError where a format can't hold what the entry says."""
    try:
        if e.form is not None:
            e.form.leaves  # noqa: B018  reads the formats, which refuse what they can't hold
    except (LrcompileError, AttributeError, TypeError) as error:
        raise PlanError(f"{' = '.join(e.names)}: {error}") from error


def _check_recipe(recipe: Any) -> None:
    """Refuse what adopting reads of a recipe and no Recipe says."""
    told = recipe if isinstance(recipe, dict) else {}
    trainable, turns = told.get("trainable"), told.get("alternations", 5)
    globs = trainable is None or (isinstance(trainable, (list, tuple)) and all(isinstance(g, str) for g in trainable))
    whole = type(turns) is int and turns >= 1
    if told is not recipe or told.get("svd", "auto") not in SVD_METHODS or not globs or not whole:
        raise PlanError(f"the Plan's recipe was altered: {recipe}")
