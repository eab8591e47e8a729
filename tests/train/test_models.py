"""Models of one's own that the driver trains though they are unusual, and those that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrcompile.errors import TrainError
from lrcompile.train.build import build
from lrcompile.train.evaluate import sees
from lrcompile.train.parallel import parallelise

from .inside import VOCAB, Tiny
from .runs import events, finished, losses, refused, same_run, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("model", ["experts", "lists", "shared"])
def test_unusual_models_train_and_go_on(model: str, data: Path, tmp_path: Path) -> None:
    """On two ranks: experts of which each uses others, and one that nobody uses; layers that are lists; layers that share."""
    usual: dict[str, Any] = {"model": {"source": f"inside:{model}"}, "recipe": {"dense": True}}
    usual["schedule"] = {"name": "constant", "warmup": 2}
    whole = finished(settings(data, tmp_path / "whole", **usual), ranks=2)
    assert losses(whole)[8] < losses(whole)[1]
    told = settings(data, tmp_path / "out", **usual)
    finished({**told, "steps": 4}, ranks=2)
    same_run(finished(told, "--resume", ranks=2), whole)
    assert any("FLOPs and MFU are not told" in text for text in events(whole)) == (model == "experts")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("unmasked", "_Unmasked sees the tokens that it is to predict"),
        ("empty", "inside:empty gives a model on the meta"),
    ],
)
def test_refused(model: str, reason: str, data: Path, tmp_path: Path) -> None:
    told = settings(data, tmp_path / "out", model={"source": f"inside:{model}"}, recipe={"dense": True})
    assert reason in refused(told)


def test_what_models_of_transformers_see() -> None:
    tf = pytest.importorskip("transformers")
    small = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**small, "intermediate_size": 128}
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    assert sees(tf.LlamaForCausalLM(tf.LlamaConfig(**wide)), cpu) == (False, False)
    assert sees(tf.MixtralForCausalLM(tf.MixtralConfig(**wide, num_key_value_heads=2)), cpu) == (False, False)
    assert sees(tf.BertForMaskedLM(tf.BertConfig(**wide)), cpu) == (True, True)
    # It takes position_ids, and looks for documents elsewhere.
    opt = tf.OPTConfig(**small, ffn_dim=128, word_embed_proj_dim=64)
    assert sees(tf.OPTForCausalLM(opt), cpu) == (False, True)


def test_encoders_and_short_models_are_refused(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="has an encoder and a decoder"):
        build(str(tmp_path / "config.json"), None)
    tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=16).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="data.length=32: the model has 16 positions"):
        build(str(tmp_path / "config.json"), None, length=32)


def test_a_parameter_that_no_rule_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tf = pytest.importorskip("transformers")
    config = tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    config.save_pretrained(tmp_path)
    plain = tf.GPT2LMHeadModel.__init__

    def more(self: Any, *args: Any) -> None:
        plain(self, *args)
        self.scales = nn.Parameter(torch.ones(3))

    monkeypatch.setattr(tf.GPT2LMHeadModel, "__init__", more)
    built = build(str(tmp_path / "config.json"), None, length=16)
    with pytest.raises(TrainError, match="no rule of GPT2LMHeadModel draws scales"):
        built.values.unit(None)


def test_two_dtypes_that_are_trained_side_by_side() -> None:
    model = Tiny()
    model.blocks[0].mix.bfloat16()
    with pytest.raises(TrainError, match="bfloat16 and float32 parameters are trained side by side"):
        parallelise(model, ["blocks.0", "blocks.1"], over=object())  # type: ignore[arg-type]
