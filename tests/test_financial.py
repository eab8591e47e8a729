"""examples/financial: its walkthrough's commands on a tiny model and rows written here, and its script's table."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lrcompile.show import as_text

from .helpers_readme import blocks, run_line, words_of
from .tasks.helpers import adapters, tiny_model, tiny_tokenizer, write_sets

ROOT = Path(__file__).resolve().parent.parent
WALK = (ROOT / "examples" / "financial" / "README.md").read_text(encoding="utf-8")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = ROOT / "examples" / "results" / "financial"


@pytest.fixture
def regimes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "financial"))
    return importlib.import_module("regimes")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory as a reader has it: the examples, a model, and the sets in the forms that they come in."""
    pytest.importorskip("lm_eval")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    data = tmp_path / "DATA"
    data.mkdir()
    write_sets(data)
    for kind in ("headline", "post"):
        rows = {
            str(n): {
                "sentence": f"{kind} number {n}",
                "info": [{"target": "X", "sentiment_score": f"{n % 3 / 2 - 0.5}"}],
            }
            for n in range(30)
        }
        (data / f"task1_{kind}_ABSA_train.json").write_text(json.dumps(rows), encoding="utf-8")
    body = "".join(f'"$B{n} is {("down", "up", "there")[n % 3]}",{n % 3}\n' for n in range(40))
    (data / "tfns_train.csv").write_text("text,label\n" + body, encoding="utf-8")
    ask = "Please answer the following question with true or false, question: is %d odd?\n\nAnswer format: true/false"
    adapters(data / "boolq" / "train.json", [(ask % n, ("false", "true")[n % 2]) for n in range(30)])
    ask = "Please choose the correct answer to the question: %s %d?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    for name in ("ARC-Easy", "openbookqa"):
        adapters(data / f"{name}_train.json", [(ask % (name, n), f"answer{n % 2 + 1}") for n in range(30)])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "only", [pytest.param(["ours"], marks=pytest.mark.important), ["full", "lora", "qlora", "ours", "half"]]
)
def test_the_walkthrough(place: Path, only: list[str]) -> None:
    """Its commands, in their order, with few steps; and of the regimes these."""
    lines = words_of("".join(blocks(WALK, "shell")))
    named = [words[1] for words in lines]
    order = ["plan", "finetune", "data", "eval", "examples/financial/regimes.py", "report", "export", "generate"]
    assert list(dict.fromkeys(named)) == order
    phone = importlib.util.find_spec("executorch") is not None
    few = ["--steps", "3", "--schedule.warmup", "1", "--evaluate.batches", "1", "--data.calibration", "2"]
    few += ["--data.length", "300"]  # the tokens of the tiny model are characters
    more = {
        "examples/configs/financial/compress.toml": few,
        "finetune": [*few, "--model.source", "tiny"],
        "examples/financial/regimes.py": [*few, "--model", "tiny", "--only", "untuned", *only],
        "eval": ["--limit", "4"],
        "executorch": ["--max-length", "256"],
        "generate": ["--max-tokens", "4"],
    }
    printed = {}
    for words in lines:
        if not phone and ("executorch" in words or any(word.endswith(".pte") for word in words)):
            print(f"skipped, executorch isn't installed: {' '.join(words)}")
            continue
        if words[1] == "report":
            words = [
                word
                for word in words
                if word.endswith(".png") or Path(word).parent.name != "financial" or Path(word).name in only
            ]
        printed[words[1]] = run_line(words, place, names={MODEL: "tiny"}, more=more).stdout
    assert "mean of the financial" in printed["examples/financial/regimes.py"]
    assert "weights + optimizer" in printed["examples/financial/regimes.py"]
    for regime in (*only, "compress"):
        assert (place / "out" / "financial" / regime / "merged" / "config.json").is_file()
    assert (place / "out" / "financial" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "phone.pte").exists() == phone


def test_what_the_walkthrough_shows_is_there() -> None:
    there = {path.stem for path in RESULTS.glob("*.json")}
    assert there >= {"untuned", "full", "ours"}
    assert all((RESULTS / name / "metrics.jsonl").is_file() for name in there - {"untuned", "half"})
    assert (ROOT / "examples" / "financial" / "report.png").stat().st_size < 300_000


def test_the_table_of_the_results(
    regimes: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands in the walkthrough, and its figures as they are in the files."""
    monkeypatch.setenv("COLUMNS", "110")
    regimes.main(["--show", str(RESULTS)])
    printed = capsys.readouterr().out
    shown = next(block for block in blocks(WALK, "text") if "over untuned" in block)
    assert [line.rstrip() for line in shown.splitlines()] == [line.rstrip() for line in printed.splitlines()]
    told = json.loads((RESULTS / "ours.json").read_text(encoding="utf-8"))
    line = next(line for line in printed.splitlines() if line.startswith("mean of the financial"))
    assert f"{100 * told['means']['financial']['accuracy']:.1f} ±" in line.split("  ")[-2]


def score(task: str, group: str, accuracy: float) -> dict[str, Any]:
    return {"task": task, "group": group, "rows": 100, "accuracy": accuracy, "accuracy_stderr": 0.02}


def write_result(folder: Path, regime: str, accuracy: float, held: dict[str, int] | None = None) -> None:
    financial, general = score("fpb", "financial", accuracy), score("piqa", "general", 0.5)
    tasks = {"fpb": financial | {"commonest": 0.4}, "piqa": general | {"commonest": 0.3}}
    means = {"financial": tasks["fpb"], "general": tasks["piqa"]}
    (folder / f"{regime}.json").write_text(json.dumps({"tasks": tasks, "means": means}))
    if held is not None:
        (folder / regime).mkdir()
        lines = [
            {"kind": "event", "step": 0, "time": "2026-01-01T00:00:00", "text": "start", "trained": 4_000_000},
            {"kind": "event", "step": 0, "time": "2026-01-01T00:00:00", "text": "held", "held": held},
            *({"kind": "step", "step": n, "loss": 1.0, "tokens": 100 * n, "seconds": 2.0} for n in (1, 2)),
            {"kind": "eval", "step": 2, "loss": 0.5},
        ]
        (folder / regime / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_by_hand(regimes: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "untuned", 0.2)
    write_result(tmp_path, "full", 0.7, {"weights": 500_000_000, "gradients": 500_000_000, "optimizer": 1_000_000_000})
    write_result(tmp_path, "ours", 0.75, {"weights": 100_000_000, "gradients": 20_000_000, "optimizer": 50_000_000})
    text = as_text(regimes.table(regimes.results(tmp_path)), 100)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["fpb (100)"][2:] == ["40.0", "20.0", "±", "2.0", "70.0", "±", "2.0", "75.0", "±", "2.0"]
    assert "over untuned +50.0 +55.0".split() in [line.split() for line in text.splitlines()]
    assert "over untuned +0.0 +0.0".split() in [line.split() for line in text.splitlines()], "of the general tasks"
    assert lines["weights + optimizer"][3:] == ["1,500", "150"] and lines["all three"][2:] == ["2,000", "170"]
    assert [line.split()[2:] for line in text.splitlines() if "times less" in line] == [
        ["1.0x", "10.0x"],
        ["1.0x", "11.8x"],
    ]
    assert max(map(len, text.splitlines())) <= 80
    assert lines["seconds of training"][3:] == ["4", "4"] and lines["held-out loss"][2:] == ["0.500", "0.500"]
    assert lines["numbers trained"][2:] == ["4.0M", "4.0M"]
    assert (
        lines["fpb (100)"][2] == lines["mean of the financial"][4] == "40.0"
        and lines["mean of the general"][4] == "30.0"
    )
    assert "commonest: the accuracy of always giving" in text


def test_half_shows_the_run_that_it_is_of(regimes: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "ours", 0.7, {"weights": 100_000_000, "gradients": 20_000_000, "optimizer": 50_000_000})
    write_result(tmp_path, "half", 0.6)
    text = as_text(regimes.table(regimes.results(tmp_path)), 100)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["fpb (100)"][2:] == ["40.0", "70.0", "±", "2.0", "60.0", "±", "2.0"]
    assert lines["all three"][-2:] == ["170", "170"] and lines["held-out loss"][2:] == ["0.500"], (
        "it has none of its own"
    )


def test_files_without_the_commonest_label_are_shown_without_it(regimes: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "untuned", 0.2)
    path = tmp_path / "untuned.json"
    told = json.loads(path.read_text())
    for score in (*told["tasks"].values(), *told["means"].values()):
        score.pop("commonest", None)
    path.write_text(json.dumps(told))
    text = as_text(regimes.table(regimes.results(tmp_path)), 100)
    assert "commonest" not in text and "20.0 ± 2.0" in text


def test_options_that_no_run_would_get_are_refused(
    regimes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are finetune's, and neither the untuned model nor a table is finetuned."""
    for words, where in (
        (["--data", "d", "--only", "untuned"], "--only untuned"),
        (["--show", str(tmp_path)], "--show"),
    ):
        with pytest.raises(SystemExit) as ended:
            regimes.main([*words, "--out", str(tmp_path / "out"), "--stpes", "3"])
        told = capsys.readouterr()
        assert ended.value.code == 2 and not told.out and not (tmp_path / "out").exists()
        assert (
            f"unrecognized arguments: --stpes 3 (they are given to lrcompile finetune, which {where} doesn't"
            in told.err
        )


def test_no_error_is_told_where_there_is_none(regimes: ModuleType) -> None:
    assert regimes._accuracy({"accuracy": 0.5, "accuracy_stderr": None}) == "50.0" and regimes._accuracy(None) == "–"


def test_what_can_not_be_shown_is_told(regimes: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no untuned.json"):
        regimes.main(["--show", str(tmp_path)])
    with pytest.raises(SystemExit, match="give --data DIR"):
        regimes.main(["--out", str(tmp_path)])
    write_result(tmp_path, "full", 0.7)
    with pytest.raises(SystemExit, match="full.json has no run beside it: "):
        regimes.main(["--show", str(tmp_path)])
    (tmp_path / "full.json").write_text("{")
    with pytest.raises(SystemExit, match="full.json is not what lrcompile eval --json writes"):
        regimes.main(["--show", str(tmp_path)])


def test_a_regime_that_fails_ends_the_script(
    regimes: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        regimes.main(["--data", str(tmp_path), "--model", "absent", "--out", str(tmp_path / "out"), "--only", "ours"])
    assert ended.value.code == 2
    told = capfd.readouterr()
    assert told.out.startswith("lrcompile finetune ") and "error: " in told.err


def test_what_is_done_is_not_done_again(regimes: ModuleType, tmp_path: Path) -> None:
    args = regimes.argparse.Namespace(out=tmp_path, model="m", tasks="fpb", data="d")
    finetune, evaluate = regimes.commands("ours", args, ["--steps", "3"])
    assert finetune[0] == "finetune" and finetune[-2:] == ["--steps", "3"] and "--resume" in finetune
    assert evaluate[:2] == ["eval", str(tmp_path / "ours" / "merged")]
    assert [words[0] for words in regimes.commands("untuned", args, [])] == ["eval"]
    export, evaluate = regimes.commands("half", args, [])
    assert (
        export[:2] == ["export", str(tmp_path / "ours" / "merged")]
        and export[-4:] == "--untuned m --strength 0.5".split()
    )
    assert evaluate[1] == export[4] == str(tmp_path / "half" / "merged")
    (tmp_path / "ours.json").write_text("{}")
    assert regimes.commands("ours", args, []) == []
