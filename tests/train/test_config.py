"""A run's settings: precedence, errors that name the place and the fix, keeping and comparing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from lrcompile import Recipe
from lrcompile.errors import RecipeError, TrainError
from lrcompile.train.config import (
    FREE,
    Flags,
    Model,
    Optimizer,
    RecipeTable,
    Run,
    differences,
    fingerprint,
    load_resolved,
    read,
    read_file,
    save_resolved,
    settings,
)
from lrcompile.train.settings import Data, Parallel, Schedule

BASE = """
steps = 500
[model]
source = "config.json"
[data]
train = "shards"
[recipe]
compression = 3
[optimizer]
lr = 1e-3
"""


def write(folder: Path, text: str = BASE, name: str = "run.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_command_line_is_over_the_file_and_the_file_over_the_commands_defaults(tmp_path: Path) -> None:
    path = write(tmp_path)
    run, flags = read("pretrain", [path, "--optimizer.weight-decay", "0.05", "--steps", "600"])
    assert (run.steps, run.optimizer.lr, run.optimizer.weight_decay) == (600, 1e-3, 0.05)
    assert run.optimizer.betas == Run.pretrain_defaults().optimizer.betas
    assert flags == Flags()
    tuned, _ = read("finetune", [path, "--recipe.compression", "None"])
    assert (tuned.optimizer.lr, tuned.optimizer.betas) == (1e-3, Run.finetune_defaults().optimizer.betas)
    assert tuned.recipe.make() == Recipe.finetune()


def test_the_file_may_stand_behind_the_options(tmp_path: Path) -> None:
    run, flags = read("pretrain", ["--dry-run", write(tmp_path), "--resume"])
    assert run.steps == 500
    assert flags.dry_run and flags.resume


def test_without_a_file(tmp_path: Path) -> None:
    run, _ = read("pretrain", ["--model.source", "m.json", "--data.train", "shards", "--batch", "64"])
    assert run == dataclasses.replace(
        Run.pretrain_defaults(), model=Model(source="m.json"), data=Data(train="shards"), batch=64
    )


def test_toml_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    # 1e-3 has no point: YAML 1.1 would take it for a text
    yaml = "steps: 500\nmodel: {source: config.json}\ndata: {train: shards}\nrecipe: {compression: 3}\noptimizer: {lr: 1e-3}\n"
    given = {"steps": 500, "model": {"source": "config.json"}, "data": {"train": "shards"}}
    given |= {"recipe": {"compression": 3}, "optimizer": {"lr": 1e-3}}
    paths = [write(tmp_path), write(tmp_path, yaml, "run.yaml"), write(tmp_path, json.dumps(given), "run.json")]
    toml, *others = (read_file(path, Run()) for path in paths)
    assert toml.optimizer.lr == 1e-3
    assert others == [toml, toml]


def test_lists_and_infinity_from_a_file(tmp_path: Path) -> None:
    text = 'clip = inf\n[recipe]\nexclude = ["*.attn.*"]\ntrainable = []\n[evaluate]\nprompts = ["a", "b"]\n'
    run = read_file(write(tmp_path, text), Run())
    assert math.isinf(run.clip or 0)
    assert run.recipe.exclude == ("*.attn.*",)
    assert run.recipe.trainable == ()
    assert run.evaluate.prompts == ("a", "b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step = 3", ["step is no setting", "did you mean steps?", "known: model, recipe"]),
        ("[optimizer]\nlrr = 1", ["optimizer.lrr is no setting", "did you mean lr?", "known: name, lr, factor_lr"]),
        ("[zzz]\nlr = 1", ["zzz is no setting; known:"]),
        ('steps = "3"', ["steps='3'", "integer"]),
        ("steps = 3.5", ["steps=3.5", "integer"]),
        ("steps = true", ["steps=True", "integer"]),
        ('optimizer = "adamw"', ["optimizer must be a table of settings, got 'adamw'"]),
        ('[optimizer]\nname = "sgd"', ["optimizer.name='sgd'", "'adamw'", "'spectron'"]),
        ("[optimizer]\nbetas = [0.9]", ["optimizer.betas"]),
        ('[recipe]\ninclude = "*"', ["recipe.include='*'"]),
        ("[optimizer]\nlr = 0", ["optimizer.lr=0.0", "above 0"]),
        ("[optimizer]\nlrr = 1\n[schedule]\nwarmpu = 3", ["optimizer.lrr", "schedule.warmpu"]),
        ("steps = 3\nsteps = 4\n\n", ["can't be parsed", "line 2"]),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_file_and_place(tmp_path: Path, text: str, told: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TrainError) as error:
        read_file(path, Run())
    for part in (path, *told):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_key_that_is_there_twice(tmp_path: Path, name: str) -> None:
    text = '{"log": {"every": 3, "every": 4}}'
    with pytest.raises(TrainError, match="can't be parsed: 'every' is there twice"):
        read_file(write(tmp_path, text, name), Run())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="can't read the config .*No such file"):
        read("pretrain", [str(tmp_path / "none.toml")])
    with pytest.raises(TrainError, match=r"its name must end in .toml, .yaml"):
        read("pretrain", [write(tmp_path, "", "run.txt")])
    with pytest.raises(TrainError, match="holds no table"):
        read_file(write(tmp_path, "- a\n", "list.yaml"), Run())
    with pytest.raises(TrainError, match="can't be parsed"):
        read_file(write(tmp_path, "a: [", "broken.yml"), Run())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Run(steps=0), "steps=0: must be 1 or more"),
        (lambda: Run(batch=9, micro_batch=4), "batch=9: must be a multiple of micro_batch, 4"),
        (lambda: Run(steps=50), "schedule.warmup=100: must be below steps, 50"),
        (
            lambda: Run(steps=1000, schedule=Schedule("wsd", warmup=300, decay=0.8)),
            "schedule.decay=0.8: .* at most 0.7",
        ),
        (lambda: Run(clip=0.0), "clip=0.0: must be above 0"),
        (lambda: Run(out=""), "out='': must name a directory"),
        (lambda: Data(length=1), "data.length=1"),
        (lambda: Optimizer(lr=float("nan")), "optimizer.lr=nan"),
        (lambda: Optimizer(betas=(0.9, 1.0)), r"optimizer.betas=\(0.9, 1.0\)"),
        (lambda: Optimizer(rates={"*attn*": 0.0}), r"optimizer.rates\['\*attn\*'\]=0.0: must be above 0"),
        (lambda: Optimizer("muon", nesterov=True), "optimizer.nesterov=True: is spectron's"),
        (lambda: Schedule(final=2), "schedule.final=2"),
        (lambda: Parallel(shard=0), "parallel.shard=0"),
    ],
)
def test_values_out_of_range(make: object, told: str) -> None:
    with pytest.raises(TrainError, match=told):
        make()  # type: ignore[operator]


def test_the_command_line_is_checked_likewise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainError, match="batch=32: must be a multiple of micro_batch, 5"):
        read("pretrain", [write(tmp_path), "--micro-batch", "5"])
    with pytest.raises(SystemExit) as stop:
        read("pretrain", [write(tmp_path), "--optimizer.lrr", "5"])
    assert stop.value.code == 2
    assert "--optimizer.lr " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--optimizer.rates", "--recipe.shares"])
def test_a_glob_that_is_given_twice(option: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=rf"{option} \*attn\* stands there more than once"):
        read("pretrain", [write(tmp_path), option, "*attn*", "2", "*mlp*", "1", "*attn*", "3", "--steps", "500"])
    with pytest.raises(TrainError, match=rf"{option} \*attn\* stands there more than once"):
        read("pretrain", [write(tmp_path), f"{option}=*attn*", "2", "*attn*", "3"])
    with pytest.raises(TrainError, match=f"{option} stands there more than once; give all its globs behind one"):
        read("pretrain", [write(tmp_path), option, "*attn*", "2", option, "*mlp*", "2"])
    read("pretrain", [write(tmp_path), option, "*attn*", "2", "*mlp*", "2"])


def test_what_is_missing_is_told() -> None:
    with pytest.raises(TrainError, match="model.source is not set"):
        read("pretrain", ["--data.train", "x"])
    with pytest.raises(TrainError, match="data.train is not set.*lrcompile data"):
        read("pretrain", ["--model.source", "x"])
    read("pretrain", ["--model.source", "x", "--dry-run"])  # needs no data
    with pytest.raises(TrainError, match="of a dry run"):
        read("pretrain", ["--model.source", "x", "--data.train", "x", "--target", "H100"])
    with pytest.raises(TrainError, match="ranks=0"):
        read("pretrain", ["--model.source", "x", "--dry-run", "--ranks", "0"])


def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        read("finetune", ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in settings(Run()):
        assert f"--{name.replace('_', '-')}" in text, name
    for part in (
        "torchrun --nproc-per-node 8",
        "--resume",
        "--dry-run",
        "Learning rate at the schedule's top. (default: 0.0003)",
    ):
        assert part in text


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        read("pretrain", ["--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match(r"--\w", line)]
    assert len(options) == len(settings(Run())) + len(dataclasses.fields(Flags))
    assert [lines[i] for i in options if not re.match(r"[A-Z]|\w+; ", lines[i + 1])] == []


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_table_has_the_recipes_fields() -> None:
    own = {f.name for f in dataclasses.fields(RecipeTable)} - {"dense", "preset"}
    assert own == {f.name for f in dataclasses.fields(Recipe)} - {"passes"}


def test_what_a_recipe_table_makes() -> None:
    assert RecipeTable().make() == Recipe.pretrain() and RecipeTable(shares={}).make() == Recipe(compression=2.64)
    assert RecipeTable(preset="finetune").make() == Recipe.finetune()
    assert RecipeTable(preset="finetune", rank=8, weights="dense").make() == Recipe.finetune(rank=8, weights="dense")
    assert RecipeTable(preset="compress", exclude=("a",)).make() == Recipe.compress(exclude=("a",))
    assert RecipeTable(dense=True, compression=4).make() is None


def test_a_dial_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    run, _ = read("pretrain", [write(tmp_path), "--recipe.rank-ratio", "0.25"])
    assert run.recipe.make() == Recipe(rank_ratio=0.25)
    with pytest.raises(RecipeError, match="set one of"):
        read("pretrain", [write(tmp_path), "--recipe.rank-ratio", "0.25", "--recipe.rank", "8"])


def test_a_senseless_recipe_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="init='nope' is not known"):
        read("pretrain", [write(tmp_path), "--recipe.init", "nope"])


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_layout() -> None:
    run = Run(batch=32, micro_batch=4)
    assert run.layout(1) == (1, 1, 4, 8)
    assert run.layout(4) == (1, 4, 4, 2)
    assert dataclasses.replace(run, parallel=Parallel(replicate=2)).layout(4) == (2, 2, 4, 2)
    assert Run(batch=16, micro_batch=16).layout(4) == (1, 4, 4, 1)  # no more than a rank's share
    with pytest.raises(TrainError, match="3 ranks that take micro_batch=4 at once: make it a multiple of 12"):
        run.layout(3)
    with pytest.raises(TrainError, match="replicate=1 times parallel.shard=3 is 3, and there are 4"):
        dataclasses.replace(run, parallel=Parallel(shard=3)).layout(4)
    with pytest.raises(TrainError, match="replicate=3"):
        dataclasses.replace(run, parallel=Parallel(replicate=3)).layout(4)


@pytest.mark.parametrize(
    "recipe", [RecipeTable(), RecipeTable(compression=4), RecipeTable(rank=8), RecipeTable(dense=True)]
)
def test_a_run_kept_before_there_were_shares_has_none(recipe: RecipeTable, tmp_path: Path) -> None:
    """It goes on with the ranks that it had, where it is told so, or not at all."""
    path, run = tmp_path / "config.json", Run(recipe=recipe)
    save_resolved(run, path)
    told = json.loads(path.read_text())
    del told["run"]["recipe"]["shares"]
    path.write_text(json.dumps(told))
    if recipe.rank is not None or recipe.dense:  # nothing is shared: it is the same run
        assert differences(load_resolved(path), run) == []
        return
    message = "recipe.shares was empty (as --recipe.shares and nothing after it), is not set"
    assert differences(load_resolved(path), run) == [message]
    uniform = dataclasses.replace(run, recipe=dataclasses.replace(recipe, shares={}))
    assert differences(load_resolved(path), uniform) == []


# --- kept with the run ------------------------------------------------------------------------------------------------


def test_a_resolved_run_reads_back_whatever_the_command(tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    run, _ = read(
        "pretrain", [write(tmp_path), "--clip", "None", "--recipe.exclude", "a", "b", "--evaluate.prompts", "x y"]
    )
    assert run.clip is None
    save_resolved(run, path)
    assert load_resolved(path) == run
    assert read("finetune", [path])[0] == run
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def test_a_truncated_resolved_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_resolved(Run(), path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(TrainError, match="can't be parsed"):
        load_resolved(path)
    with pytest.raises(TrainError, match="can't write .*no such dir.*run.json: No such file"):
        save_resolved(Run(), tmp_path / "no such dir" / "run.json")


def test_differences_are_told_in_words() -> None:
    old = Run(data=Data(length=256), recipe=RecipeTable(exclude=("a",)))
    new = Run(data=Data(length=512), optimizer=Optimizer(lr=1e-3))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "recipe.exclude was [a], is not set",
        "data.length was 256, is 512",
        "optimizer.lr was 0.0006, is 0.001",
    ]


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    old = Run.pretrain_defaults()
    free = [
        "--out",
        "x",
        "--steps",
        "2000",
        "--log.every",
        "3",
        "--save.keep",
        "5",
        "--parallel.shard",
        "2",
        "--micro-batch",
        "4",
    ]
    run, _ = read("pretrain", ["--model.source", "elsewhere", "--data.train", "moved", *free])
    assert differences(old, run) == []
    told = {name for name in settings(old) if name in FREE or name.partition(".")[0] in FREE}
    assert set(fingerprint(old)) == set(settings(old)) - told
    assert {"seed", "batch", "clip", "parallel.precision", "model.dtype", "recipe.rank"} <= set(fingerprint(old))
    assert all(name in settings(old) or name in {f.name for f in dataclasses.fields(Run)} for name in FREE)
