"""What a comparison of twins is made of, read from its TOML file.

seeds = [0, 1, 2]              the first one chooses the learning rates
[run]                          what all runs are told, as `lrcompile pretrain` reads it
steps = 500
run.data.train = "data/corpus/train"
[variants.dense-muon]          changes to that: any setting
recipe.dense = true
optimizer.name = "muon"
grid."optimizer.lr" = [3e-3, 6e-3]     tried on the first seed; with several keys every combination
[variants.pairs-muon]
optimizer.name = "muon"
grid."optimizer.lr" = [3e-3, 6e-3]
[variants.pairs-muon-longer]
like = "pairs-muon"            its settings, at its chosen rate ...
budget = "flops"               ... for as many steps as take the best dense twin's FLOPs ("seconds": its time)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrcompile.errors import TrainError
from lrcompile.train.config import changed, parse
from lrcompile.train.settings import Run

BUDGETS = ("flops", "seconds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_COMMON = ("steps", "batch", "seed", "data", "out")  # settings that all variants share

Choice = dict[str, Any]  # dotted name of a setting -> its value


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared.

    Attributes:
        name: of it.
        run: its settings, but for those of the grid.
        grid: the choices among which its learning rate is found; one, empty, where there is nothing to choose.
        like: the variant that it goes on as for longer; None for those compared at equal tokens.
        budget: "flops" or "seconds": what it spends as much of as the best dense twin.
    """

    name: str
    run: Run
    grid: tuple[Choice, ...] = ({},)
    like: str | None = None
    budget: str | None = None

    @property
    def dense(self) -> bool:
        return self.run.recipe.dense

    def chosen(self, choice: Choice) -> Run:
        """Its settings with a choice of the grid made.

        Raises:
            TrainError: a setting that there isn't, or a value that it can't have.
        """
        tables: dict[str, Any] = {}
        for name, value in choice.items():
            *path, last = name.split(".")
            table = tables
            for part in path:
                table = table.setdefault(part, {})
            table[last] = value
        return changed(self.run, tables, f"variant {self.name}, grid")


@dataclass(frozen=True)
class Twins:
    """A comparison.

    Attributes:
        seeds: of drawn weights and order of the data; the first one chooses the learning rates.
        variants: those at equal tokens first.
    """

    seeds: tuple[int, ...]
    variants: tuple[Variant, ...] = field(default=())


def label(choice: Choice) -> str:
    """ "optimizer.lr=0.003", as a name of a directory; "as-set" where there is nothing to choose."""
    return ",".join(f"{name}={value}" for name, value in choice.items()) or "as-set"


def read(path: str | Path, *, data: str | None = None, quick: bool = False) -> Twins:
    """A comparison's file.

    Args:
        path: TOML, YAML or JSON.
        data: directory of `lrcompile data`, instead of the file's.
        quick: a few steps, two seeds and two choices a variant.

    Raises:
        TrainError: the file can't be read, has an unknown key, or asks for what makes no comparison.
    """
    given = parse(Path(path))
    _known(given, ("seeds", "run", "variants"), str(path))
    seeds = given.get("seeds", [0])
    if not _whole(seeds) or len(set(seeds)) < len(seeds):
        raise TrainError(f"{path}: seeds={seeds!r} must be a list of different whole numbers, as [0, 1, 2]")
    base = changed(Run.pretrain_defaults(), _table(given, "run", str(path)), f"{path}, run")
    if data is not None:
        base = replace(base, data=replace(base.data, train=f"{data}/train", validation=f"{data}/validation"))
    if not base.data.train or not base.data.validation or not base.model.source:
        raise TrainError(
            f"{path}: run needs model.source, data.train and data.validation: the held-out loss is compared"
        )
    if quick:
        base = replace(base, steps=4, schedule=replace(base.schedule, name="linear", warmup=1))
        base = replace(base, evaluate=replace(base.evaluate, every=2, batches=1))
    variants: dict[str, Variant] = {}
    for name, table in _table(given, "variants", str(path)).items():
        if not _NAME.fullmatch(name) or not isinstance(table, Mapping):
            raise TrainError(f"{path}: variants.{name} must be a table, and its name of letters, digits, - and _")
        variants[name] = _variant(name, dict(table), base, variants, f"{path}, variants.{name}", quick)
    plain = [v for v in variants.values() if v.like is None]
    if not any(v.dense for v in plain) or all(v.dense for v in plain):
        raise TrainError(
            f"{path}: twins are a variant with recipe.dense = true and one without; there are {len(plain)}"
        )
    return Twins(tuple(seeds[:2] if quick else seeds), (*plain, *(v for v in variants.values() if v.like is not None)))


def _variant(
    name: str, table: dict[str, Any], base: Run, before: Mapping[str, Variant], where: str, quick: bool
) -> Variant:
    like, budget, grid = (table.pop(key, None) for key in ("like", "budget", "grid"))
    if like is not None or budget is not None:
        if like not in before or before[like].like is not None or before[like].dense or budget not in BUDGETS:
            raise TrainError(
                f"{where}: like={like!r} must name a variant above that trains pairs, and budget={budget!r} "
                f"one of {', '.join(BUDGETS)}"
            )
        if table or grid is not None:
            raise TrainError(
                f"{where}: it is like {like}, and changes the number of steps alone; leave {', '.join(table) or 'grid'} out"
            )
        return Variant(name, before[like].run, like=like, budget=budget)
    fixed = [key for key in _COMMON if key in table]
    if fixed:
        raise TrainError(f"{where}: {', '.join(fixed)} must be the same for all; set it under run")
    variant = Variant(name, changed(base, table, where), _choices(grid, where))
    for choice in variant.grid:
        if any(key.partition(".")[0] in _COMMON for key in choice):
            raise TrainError(f"{where}: the grid can't change what must be the same for all: {', '.join(choice)}")
        variant.chosen(choice).recipe.make()
    return replace(variant, grid=variant.grid[:2]) if quick else variant


def _choices(grid: Any, where: str) -> tuple[Choice, ...]:
    """Every combination; nested tables are dotted names too."""
    if grid is None:
        return ({},)
    lists = _dotted(grid) if isinstance(grid, Mapping) else {}
    if not lists or not all(isinstance(values, list) and values for values in lists.values()):
        raise TrainError(f'{where}: grid must be a table of lists, as grid."optimizer.lr" = [1e-3, 3e-3]')
    return tuple(dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _known(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in table if key not in known]:
        raise TrainError(f"{where}: {unknown[0]} is unknown; known are {', '.join(known)}")


def _table(given: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    table = given.get(name)
    if not isinstance(table, Mapping) or not table:
        raise TrainError(f"{where} needs a table {name}")
    return table


def _whole(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int and v >= 0 for v in values)
