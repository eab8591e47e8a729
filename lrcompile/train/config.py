"""A run's settings from a file and the command line, kept with the run, and compared when it is resumed."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.files import commit
from lrcompile.recipe import DIALS
from lrcompile.train.settings import (
    Data,
    Evaluate,
    Log,
    Model,
    Optimizer,
    Parallel,
    RecipeTable,
    Run,
    Save,
    Schedule,
)

Command = Literal["pretrain", "finetune"]
SUFFIXES = (".toml", ".yaml", ".yml", ".json")
FORMAT = "lrcompile-run/1"
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True)
class Flags:
    """What is done with the settings, and no part of them."""

    dry_run: bool = False
    """Print the plan, parameters, bytes a rank, FLOPs and expected tokens/s, and stop: no weights, no data."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; begin where there is none yet. Without it, a directory that holds a run
    is refused."""
    ranks: int | None = None
    """Of a dry run: how many ranks to tell of; None: those that torchrun started, or one."""
    target: str | None = None
    """Of a dry run: the GPU of the cost table to expect tokens/s of ("H100"); None: the one at hand."""


_ABOUT = {
    "pretrain": "Train a model from scratch, its linear weights as low-rank pairs.",
    "finetune": "Finetune a model, its linear weights as frozen 4-bit bases with trained low-rank pairs beside them.",
}

_HELP = """\
CONFIG is a TOML, YAML or JSON file of the settings below, which the command line overrides: --optimizer.lr stands as \
lr under [optimizer] there. Unknown settings are errors. Paths are taken from the current directory.

examples:
  lrcompile {0} {1} --dry-run
  lrcompile {0} {1} --out out/first --optimizer.lr 1e-3
  lrcompile {0} {1} --out out/dense --recipe.dense
  lrcompile {0} {1} --out out/first --resume
  torchrun --nproc-per-node 8 -m lrcompile.cli {0} {1}
  lrcompile {0} {1} --dry-run --ranks 64 --target H100"""

_EXAMPLE = {"pretrain": "examples/configs/cpu-tiny.toml", "finetune": "examples/configs/financial/ours.toml"}


def read(command: Command, argv: Sequence[str]) -> tuple[Run, Flags]:
    """The settings that a command line asks for: the command's defaults, under its file's, under its own.

    Args:
        command: "pretrain" or "finetune".
        argv: [CONFIG, options...], as after `lrcompile pretrain`. `--help` prints and exits, as does an unknown option.

    Raises:
        TrainError: no such file, an unknown key, a wrong type or value; named with its path, and the fix.
        RecipeError: the recipe makes no sense.
    """
    tyro = _library("tyro")

    unnamed = tyro.conf.arg(name="")
    parts = [("run", Annotated[Run, unnamed]), ("flags", Annotated[Flags, unnamed, tyro.conf.FlagCreatePairsOff])]
    everything = make_dataclass("Everything", parts, frozen=True)
    argv, path = _take_path(argv)
    _check_once(argv)
    start = Run.pretrain_defaults() if command == "pretrain" else Run.finetune_defaults()
    base = start if path is None else read_file(path, start)
    description = f"{_ABOUT[command]}\n\n{_HELP.format(command, _EXAMPLE[command])}"
    told = tyro.cli(
        everything,
        prog=f"lrcompile {command} [CONFIG]",
        description=description,
        args=argv,
        default=everything(base, Flags()),
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    run = replace(told.run, recipe=_one_dial(base.recipe, told.run.recipe))
    run.recipe.make()  # raises what is wrong with it
    _check_complete(run, told.flags)
    return run, told.flags


def _take_path(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without the config file, and that: the first argument, or the one that ends like one of those."""
    rest = list(argv)
    if rest and not rest[0].startswith("-"):
        return rest[1:], rest[0]
    # No option takes a TOML or YAML file, so one that stands behind the options can be nothing else.
    named = [a for a in rest if a.endswith((".toml", ".yaml", ".yml")) and not a.startswith("-")]
    if len(named) == 1:
        rest.remove(named[0])
        return rest, named[0]
    return rest, None


def _check_once(argv: Sequence[str]) -> None:
    """Refuse a table that is given twice, or a glob in it: only the last would be taken."""
    tables = ("--optimizer.rates", "--recipe.shares")
    argv = [word for given in argv for word in (given.split("=", 1) if given.startswith(tables) else [given])]
    for option in tables:
        if argv.count(option) > 1:
            raise TrainError(f"{option} stands there more than once; give all its globs behind one")
        if option in argv:
            behind = argv[argv.index(option) + 1 :]
            globs = [*itertools.takewhile(lambda word: not word.startswith("--"), behind)][::2]
            if twice := next((glob for glob in globs if globs.count(glob) > 1), None):
                raise TrainError(f"{option} {twice} stands there more than once; leave one of them")


def _one_dial(base: RecipeTable, told: RecipeTable) -> RecipeTable:
    """Where the command line turns another dial than the file, the file's is let go."""
    new = [d for d in DIALS if getattr(told, d) is not None and getattr(told, d) != getattr(base, d)]
    old = [d for d in DIALS if getattr(base, d) is not None and d not in new]
    let_go: dict[str, Any] = dict.fromkeys(old)
    return replace(told, **let_go) if new else told


def _check_complete(run: Run, flags: Flags) -> None:
    if not run.model.source:
        raise TrainError("model.source is not set: name a config.json, a model directory, or module:factory")
    if not run.data.train and not flags.dry_run:
        raise TrainError("data.train is not set: name a directory of shards, which `lrcompile data` writes")
    if (flags.ranks is not None or flags.target is not None) and not flags.dry_run:
        raise TrainError("--ranks and --target are of a dry run: add --dry-run, or leave them out")
    if flags.ranks is not None and flags.ranks < 1:
        raise TrainError(f"ranks={flags.ranks}: must be 1 or more")


# --- files ------------------------------------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str], start: Run) -> Run:
    """The settings of a TOML, YAML or JSON file, over others.

    Raises:
        TrainError: the file can't be read, has an unknown key, or a value of a wrong type or out of range.
    """
    return changed(start, parse(Path(path)), str(path))


def changed(start: Run, given: Mapping[str, Any], where: str) -> Run:
    """Settings with tables of changes laid over them.

    Args:
        start: what is changed.
        given: as a config file has them: {"steps": 100, "optimizer": {"lr": 1e-3}}.
        where: they come from, for messages.

    Raises:
        TrainError: an unknown key, a value of a wrong type or out of range.
    """
    pydantic = _library("pydantic")
    merged = _merge(asdict(start), given)
    try:
        # Through JSON, whose lists pydantic takes for tuples while it stays strict about everything else.
        run: Run = pydantic.TypeAdapter(Run).validate_json(json.dumps(merged, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise TrainError(f"{where}: " + "; ".join(_wrong(e) for e in error.errors())) from error
    except TrainError as error:
        raise TrainError(f"{where}: {error}") from error
    return run


def parse(path: Path) -> dict[str, Any]:
    """A TOML, YAML or JSON file's tables.

    Raises:
        TrainError: it can't be read or parsed, or its name ends otherwise.
    """
    if path.suffix not in SUFFIXES:
        raise TrainError(f"{path} is no config: its name must end in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TrainError(f"can't read the config {path}: {reason}") from error
    try:
        given = _PARSERS[path.suffix](text)
    except Exception as error:  # each library has its own
        raise TrainError(f"{path} can't be parsed: {error}") from error
    if path.suffix == ".json" and isinstance(given, dict) and given.get("format") == FORMAT:
        given = given.get("run")
    if not isinstance(given, dict):
        raise TrainError(f"{path} holds no table of settings")
    return given


def _toml(text: str) -> Any:
    return _library("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)


def _yaml(text: str) -> Any:
    yaml = _library("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            return _once(self.construct_pairs(node, deep=True))

    given = yaml.load(text, Loader)

    # YAML 1.1 takes 3e-4 for a text, since it has no point: numbers are what look like numbers, as everywhere else.
    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value

    return numbers(given)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """A table of pairs, each key once: TOML sees to it, YAML and JSON take the last without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[str(key)] = value
    return found


_PARSERS = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        known = merged.get(name)
        merged[name] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _wrong(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    *around, name = [str(part) for part in error["loc"]]
    path = ".".join([*around, name])
    if error["type"] == "unexpected_keyword_argument":
        part: Any = Run()
        for step in around:
            part = getattr(part, step)
        known = [f.name for f in fields(part)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{path} is no setting; {hint}known: {', '.join(known)}"
    if error["type"] == "dataclass_type":
        return f"{path} must be a table of settings, got {error['input']!r}"
    message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{path}={error['input']!r}: must be {message}"


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f'training needs {name}: pip install "lrcompile[train]" ({error})') from error


# --- kept with the run ------------------------------------------------------------------------------------------------


def save_resolved(run: Run, path: str | os.PathLike[str]) -> None:
    """Write every setting of a run as JSON, which `read` and `read_file` take again; whole or not at all.

    Raises:
        TrainError: it can't be written.
    """
    text = json.dumps({"format": FORMAT, "run": asdict(run)}, indent=1)
    try:
        commit(Path(path), (text + "\n").encode())
    except OSError as error:
        raise TrainError(f"can't write {path}: {error.strerror}") from error


def load_resolved(path: str | os.PathLike[str]) -> Run:
    """What save_resolved wrote.

    Raises:
        TrainError: the file is missing, truncated or of another version.
    """
    given = parse(Path(path))
    run = changed(Run(), given, str(path))
    table, recipe = given.get("recipe"), run.recipe.make()
    if isinstance(table, dict) and "shares" not in table and recipe is not None and recipe.shares:
        # Written before there were shares, when all weights had the same: the preset's of today are no part of that run.
        run = replace(run, recipe=replace(run.recipe, shares={}))
    return run


# What may change between a run and its continuation: where things are, how long it goes on, what is told and kept, and
# what changes sums by rounding alone. Data and model are known by their contents, which the driver compares.
FREE = (
    *(
        "model.source",
        "data.train",
        "data.validation",
        "out",
        "steps",
        "micro_batch",
        "bad_loss",
        "log",
        "save",
        "evaluate",
    ),
    *("parallel.shard", "parallel.replicate", "parallel.compile", "parallel.kernels", "parallel.checkpoint"),
)


def settings(run: Run) -> dict[str, Any]:
    """Every setting by its dotted name: {"optimizer.lr": 0.0006, ...}."""

    def walk(part: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for f in fields(part):
            value = getattr(part, f.name)
            found |= walk(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
        return found

    return walk(run, "")


def fingerprint(run: Run) -> dict[str, Any]:
    """The settings that must not change when a run is resumed, by dotted name."""
    return {
        name: value for name, value in settings(run).items() if name not in FREE and name.partition(".")[0] not in FREE
    }


def differences(old: Run, new: Run) -> list[str]:
    """What keeps `new` from continuing `old` exactly, in words: ["data.length was 256, is 512"]; empty where nothing does."""
    was, now = fingerprint(old), fingerprint(new)
    changed = [name for name in was if was[name] != now[name]]
    return [f"{name} was {_told(was[name], name)}, is {_told(now[name], name)}" for name in changed]


def _told(value: Any, name: str) -> str:
    if value == {}:
        return f"empty (as --{name} and nothing after it)"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(str, value)) + "]"
    return "not set" if value is None else str(value)


__all__ = [
    "Command",
    "Data",
    "Evaluate",
    "Flags",
    "Log",
    "Model",
    "Optimizer",
    "Parallel",
    "RecipeTable",
    "Run",
    "Save",
    "Schedule",
    "changed",
    "differences",
    "fingerprint",
    "load_resolved",
    "parse",
    "read",
    "read_file",
    "save_resolved",
    "settings",
]
