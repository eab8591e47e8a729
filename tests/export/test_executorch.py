"""Files for a phone, run by ExecuTorch's runtime on this CPU."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import EvalError, ExportError

from .helpers import IDS, after, learnt, tiny

pytest.importorskip("transformers", reason="the models are transformers'")
if importlib.util.find_spec("executorch") is None:
    pytest.skip("executorch is not installed: pip install 'lrcompile[executorch]'", allow_module_level=True)

from lrcompile.export.command import add_parser, fits  # noqa: E402
from lrcompile.export.lower import Exported, export_executorch  # noqa: E402
from lrcompile.export.runtime import Program  # noqa: E402

LENGTH = 96


@pytest.fixture(scope="module")
def model() -> Any:
    return learnt()


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("files")
    return {
        form: export_executorch(copy.deepcopy(model), folder / f"{form}.pte", form=form, max_length=LENGTH)
        for form in ("8da4w", "int8", "none")
    }


@pytest.mark.parametrize("form", ["8da4w", "int8", "none"])
def test_the_runtime_computes_what_the_eager_quantised_model_does(made: dict[str, Exported], form: str) -> None:
    file = made[form]
    program = Program(file.path)
    program.ends = []
    prompt = [7, after(7), after(after(7))]
    said = list(program.generate(prompt, 64))
    assert len(said) == 64 and len(set(said)) > 32
    tokens, position = prompt, 0
    with torch.no_grad():
        for token in said:
            eager = file.eager(torch.tensor([tokens]), torch.tensor([position]))[0]
            found = program.logits(tokens, position)
            # Sums in another order now and then round an activation the other way: a step of its 255.
            assert (found - eager).abs().max() <= (1e-4 if form == "none" else 0.02) * eager.abs().max()
            assert int(eager.argmax()) == token
            position, tokens = position + len(tokens), [token]


def test_pairs_stay_pairs_and_a_tied_head_is_there_once(made: dict[str, Exported]) -> None:
    for form, file in made.items():
        assert file.pairs == 7 and file.path.stat().st_size == file.nbytes
        data, embedding = file.path.read_bytes(), file.eager.model.get_input_embeddings()
        table = embedding.weight if form == "none" else embedding.codes
        assert data.count(table.detach().numpy().tobytes()) == 1
        assert table.nbytes == 64 * 64 * {"8da4w": 0.5, "int8": 1, "none": 4}[form]
        pair = file.eager.model.model.layers[0].mlp.up_proj
        if form == "none":
            assert all(data.count(side.weight.numpy().tobytes()) == 1 for side in (pair.down, pair.up))
    assert made["8da4w"].nbytes < made["int8"].nbytes < made["none"].nbytes


def test_what_the_file_tells(made: dict[str, Exported]) -> None:
    program = Program(made["int8"].path)
    assert (program.vocabulary, program.max_length, program.ends, program.form) == (64, LENGTH, [0], "int8")


def test_the_cache_is_filled_to_its_last_place_and_begins_anew(made: dict[str, Exported]) -> None:
    program = Program(made["none"].path)
    program.ends = []
    whole = list(program.generate([7]))
    assert len(whole) == LENGTH
    assert list(program.generate([7], 5)) == whole[:5]  # what a conversation before left is not looked at
    long = [7, *whole[: LENGTH - 1]]
    assert int(program.logits(long, 0).argmax()) == whole[-1]
    with pytest.raises(ExportError, match=f"{LENGTH + 1} tokens don't fit into the {LENGTH} .*--max-length"):
        program.logits([*long, 1], 0)
    with pytest.raises(ExportError, match="no tokens"):
        program.logits([], 0)
    with pytest.raises(ExportError, match="token 64 is none of the model's 64: .*another model"):
        program.logits([64], 0)


def test_end_token(made: dict[str, Exported]) -> None:
    program = Program(made["none"].path)
    said = list(program.generate([7]))
    assert said[-1] == 0 and 0 not in said[:-1]


def test_an_operator_that_the_runtime_lacks(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(x)

    model = tiny()
    model.model.layers[0].mlp.act_fn = Bessel()
    with pytest.raises(ExportError, match=r"special_i0e.*layers\.0\.mlp\.act_fn"):
        export_executorch(model, tmp_path / "a.pte", form="none", max_length=16)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_before_the_work(tmp_path: Path, made: dict[str, Exported]) -> None:
    path = tmp_path / "a.pte"
    with pytest.raises(ExportError, match=r"over --max-bytes 20000 .*: .*"):
        export_executorch(tiny(), path, form="int8", max_bytes=20_000, max_length=16)
    with pytest.raises(ExportError, match="no format 'int3'; there are 8da4w, int8, none"):
        export_executorch(tiny(), path, form="int3", max_length=16)
    with pytest.raises(ExportError, match=r"groups of 32 inputs, .*down_proj.* \(100 inputs\).*--quantise int8"):
        export_executorch(tiny(adopted=False, intermediate_size=100), path, max_length=16)
    with pytest.raises(ExportError, match="positions for 2 to 128"):
        export_executorch(tiny(), path, max_length=129)
    with pytest.raises(ExportError, match="ends in .pte"):
        export_executorch(tiny(), tmp_path / "a.bin")
    with pytest.raises(ExportError, match="no such file"):
        Program(path)
    path.write_bytes(made["int8"].path.read_bytes()[:1000])
    with pytest.raises(ExportError, match="a.pte"):
        Program(path)


def test_windows_are_refused_where_they_would_matter(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, vocab_size=64, sliding_window=8))
    with pytest.raises(ExportError, match="windows of 8 tokens; give --max-length 8 or less"):
        export_executorch(model, tmp_path / "a.pte", max_length=16)


# --- the command line -------------------------------------------------------------------------------------------------


def run(*argv: Any) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args([str(arg) for arg in argv])
    return args.run(args)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/ of transformers with a tokenizer, adopted/ of lrcompile.save."""
    from ..tasks.helpers import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    lrcompile.adopt(model, lrcompile.Recipe(rank=16), IDS)
    lrcompile.save(model, folder / "adopted")
    return folder


def test_export_and_chat(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "phone.pte"
    where = [home / "adopted", "--base", home / "dense", "--to", "executorch", file]
    assert run("export", *where, "--quantise", "int8", "--max-length", 64, "--max-bytes", "1MB") == 0
    assert "6 low-rank pairs" in capsys.readouterr().out
    tokenizer = ["--tokenizer", home / "dense"]
    assert run("generate", file, *tokenizer, "--prompt", "hello", "--max-tokens", 8) == 0
    told = capsys.readouterr()
    assert told.out.strip() and "5 tokens read" in told.err and "tokens/s" in told.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand so\n\nnot read"))
    assert run("generate", file, *tokenizer, "--max-tokens", 8) == 0
    again = capsys.readouterr()
    assert again.out.startswith(told.out) and again.err.count("tokens read") == 2
    with pytest.raises(ExportError, match="70 tokens don't fit into the 64"):
        run("generate", file, *tokenizer, "--prompt", "a" * 70)


def test_export_dense(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("export", home / "adopted", "--base", home / "dense", "--to", "hf", tmp_path / "out") == 0
    assert "dense" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
    assert again.model.layers[0].mlp.up_proj.weight.shape == (64, 32)
    with pytest.raises(ExportError, match="go with --to executorch"):
        run("export", home / "dense", "--to", "hf", tmp_path / "other", "--max-bytes", "1MB")
    with pytest.raises(EvalError, match="--base"):
        run("export", home / "adopted", "--to", "hf", tmp_path / "other")


def test_another_models_tokenizer(home: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    fits(tokenizer, 102)
    with pytest.raises(ExportError, match="102 tokens and the model 64"):
        fits(tokenizer, 64)
