"""Runs from text to a model that others load: on one process and on several, dense, pairs, and pairs beside NF4 bases."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lrcompile
from lrcompile.cli import main
from lrcompile.sources import load_source

WORDS = "the state of the union is strong and the people of these states are free and the harvest was good".split()
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text and prompts, and a model's config."""
    place = tmp_path_factory.mktemp("driver")
    text = place / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(" ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(200 + 40 * i)))
    rows = [{"prompt": f"{a} {b} ", "completion": a} for a in WORDS for b in WORDS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--tokenizer", "bytes", "--workers", "1"]
    assert main(["data", str(text), "--out", str(place / "text-data"), "--validation", "0.1", *common]) == 0
    prompts = ["--kind", "prompts", "--out", str(place / "prompt-data")]
    assert main(["data", str(place / "rows.jsonl"), *prompts, *common]) == 0
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


def arguments(place: Path, out: Path, *more: str, data: str = "text-data") -> list[str]:
    told = {
        "--model.source": place / "config.json",
        "--data.train": place / data / "train",
        "--data.length": 32,
        "--steps": 6,
        "--batch": 8,
        "--micro-batch": 2,
        "--schedule.warmup": 2,
        "--optimizer.lr": 1e-2,
        "--parallel.precision": "float32",
        "--out": out,
    }
    return [*(str(x) for pair in told.items() for x in pair), "--parallel.no-compile", *more]


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out, "step")]


def on_ranks(count: int, arguments: list[str], cwd: Path, command: str = "pretrain") -> None:
    """Run the command line on several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    program = [sys.executable, "-m", "lrcompile.cli", command, *arguments]
    started = [
        subprocess.Popen(
            program,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            cwd=cwd,  # not the repository, whose folder lrcompile/ is not all of the package
            text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, errors[0][-3000:]


def test_from_text_to_a_model_that_others_load(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    more = ["--data.validation", str(place / "text-data" / "validation"), "--evaluate.every", "3"]
    more += [
        "--evaluate.batches",
        "2",
        "--evaluate.prompts",
        "the state",
        "--evaluate.new-tokens",
        "3",
        "--steps",
        "40",
    ]
    assert main(["pretrain", *arguments(place, out, *more)]) == 0
    assert len(losses(out)) == 40
    assert losses(out)[-1] < 0.8 * losses(out)[0]
    held_out = metrics(out, "eval")
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert [line["prompt"] for line in metrics(out, "sample")] == ["the state"] * 14  # every third step, and the last
    assert all(0 <= line["waited"] < line["seconds"] for line in metrics(out, "step"))

    dense, _ = load_source(str(place / "config.json"), device="cpu")
    small = lrcompile.load(out / "model", dense).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=2e-5)
    pairs = [name for name, _ in small.named_parameters() if name.endswith("weight_a")]
    assert len(pairs) == 14
    # The figures of a run are drawn from what it wrote.
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    assert "held-out" in (tmp_path / "report.html").read_text()


RECIPES = {
    "pairs": ("pretrain", []),
    "dense": ("pretrain", ["--recipe.dense"]),
    "nf4": ("finetune", ["--recipe.rank", "4", "--recipe.init", "pissa"]),
}


@pytest.mark.parametrize("recipe", ["pairs", "nf4"])
def test_ranks_agree_with_one_process(recipe: str, place: Path, tmp_path: Path) -> None:
    command, more = RECIPES[recipe]
    more = [*more, "--steps", "50", "--optimizer.lr", "1e-3"]
    assert main([command, *arguments(place, tmp_path / "one", *more)]) == 0
    on_ranks(2, arguments(place, tmp_path / "two", *more), tmp_path, command)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            # After 50 steps of at most 1e-3 each they differ by 1e-7: rounding alone.
            torch.testing.assert_close(two[name], value, rtol=0, atol=5e-6, msg=name)
        else:
            assert torch.equal(two[name], value), name


@pytest.mark.parametrize("recipe", ["pairs", pytest.param("dense", marks=pytest.mark.slow)])
def test_compiled_blocks_train_as_eager_ones(recipe: str, place: Path, tmp_path: Path) -> None:
    command, more = RECIPES[recipe]
    assert main([command, *arguments(place, tmp_path / "eager", *more)]) == 0
    compiled = [word for word in arguments(place, tmp_path / "compiled", *more) if word != "--parallel.no-compile"]
    assert main([command, *compiled]) == 0
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["block", "selective"])
def test_recomputing_changes_nothing(policy: str, place: Path, tmp_path: Path) -> None:
    assert main(["pretrain", *arguments(place, tmp_path / "kept")]) == 0
    assert main(["pretrain", *arguments(place, tmp_path / policy, "--parallel.checkpoint", policy)]) == 0
    assert losses(tmp_path / policy) == losses(tmp_path / "kept")


def test_micro_batches_change_nothing_but_rounding(place: Path, tmp_path: Path) -> None:
    assert main(["pretrain", *arguments(place, tmp_path / "small")]) == 0
    assert main(["pretrain", *arguments(place, tmp_path / "large", "--micro-batch", "8")]) == 0
    torch.testing.assert_close(losses(tmp_path / "small"), losses(tmp_path / "large"), rtol=0, atol=1e-5)


def test_the_twins_start_from_the_same_weights(place: Path) -> None:
    from lrcompile import Recipe
    from lrcompile.train.build import build
    from lrcompile.train.materialise import materialise

    made = {}
    tied = []
    for name, recipe in {"dense": None, "pairs": Recipe(compression=1.2, svd="full")}.items():
        built = build(str(place / "config.json"), recipe, seed=3)
        materialise(built, torch.device("cpu"))
        made[name] = dict(built.model.named_parameters())
        tied.append(built.model.get_parameter("lm_head.weight") is made[name]["model.embed_tokens.weight"])
    a, b = (made["pairs"][f"model.layers.1.mlp.up_proj.weight_{side}"].detach().double() for side in "ab")
    weight = made["dense"]["model.layers.1.mlp.up_proj.weight"].detach().double()
    left = torch.linalg.svdvals(weight)[a.shape[0] :].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.vector_norm(weight - b @ a), left, rtol=1e-4, atol=0)
    assert torch.equal(made["dense"]["model.embed_tokens.weight"], made["pairs"]["model.embed_tokens.weight"])
    assert tied == [True, True]


def test_finetuning_takes_the_loss_on_completions_alone(place: Path, tmp_path: Path) -> None:
    from torch.nn.functional import cross_entropy

    from lrcompile.train.build import build
    from lrcompile.train.data import Sampler, Shards
    from lrcompile.train.language import logits_of
    from lrcompile.train.materialise import materialise

    out = tmp_path / "run"
    more = ["--recipe.dense", "--seed", "5"]
    assert main(["finetune", *arguments(place, out, *more, data="prompt-data")]) == 0
    built = build(str(place / "config.json"), None, attention="sdpa", length=32, seed=5)
    materialise(built, torch.device("cpu"))
    shards = Shards.open(place / "prompt-data" / "train")
    batch = Sampler(shards, length=32, batch=8, seed=5).rows(0, 0, 8)
    with torch.no_grad():
        each = cross_entropy(logits_of(built.model, batch.tokens, batch.positions).mT, batch.targets, reduction="none")
    completions = sum(int(shards.lengths[d] - shards.prompts[d]) for row in batch.documents for d in row)
    assert losses(out)[0] == pytest.approx(float(each.sum()) / completions, rel=1e-5)


def test_finetuning_trains_the_pairs_and_writes_an_adapter(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--recipe.rank", "4", "--data.length", "64"]
    assert main(["finetune", *arguments(place, out, *more, data="prompt-data")]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter", "checkpoints", "config.json", "merged", "metrics.jsonl", "model",
    ]  # fmt: skip
    start = metrics(out, "event")[0]
    assert start["trained"] < 0.3 * start["parameters"]
