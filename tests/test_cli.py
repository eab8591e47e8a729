"""The command line: what it prints, what it writes, and its errors, in this process and as a command."""

import json
import subprocess
import sys

import pytest
import torch

import lrcompile
from lrcompile.cli import main
from lrcompile.sources import load_source, token_count

from .helpers import LanguageModel, ids, tiny_llama

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)]
    return nn.Sequential(*blocks, nn.LayerNorm(32)), (torch.randn(5, 32),)

def broken():
    raise ZeroDivisionError("no luck")

def misfit():
    return build()[0], (torch.randn(5, 31),)

def nothing():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory of the user's, with a model in a module, to stand in."""
    (tmp_path / "my_model.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_model", None)


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(path)
    return path


def test_plan_of_a_factory(here, capsys):
    assert main(["plan", "my_model:build", "--rank", "8", "--exclude", "2.*", "--json", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert "64x32 ×2" in out and "\n0-1.0 " in out and "excluded by '2.*'" in out
    assert "Singular values" in out and "│" in out
    plan = lrcompile.Plan.from_json((here / "plan.json").read_text(encoding="utf-8"))
    assert [e.rank for e in plan.entries] == [8, 8, 8, 8, None, None]
    model, inputs = load_source("my_model:build")
    lrcompile.adopt(model, plan)
    assert model(*inputs).shape == (5, 32)


def test_inspect_a_factory(here, capsys):
    arguments = [
        "inspect",
        "my_model:build",
        "--rank-ratio",
        "0.25",
        "--include",
        "0.*",
        "--include",
        "1.*",
        "--verify",
    ]
    assert main([*arguments, "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "What every pass did" in out and "verified" in out and "wrote page.html" in out
    assert (here / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*arguments, "--show", "factorize"]) == 0
    out = capsys.readouterr().out
    assert 0 <= out.index("What every pass did") < out.index("+++ factorize"), "the report, then the diff"
    assert main([*arguments, "--show", "select", "--show", "capture"]) == 0
    out = capsys.readouterr().out
    assert "select: the graph stays as it is" in out and "\ndef forward(" in out


@pytest.mark.parametrize("columns", [80, 160])
def test_the_tables_fit_the_terminal(here, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("plan", "inspect"):
        assert main([command, "my_model:build"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns and all(line == line.rstrip() for line in lines)
        assert not any("…" in line for line in lines), "nothing is cut off"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "missing/config.json"], "no such file"),
        (["plan", "my_model.py"], "no model that can be read"),
        (["plan", "."], "no config.json"),
        (["plan", "my_model:nobody"], "can't import my_model:nobody"),
        (["plan", "no_module_of_that_name:build"], "can't import"),
        (["plan", "my_model:SOURCE.x"], "can't import"),
        (["plan", "my_model:broken"], "ZeroDivisionError: no luck"),
        (["plan", "my_model:nothing"], "must return (model, example_inputs)"),
        (["plan", "my_model:build", "--rank", "8", "--compression", "2"], "set one of"),
        (["plan", "my_model:build", "--rank", "0"], "rank must be 1 or more"),
        (["plan", "my_model:build", "--rank", "99"], "above min(in, out)"),
        (["plan", "my_model:build", "--include", "layers.*"], "matches no module"),
        (["plan", "my_model:build", "--json", "no/such/dir.json"], "can't write"),
        (["inspect", "my_model:build", "--show", "quantise"], "no pass 'quantise'; there are capture"),
        (["plan", "empty.json"], "empty.json"),
        (["plan", "strange.json"], "strange.json"),
        (["plan", "broken.gguf"], "broken.gguf"),
    ],
)
def test_errors_are_one_line(here, capsys, arguments, told):
    (here / "empty.json").write_text("{}", encoding="utf-8")
    (here / "strange.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    (here / "broken.gguf").write_bytes(b"GGUF but not really")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and told in error and "Traceback" not in error


def test_a_missing_transformers_names_the_extra(here, capsys, monkeypatch):
    (here / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", "config.json"]) == 2
    assert 'pip install "lrcompile[hf]"' in capsys.readouterr().err


def test_as_a_command(here):
    def command(*arguments):
        argv = [sys.executable, "-m", "lrcompile.cli", *arguments]
        return subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=300)

    done = command("plan", "my_model:build", "--compression", "2")
    assert done.returncode == 0 and "of model" in done.stdout and done.stderr == ""
    done = command("plan", "my_model:broken")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: my_model:broken() failed")
    done = command("plan", "my_model:misfit")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: Sequential could not be run with these example inputs: RuntimeError: ")
    done = command("--version")
    assert done.stdout == f"lrcompile {lrcompile.__version__}\n"
    done = command("--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "module:factory" in done.stdout
    assert command().returncode == 2


def test_a_model_directory(hf_directory, capsys):
    assert main(["plan", str(hf_directory), "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0-1.mlp.up_proj" in out and "an output head" in out and "for a token" in out
    assert "Singular values" in out


def test_a_config_is_planned_on_meta(hf_directory, capsys):
    model, inputs = load_source(str(hf_directory / "config.json"))
    assert all(p.is_meta for p in model.parameters()) and token_count(inputs) == 32
    assert main(["plan", str(hf_directory / "config.json"), "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert "Singular values" not in out
    real = sum(p.numel() for p in tiny_llama().parameters())
    assert f"{real:,} →" in out
    assert main(["inspect", str(hf_directory / "config.json"), "--rank", "4"]) == 0
    assert "not measured" in capsys.readouterr().out


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
SIDES = {
    f"{side}_{name}": n
    for side in ("encoder", "decoder")
    for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
}
CONFIGS = {
    "bert": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
    "bart": {"d_model": 32, "vocab_size": 64, **SIDES},
    "vit": {**SMALL, "image_size": 32, "patch_size": 8},
    "whisper": {"d_model": 32, "vocab_size": 64, "num_mel_bins": 16, "max_source_positions": 50, **SIDES},
    "wav2vec2": {**SMALL, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
    "clip": {
        "projection_dim": 32,
        "text_config": {**SMALL, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
        "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_of_many_kinds(kind, tmp_path, capsys):
    path = tmp_path / "config.json"
    special = {} if kind == "clip" else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    start = {"decoder_start_token_id": 1} if kind in ("t5", "bart", "whisper") else {}
    path.write_text(json.dumps({"model_type": kind, **special, **start, **CONFIGS[kind]}), encoding="utf-8")
    assert main(["plan", str(path), "--rank", "2"]) == 0, capsys.readouterr().err
    assert "weights become pairs" in capsys.readouterr().out


def test_a_gguf_file(tmp_path, capsys):
    """A Llama written as GGUF by the format's own library."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    width, hidden, heads, words = 32, 64, 4, ["<unk>", "<s>", "</s>", *"abcdefghijklm"]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 32),
        (writer.add_embedding_length, width),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, hidden),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, width // heads),
        (writer.add_vocab_size, len(words)),
        (writer.add_tokenizer_model, "llama"),
        (writer.add_token_list, words),
        (writer.add_token_scores, [0.0] * len(words)),
        (writer.add_token_types, [1] * len(words)),
    ):
        add(value)
    shapes = {"token_embd": (len(words), width), "output": (len(words), width), "output_norm": (width,)}
    block = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, hidden)}
    block |= {f"attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
    block |= {f"ffn_{n}": (hidden, width) for n in ("gate", "up")}
    for name, shape in {**shapes, **{f"blk.0.{n}": s for n, s in block.items()}}.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["plan", str(path), "--rank", "4"]) == 0, capsys.readouterr().err
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out


def test_bench_is_reached(monkeypatch):
    import lrcompile.bench

    seen = []
    monkeypatch.setattr(lrcompile.bench, "main", seen.append)
    assert main(["bench", "plan", "--quick"]) == 0 and seen == [["plan", "--quick"]]


def test_token_count():
    assert token_count({"input_ids": ids(2, 7)}) == 14
    assert token_count((torch.randn(2, 7),)) is None
    assert token_count((ids(),)) == 14 and LanguageModel()(ids()).shape[:2] == (2, 7)
