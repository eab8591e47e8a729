"""What a dry run tells, against what really happens: counted FLOPs, saved bytes, the optimizers' own states."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lrcompile
from lrcompile import Recipe
from lrcompile.cost import device_named
from lrcompile.errors import KernelError, LrcompileError, TrainError
from lrcompile.graph.measure import saved_bytes
from lrcompile.show import as_text
from lrcompile.train.config import Data, Model, Optimizer, Parallel, RecipeTable, Run, Schedule, save_resolved
from lrcompile.train.data import prepare
from lrcompile.train.driver import train
from lrcompile.train.dry_run import dry_run, on_meta
from lrcompile.train.held import optimizer_bytes
from lrcompile.train.language import check_length, layers
from lrcompile.train.measure import flops_per_token, measure

from ..helpers import VOCAB, LanguageModel, tiny_llama
from .helpers_data import write_lines

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64}
CONFIG |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG |= {"max_position_embeddings": 32, "tie_word_embeddings": True}


def make_run(folder: Path, **changes: object) -> Run:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    run = Run(
        model=Model(source=str(path)),
        recipe=RecipeTable(rank=8),
        data=Data(length=16),
        schedule=Schedule(warmup=1),
        parallel=Parallel(precision="float32"),
        steps=10,
        batch=8,
        micro_batch=2,
    )
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.int64)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
def test_training_flops_are_those_of_a_real_step(pairs: bool) -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")  # whose backward torch's counter knows, on a CPU too
    dense_numbers = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    if pairs:
        lrcompile.adopt(model, Recipe(rank=4), {"input_ids": tokens(1, 8), "use_cache": False})
    x = tokens(2, 16)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=x, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    told, dense = flops_per_token(model, 16)
    assert told * x.numel() / counter.get_total_flops() == pytest.approx(1.0, rel=1e-9)
    attention = 2 * 2 * (2 * 16 * 32)  # two layers; scores and values: 2 * length * width each
    assert dense == 3 * (2 * dense_numbers + attention)


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    model = tiny_llama()
    lrcompile.adopt(model, Recipe.finetune(rank=4, weights="dense"), {"input_ids": tokens(1, 8), "use_cache": False})
    found = measure(model, rows=1, length=16)
    bases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_base"))
    head = model.lm_head.weight.numel()
    assert found.frozen_flops == 2 * 16 * (bases + head)
    assert found.training_flops == 3 * found.forward_flops - found.frozen_flops
    pairs = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.forward_flops - found.dense_flops == 2 * 16 * pairs


def test_a_packed_base_counts_as_the_dense_weight_does() -> None:
    flops = {}
    for base in ("nf4", "dense"):
        model = tiny_llama().to("meta")
        lrcompile.adopt(model, Recipe.finetune(rank=4, weights=base), {"input_ids": tokens(1, 8), "use_cache": False})
        flops[base] = flops_per_token(model, 16)
    assert flops["nf4"] == flops["dense"]


def test_attention_grows_with_the_length() -> None:
    model = tiny_llama()
    short, long = (flops_per_token(model, n)[0] for n in (8, 32))
    assert long - short == 3 * 2 * 2 * 2 * (32 - 8) * 32


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = LanguageModel(tied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure(model, rows=2, length=5, precision=torch.bfloat16)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_bytes_kept_are_those_that_autograd_saves() -> None:
    model = LanguageModel()
    found = measure(model, rows=2, length=7)
    x = tokens(2, 7)
    held = [x, *model.parameters()]
    really = saved_bytes(lambda: F.cross_entropy(model(x).flatten(0, 1).float(), x.flatten()), held)
    # the looked-up ids are kept too, once for the embedding and the loss: told as an activation
    assert found.kept("none") - really in (0, x.numel() * 8)
    assert len(found.saved) == 2 and found.saved[0] == found.saved[1] > 0
    # the logits, in fp32, as the loss keeps them
    assert found.saved_outside >= 2 * 7 * VOCAB * 4


def test_recomputing_keeps_less() -> None:
    found = measure(tiny_llama(), rows=2, length=16)
    assert found.kept("block") < found.kept("selective") < found.kept("none")
    width = 32
    assert found.entered[1] == 2 * 16 * width * 4
    products = 4 * width + 2 * 64 - width  # q, o, gate and up, down; k and v are half as wide
    assert found.results[1] >= 2 * 16 * products * 4


@pytest.mark.parametrize("name", ["adamw", "muon", "spectron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_what_is_trained(name: str, dtype: torch.dtype) -> None:
    model = LanguageModel().to(dtype)
    lrcompile.adopt(model, Recipe(rank=4), (tokens(1, 4),))
    model.embed.weight.requires_grad_(False)
    told = optimizer_bytes(model, name)
    assert set(told) == {n for n, p in model.named_parameters() if p.requires_grad}
    side = "body.blocks.0.up.weight_a"
    numbers, rows = model.get_parameter(side).numel(), model.get_parameter(side).shape[0]
    states = {"adamw": 2 * dtype.itemsize * numbers, "muon": 4 * numbers, "spectron": 4 * (numbers + rows)}
    assert told[side] == states[name]
    assert told["head.weight"] == 2 * dtype.itemsize * model.head.weight.numel()  # AdamW's, whatever the name


def test_adamws_states_are_what_torch_keeps() -> None:
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens(1, 4)).sum().backward()
    optimizer.step()
    really = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
    assert sum(optimizer_bytes(model, "adamw").values()) == really


def test_8_bit_states_are_what_torchao_keeps() -> None:
    optim = pytest.importorskip("torchao.optim")
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8))  # the second is below the least size
    optimizer = optim.AdamW8bit(model.parameters())
    state = [optimizer._new_buffer(p, signed) for p in model.parameters() for signed in (True, False)]
    really = sum(t.codes.nbytes + t.scale.nbytes if hasattr(t, "codes") else t.nbytes for t in state)
    assert sum(optimizer_bytes(model, "adamw8bit").values()) == really


def test_shares_of_a_rank_are_rounded_up_to_whole_rows() -> None:
    model = LanguageModel()
    lrcompile.adopt(model, Recipe(rank=3), (tokens(1, 4),))
    told = optimizer_bytes(model, "adamw", shard=4)
    assert told["body.blocks.0.up.weight_a"] == 2 * 4 * 32  # one row of three
    assert told["head.weight"] == 2 * 4 * 13 * 32  # of 50


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_dry_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    report = dry_run(run, target="H100")
    assert report.plan is not None
    before, after = report.parameters
    model, _ = on_meta(run.model.source, torch.float32, "sdpa")
    assert before == sum(p.numel() for p in model.parameters())
    assert (before, after) == report.plan.parameters
    assert report.trained == after
    assert report.weights == report.gradients == 4 * after
    assert report.optimizer == 2 * 4 * after
    assert report.gathered == 0
    assert (report.replicate, report.shard, report.accumulate) == (1, 1, 4)
    assert report.total == 4 * 4 * after + (report.activations or 0)
    assert report.measured is not None
    assert report.seconds is not None
    least = (
        report.accumulate
        * 2
        * 16
        * report.measured.training_flops
        / report.measured.tokens
        / device_named("H100").single
    )
    assert report.seconds > least
    text = as_text(report, 100)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "rank",
        f"{before:,} → {after:,}",
        "adamw",
        "FLOPs a token",
        "dense twin's",
        "expected tokens/s",
        "1 × H100",
    ):
        assert part in text


def test_ranks_share(tmp_path: Path) -> None:
    one = dry_run(make_run(tmp_path))
    run = make_run(tmp_path, parallel=Parallel(replicate=2, precision="bfloat16"))
    four = dry_run(run, 4, target="H100")
    assert (four.replicate, four.shard, four.accumulate) == (2, 2, 1)
    assert four.weights == one.weights // 2 and four.optimizer == one.optimizer // 2
    assert 0 < four.gathered <= one.weights // 2  # two blocks of two, and the rest, in bf16
    assert any("communication" in note for note in four.notes)


def test_without_a_gpu_no_speed_is_made_up(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    report = dry_run(make_run(tmp_path))
    assert report.tokens_per_second is None
    assert "it has no CPU" in " ".join(as_text(report, 100).split())
    with pytest.raises(KernelError, match="no device 'Z80'"):
        dry_run(make_run(tmp_path), target="Z80")


def test_a_faster_gpu_and_fewer_numbers_are_expected_to_be_faster(tmp_path: Path) -> None:
    # of a size where products count: with a tiny model launches are all there is
    wide = {**CONFIG, "hidden_size": 2048, "intermediate_size": 8192}
    run = make_run(
        tmp_path, parallel=Parallel(precision="bfloat16"), recipe=RecipeTable(rank_ratio=0.125), micro_batch=8
    )
    Path(run.model.source).write_text(json.dumps(wide))
    run = dataclasses.replace(run, data=Data(length=32))
    dense = dataclasses.replace(run, recipe=RecipeTable(dense=True))
    slow, fast, twin = (dry_run(r, target=gpu) for r, gpu in ((run, "A100"), (run, "H100"), (dense, "H100")))
    rates = [report.tokens_per_second or 0 for report in (twin, slow, fast)]
    assert rates[0] < rates[2] and rates[1] < rates[2]
    assert twin.plan is None and twin.measured is not None
    assert twin.measured.dense_flops == twin.measured.forward_flops


def test_finetuning_keeps_gradients_and_states_of_the_pairs_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, recipe=RecipeTable(preset="finetune", rank=4), optimizer=Optimizer(lr=1e-3))
    report = dry_run(run)
    pairs = 2 * sum(4 * (i + o) for i, o in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)))
    assert report.trained == pairs
    assert report.gradients == 4 * pairs and report.optimizer == 8 * pairs
    assert report.weights < 4 * report.parameters[0]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="can't be divided among 3 ranks"):
        dry_run(make_run(tmp_path), 3)
    with pytest.raises(TrainError, match="data.length=64: the model has 32 positions"):
        dry_run(make_run(tmp_path, data=Data(length=64)))
    check_length(LanguageModel(), 10**6)  # nothing is known of its positions
    with pytest.raises(LrcompileError, match="no such file or directory: gone"):
        dry_run(make_run(tmp_path, model=Model(source="gone")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": Optimizer(rates={"*attn_*": 2.0})}, r"rates\['\*attn_\*'\]: no trained parameter matches it"),
        ({"optimizer": Optimizer(rates={"*.weight_b": 2.0})}, "would split pairs"),
        ({"optimizer": Optimizer(name="spectron"), "recipe": RecipeTable(dense=True)}, "spectron trains pairs"),
        ({"recipe": RecipeTable(shares={"*.mpl": 2.0})}, r"shares\['\*.mpl'\] matches no module"),
        ({"recipe": RecipeTable(rank=8, shares={"*": 2.0})}, "shares are of a total"),
        ({"recipe": RecipeTable(rank=8, trainable=("*.nrom",))}, "trainable='\\*.nrom' matches no parameter"),
        ({"recipe": RecipeTable(rank=8, init="data")}, "init='data' keeps what a trained model makes of data"),
        (
            {
                "recipe": RecipeTable(preset="finetune", weights="dense", trainable=("*norm*",)),
                "model": "bfloat16",
                "parallel": Parallel(precision="float32"),
            },
            "bfloat16 and float32 parameters are trained side by side",
        ),
        ({"data": "train"}, "has a vocabulary of 257 tokens, and the model 64"),
    ],
)
def test_what_the_run_refuses_the_dry_run_does(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """In the same words."""
    write_lines(tmp_path / "a.jsonl", [{"text": "a few words " * 40}] * 20)
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", "bytes", workers=1)
    run = make_run(tmp_path, out=str(tmp_path / "out"))
    given = {**changes, "data": Data(train=str(tmp_path / "data/train"), length=16)}
    if "data" not in changes:  # so that the data isn't what is wrong
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 320}))
    if "model" in changes:
        given["model"] = dataclasses.replace(run.model, dtype=changes["model"])
    run = dataclasses.replace(run, **given)
    for start in (dry_run, train):
        with pytest.raises(LrcompileError, match=message):
            start(run)


def test_what_is_there_already_is_told(tmp_path: Path) -> None:
    """A directory with a run is no reason not to tell what another would be; but one that is to go on has to be this one."""
    run = make_run(tmp_path, out=str(tmp_path / "out"), data=Data(train="absent", length=16))
    (tmp_path / "out").mkdir()
    assert dry_run(run).notes == []  # nor does it need the data
    save_resolved(dataclasses.replace(run, seed=1), tmp_path / "out" / "config.json")
    assert "holds a run: --resume goes on with it" in dry_run(run).notes[0]
    with pytest.raises(TrainError, match="is of another run: seed was 1, is 0"):
        dry_run(run, resume=True)


def test_a_directory_is_read_for_its_config_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not even weights")
    report = dry_run(dataclasses.replace(run, model=Model(source=str(tmp_path))))
    assert report.parameters[0] == sum(
        p.numel() for p in on_meta(run.model.source, torch.float32, "sdpa")[0].parameters()
    )


def test_a_factory_is_called_on_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_factory.py").write_text(
        "import torch\nfrom tests.helpers import LanguageModel\n"
        "def build():\n"
        "    with torch.device('cpu'):  # a model with its numbers, head and embedding tied\n"
        "        return LanguageModel(tied=True), (torch.zeros(1, 4, dtype=torch.int64),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    report = dry_run(make_run(tmp_path, model=Model(source="a_factory:build", dtype="bfloat16")))
    numbers = sum(p.numel() for p in LanguageModel(tied=True).parameters())
    assert report.parameters[0] == numbers
    assert report.weights == 2 * report.parameters[1]
    assert report.measured is not None


class Deciding(nn.Module):
    """Looks at numbers, which a dry run has none of; (rows, length) -> (rows, length, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(8, 8), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.layers[0](x) if float(x.detach().sum()) > 0 else x


def test_a_model_that_needs_numbers_is_told() -> None:
    with pytest.raises(TrainError, match="Deciding can't be measured without numbers: DataDependent"):
        measure(Deciding(), rows=1, length=4)


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    model = tiny_llama()
    assert layers(model) == list(model.model.layers)
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)]), nn.Identity()])
    # A list is never called, so nothing could be done when it is.
    assert layers(nn.Sequential(inner)) == [inner[0][0], inner[1][0]]
    assert layers(nn.Linear(2, 2)) == []
