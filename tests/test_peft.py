"""LoRA adapters there and back: peft reads what is exported, and what peft saves is computed alike."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrcompile
from lrcompile import Recipe, StateError
from lrcompile.weights.layers import AdoptedModule

from .helpers import tiny_llama
from .helpers_adopt import close, snapshot
from .kernels.numbers import assert_same

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

IDS = {"input_ids": torch.arange(14).view(2, 7)}
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).eval()


MODELS: list[Callable[[], Any]] = [tiny_llama, tiny_gpt2]


@pytest.fixture(autouse=True)
def _no_warnings_of_peft() -> Iterator[None]:
    """That peft finds nothing to complain about is part of what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def trained(model: nn.Module) -> Any:
    """Other values in everything that requires gradients, as training leaves them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


def lora(model: nn.Module, **recipe: Any) -> Any:
    recipe = {"weights": "dense", "init": "zero", "rank": 4, "trainable": [], **recipe}
    return trained(lrcompile.adopt(model, Recipe(**recipe), IDS))


def by_peft(model: nn.Module, dir: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, str(dir)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**IDS).logits


def same(model: nn.Module, other: nn.Module, than: nn.Module) -> None:
    """The same logits, and far from those of the model they started from."""
    close(logits(model), logits(other))
    assert (logits(model) - logits(than)).abs().max() > 1e-2


def config_of(dir: Path) -> dict[str, Any]:
    return json.loads((dir / "adapter_config.json").read_text())


# --- ours to peft's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_peft_computes_the_same(build: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = build().eval()
    model = lora(copy.deepcopy(dense))
    lrcompile.export_peft(model, tmp_path / "deep" / "out", "someone/base")
    assert "belong beside the original model" in caplog.text
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == FILES
    theirs = by_peft(copy.deepcopy(dense), tmp_path / "deep" / "out")
    same(model, theirs, dense)
    config = config_of(tmp_path / "deep" / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 16, True)
    assert config["base_model_name_or_path"] == "someone/base" and config["rank_pattern"] == {}
    assert config["fan_in_fan_out"] == (build is tiny_gpt2)
    close(logits(theirs.merge_and_unload()), logits(model))


def test_targets_are_spelled_shortly_where_that_is_enough(tmp_path: Path) -> None:
    dense = tiny_llama().eval()
    for number, (include, targets) in enumerate([
        (["*.q_proj", "*.down_proj"], ["down_proj", "q_proj"]),
        (["*.0.mlp"], [f"model.layers.0.mlp.{n}_proj" for n in ("down", "gate", "up")]),
    ]):  # fmt: skip
        model, out = lora(copy.deepcopy(dense), include=include), tmp_path / str(number)
        lrcompile.export_peft(model, out)
        assert config_of(out)["target_modules"] == targets
        same(model, by_peft(copy.deepcopy(dense), out), dense)


class Nested(nn.Module):
    """A module whose whole name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.deep = nn.Linear(16, 16), nn.ModuleDict({"fc": nn.Linear(16, 16)})
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fc(x).relu() + self.deep["fc"](x))


def test_names_that_end_alike_and_ranks_that_differ(tmp_path: Path) -> None:
    dense, x = Nested().eval(), torch.randn(3, 16)
    plan = lrcompile.plan(dense, (x,), Recipe(rank=4, weights="dense", init="zero", include=["fc", "last"]))
    ranks = {"fc.weight": (2, 0.7), "last.weight": (3, 16 / 3**0.5)}
    for entry in plan.adopted:
        entry.rank, entry.scale = ranks[entry.key]
    assert len(plan.adopted) == 2
    model = trained(lrcompile.adopt(copy.deepcopy(dense), plan).requires_grad_(False))
    with torch.no_grad():
        model.fc.weight_b.normal_(), model.last.weight_b.normal_()
    lrcompile.export_peft(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == "fc|last" and len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 1
    theirs = by_peft(copy.deepcopy(dense), tmp_path / "out")
    close(theirs(x), model(x))
    back = lrcompile.load_peft(copy.deepcopy(dense), tmp_path / "out", (x,))
    assert (back.fc.weight_a.shape, back.last.weight_a.shape) == ((2, 16), (3, 16))
    assert type(back.deep["fc"]) is nn.Linear
    close(back(x), model(x))


@pytest.mark.parametrize(("build", "also"), [(tiny_llama, ["*norm*", "lm_head"]), (tiny_gpt2, ["*.ln_f", "*.ln_1"])])
def test_what_else_was_trained_goes_along(build: Callable[[], Any], also: list[str], tmp_path: Path) -> None:
    dense = build().eval()
    model = lora(copy.deepcopy(dense), trainable=also)
    lrcompile.export_peft(model, tmp_path / "out")
    same(model, by_peft(copy.deepcopy(dense), tmp_path / "out"), dense)
    only_pairs = copy.deepcopy(model)
    only_pairs.load_state_dict({n: p for n, p in dense.state_dict().items() if "norm" in n or "ln_" in n}, strict=False)
    assert not torch.allclose(logits(only_pairs), logits(model))  # the others count
    back = lrcompile.load_peft(copy.deepcopy(dense), tmp_path / "out", IDS)
    close(logits(back), logits(model))
    lrcompile.export_peft(back, tmp_path / "again")
    there, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("out", "again"))
    assert {k: v.tolist() for k, v in there.items()} == {k: v.tolist() for k, v in again.items()}


@pytest.mark.parametrize("init", ["zero", "qera"])
def test_a_quantised_base(init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_llama().eval()
    model = lora(copy.deepcopy(dense), weights="nf4", pair_dtype="float32")
    for module in model.modules():
        for told in getattr(module, "lr_told", {}).values():
            told["init"] = init  # another start of the pair, the same base
    lrcompile.export_peft(model, tmp_path / "out")
    assert [r.levelno for r in caplog.records if "quantised as here (nf4)" in r.message] == [logging.WARNING]
    # The model that peft has to be given: the same, the weights quantised.
    quantised = lrcompile.merge(lrcompile.adopt(copy.deepcopy(dense).requires_grad_(False), Recipe(weights="nf4"), IDS))
    same(model, by_peft(quantised, tmp_path / "out"), dense)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: lora(tiny_llama(), init="pissa"), r"q_proj.weight was started by 'pissa', which changed its base: .*merge"),
        (lambda: lora(tiny_llama(), weights="nf4", init="loftq"), r"was started by 'loftq'.*save_adapter"),
        (lambda: lrcompile.adopt(tiny_llama(), Recipe(rank=4), IDS), r"became a plain pair of rank 4.*merge"),
        (lambda: lrcompile.adopt(tiny_llama(), Recipe(weights="nf4", trainable=[]), IDS), r"nothing to export"),
        (tiny_llama, r"no weight of the model has a pair beside a base"),
        (lambda: lora(tiny_gpt2(), include=["*", "lm_head"]), r"wte.weight belongs to a Embedding"),
        (lambda: lora(tiny_gpt2(), trainable=["*.c_attn"]), r"c_attn.bias is trained, .*of a weight with a pair"),
        (lambda: attention(), r"attn.in_proj_weight belongs to a MultiheadAttention"),
        (lambda: attention(exclude=["*.in_proj_weight"]), r"out_proj.weight belongs to a MultiheadAttention"),
        (lambda: inside(), r"inner has a pair inside outer, of which other parameters are trained"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(build: Callable[[], nn.Module], said: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=said):
        lrcompile.export_peft(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def attention(**recipe: Any) -> Any:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
    recipe = {"weights": "dense", "init": "zero", "rank": 2, "include": ["*.self_attn"], "trainable": [], **recipe}
    return lrcompile.adopt(model, Recipe(**recipe), (torch.zeros(3, 2, 16),))


def inside() -> Any:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(16)), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.gain

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.head = Outer(), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.outer(x).relu())

    recipe = Recipe(weights="dense", init="zero", rank=2, trainable=["outer.gain"])
    return lrcompile.adopt(Model(), recipe, (torch.zeros(2, 16),))


def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    model = lora(tiny_llama())
    (tmp_path / "empty").mkdir()
    lrcompile.export_peft(model, tmp_path / "empty")
    before = (tmp_path / "empty" / FILES[1]).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "link"):
        with pytest.raises(StateError, match=f"{name} exists; choose another name"):
            lrcompile.export_peft(trained(model), tmp_path / name)
    assert (tmp_path / "empty" / FILES[1]).read_bytes() == before


# --- peft's to ours ---------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}
CONFIGS: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (tiny_llama, LLAMA),
    (tiny_llama, {**LLAMA, "use_rslora": True, "lora_dropout": 0.1}),
    (tiny_llama, {
        **LLAMA,
        "rank_pattern": {"layers.0.self_attn.q_proj": 8, "^model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "layers_to_transform": None,
    }),
    (tiny_llama, {"r": 2, "target_modules": "all-linear", "modules_to_save": ["norm", "lm_head"]}),
    (tiny_llama, {**LLAMA, "target_modules": r".*\.1\..*(up|v)_proj", "init_lora_weights": "gaussian"}),
    (tiny_llama, {**LLAMA, "layers_to_transform": [1]}),
    (tiny_gpt2, {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True}),
]  # fmt: skip


def saved_by_peft(base: nn.Module, dir: Path, config: dict[str, Any]) -> Any:
    """A trained adapter of peft's over a copy of the base, saved."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    trained(theirs).save_pretrained(dir, save_embedding_layers=False)
    return theirs


@pytest.mark.parametrize(("build", "config"), CONFIGS)
def test_ours_computes_the_same(build: Callable[[], Any], config: dict[str, Any], tmp_path: Path) -> None:
    dense = build().eval()
    theirs = saved_by_peft(dense, tmp_path / "in", config)
    model = copy.deepcopy(dense)
    assert lrcompile.load_peft(model, tmp_path / "in", IDS) is model
    same(model, theirs, dense)
    pairs = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = {f"base_model.model.{n}" for n, m in model.named_modules() if isinstance(m, AdoptedModule)}
    assert ours == pairs
    kept = {n for n in load_file(tmp_path / "in" / FILES[1]) if "lora_" not in n}
    free = {f"base_model.model.{n}" for n, p in model.named_parameters() if p.requires_grad}
    assert free == kept | {f"{n}.weight_{side}" for n in pairs for side in "ab"}
    lrcompile.export_peft(model, tmp_path / "out")
    close(logits(by_peft(copy.deepcopy(dense), tmp_path / "out")), logits(theirs))


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_beside_a_quantised_base(weights: str, tmp_path: Path) -> None:
    dense = tiny_llama().eval()
    theirs = saved_by_peft(dense, tmp_path / "in", LLAMA)
    model = lrcompile.load_peft(copy.deepcopy(dense), tmp_path / "in", IDS, weights=weights)
    down = model.model.layers[0].mlp.down_proj
    assert not down.weight_base.is_floating_point() and down.weight_a.dtype == torch.float32
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    far = (logits(theirs) - logits(dense)).norm()
    assert 0 < (logits(model) - logits(theirs)).norm() < far / 2
    model.train()(**IDS).logits.sum().backward()
    assert down.weight_b.grad is not None and down.weight_b.grad.abs().max() > 0


def test_half_precision_and_training_on(tmp_path: Path) -> None:
    dense = tiny_llama().to(torch.bfloat16)
    theirs = peft.get_peft_model(copy.deepcopy(dense), peft.LoraConfig(**LLAMA), autocast_adapter_dtype=False)
    trained(theirs).save_pretrained(tmp_path / "in", save_embedding_layers=False)
    model = lrcompile.load_peft(copy.deepcopy(dense), tmp_path / "in", IDS)
    assert model.model.layers[0].mlp.down_proj.weight_a.dtype == torch.bfloat16
    # The same products in the same order: equal where this was written; one rounding is left to other libraries.
    assert_same(logits(model), logits(theirs), torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = logits(model)
    model(**IDS).logits.float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA, "use_dora": True}, r"uses use_dora=True"),
        ({**LLAMA, "lora_bias": True}, r"uses lora_bias=True"),
        ({**LLAMA, "bias": "all"}, r"has trained biases \(bias='all'\)"),
        ({**LLAMA, "target_modules": ["embed_tokens", "q_proj"]}, r"holds .*lora_embedding_A', an embedding's pair"),
        ({**LLAMA, "trainable_token_indices": [1, 2]}, r"uses trainable_token_indices"),
        ({**LLAMA, "init_lora_weights": "pissa"}, r"started by init_lora_weights='pissa', which changes the base; convert"),
        ({**LLAMA, "layer_replication": [[0, 2], [1, 2]]}, r"uses layer_replication"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_plain_lora_is_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")  # of theirs, about embeddings
    saved_by_peft(tiny_llama(), tmp_path / "in", config)
    refused(tmp_path / "in", said)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    theirs.save_pretrained(tmp_path / "in")
    refused(tmp_path / "in", r"is an adapter of peft_type='IA3', which lrcompile can't read; merge it with peft's")


def refused(dir: Path, said: str, model: Any = None) -> None:
    model = model or tiny_llama()
    before = snapshot(model)
    with pytest.raises(StateError, match=said):
        lrcompile.load_peft(model, dir, IDS)
    assert snapshot(model) == before


def edit(dir: Path, **changes: Any) -> None:
    (dir / FILES[0]).write_text(json.dumps({**config_of(dir), **changes}))


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "in", LLAMA)
    whole = (tmp_path / "in" / FILES[1]).read_bytes()
    refused(tmp_path / "nowhere", "there is no directory .*hub has to be downloaded")
    for size in (0, 7, 100, len(whole) - 1):
        (tmp_path / "in" / FILES[1]).write_bytes(whole[:size])
        refused(tmp_path / "in", "adapter_model.safetensors is truncated or altered")
    (tmp_path / "in" / FILES[1]).unlink()
    refused(tmp_path / "in", "copy it again")
    (tmp_path / "in" / "adapter_model.bin").write_bytes(b"\x80\x02")
    refused(tmp_path / "in", "as a pickle, which can run code.*save it again with peft's save_pretrained")
    (tmp_path / "in" / FILES[0]).write_text("{")
    refused(tmp_path / "in", "adapter_config.json is truncated")
    (tmp_path / "in" / FILES[0]).write_text("[]")
    refused(tmp_path / "in", "holds no configuration")
    (tmp_path / "in" / FILES[0]).unlink()
    refused(tmp_path / "in", "was not saved by peft")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q + "A.weight"), r"one side only of the pair for 'model.layers.0.self_attn.q_proj'"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(3, 32)}), r"contradicts itself: .*of rank 4 by adapter_config.json"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(4, 31)}), r"of another model: .*is of a \(32, 31\) weight, here it is"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(4, 32).half()}), r"is torch.float16 and torch.float32; save it in"),
        (lambda t: t.update({Q + "magnitude_vector": torch.zeros(4)}), r"DoRA's magnitudes"),
        (lambda t: t.update({Q + "A.bias": torch.zeros(4)}), r"no plain pair"),
        (lambda t: t.update({"base_model.model.x": torch.zeros(4)}), r"of another model: 'x' is \[4\] there, no such tensor"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(4)}), r"is \[4\] there, \[64, 32\] here"),
        (lambda t: [t.update({k.replace("q_proj", "qq"): t.pop(k)}) for k in list(t)], r"this model has no such module"),
        (lambda t: [t.update({k.replace("self_attn.q_proj", "self_attn"): t.pop(k)}) for k in list(t)], r"no weight to put"),
        (lambda t: t.clear(), r"holds no LoRA pair"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "in", LLAMA)
    tensors = load_file(tmp_path / "in" / FILES[1])
    change(tensors)
    save_file(tensors, tmp_path / "in" / FILES[1])
    refused(tmp_path / "in", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 5}, r"contradicts itself"),
        ({"lora_alpha": 0}, r"lora_alpha=0; it has to be a number above 0"),
        ({"lora_alpha": None}, r"lora_alpha=None"),
        ({"new_option": {"x": 1}}, r"uses new_option=\{'x': 1\}"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "in", LLAMA)
    edit(tmp_path / "in", **changes)
    refused(tmp_path / "in", said)


def test_ranks_beyond_the_weight_and_tied_weights(tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "rank", {"r": 40, "target_modules": ["q_proj"]})
    refused(tmp_path / "rank", r"has rank 40, more than the weight's 32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that merging such a one goes wrong
        saved_by_peft(tiny_gpt2(), tmp_path / "head", {"r": 2, "target_modules": ["lm_head"]})
        saved_by_peft(
            tiny_gpt2(), tmp_path / "whole", {"r": 2, "target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}
        )
    refused(tmp_path / "head", r"ties to that of 'transformer.wte'.*give it a parameter of its own", tiny_gpt2())
    refused(tmp_path / "whole", r"has values of 'lm_head.weight' alone, which this model ties to", tiny_gpt2())


def test_models_that_take_no_adapter(tmp_path: Path) -> None:
    saved_by_peft(tiny_llama(), tmp_path / "in", LLAMA)
    with pytest.raises(lrcompile.AdoptError, match="adopted already"):
        lrcompile.load_peft(lora(tiny_llama()), tmp_path / "in", IDS)
    with torch.device("meta"):
        shapes = tiny_llama()
    refused(tmp_path / "in", "on the meta device and holds no values", shapes)
    with pytest.raises(lrcompile.RecipeError, match="nf9"):
        lrcompile.load_peft(tiny_llama(), tmp_path / "in", IDS, weights="nf9")
