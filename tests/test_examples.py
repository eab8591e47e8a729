"""Each example runs as a user would run it, in a process of its own, at a toy size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TINY_GPT = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "32", "--vocab-size", "320"]
SHORT = ["--batch-size", "4", "--accumulate", "2", "--warmup", "2", "--eval-every", "4", "--eval-batches", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text of its own: the tokenizer is trained in no time."""
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    lines = [f"{n} green bottles hanging on the wall, and if one green bottle should fall\n" for n in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(root: Path, script: str, *arguments: str | Path, cwd: Path) -> str:
    """Run an example from another directory and return all that it printed."""
    command = [sys.executable, str(root / "examples" / script), *(str(a) for a in arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# What the scripts do before the one word is changed is no code of ours.
both_backends = pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "lrcompile"])


def losses(printed: str) -> list[float]:
    return [float(x) for x in re.findall(r"validation loss (\S+)", printed)]


@both_backends
def test_train_gpt_learns_and_resumes(root: Path, text: Path, tmp_path: Path, backend: str) -> None:
    common = ["--backend", backend, "--data", text, "--device", "cpu", "--lr", "1e-2", *TINY_GPT, *SHORT]
    printed = run(root, "train_gpt.py", *common, "--steps", "8", "--out", "run", cwd=tmp_path)
    first, second = losses(printed)
    assert second < first
    assert len(re.findall(r"^lrcompile: ", printed, re.MULTILINE)) == (backend == "lrcompile")

    printed = run(root, "train_gpt.py", *common, "--steps", "12", "--out", "run", "--resume", cwd=tmp_path)
    (third,) = losses(printed)
    assert third < second
    assert "step     8" not in printed, "it went on from step 8"


def test_resuming_is_exact(root: Path, text: Path, tmp_path: Path) -> None:
    """Four steps, a new process, four more: the same validation loss as eight in one go."""
    common = ["--backend", "lrcompile", "--data", text, "--device", "cpu", *TINY_GPT, *SHORT]
    whole = losses(run(root, "train_gpt.py", *common, "--steps", "8", "--out", "whole", cwd=tmp_path))

    # The cosine depends on --steps, so the first half is an interrupted run of eight: its checkpoint at step four.
    code = (
        "import sys, train_gpt\n"
        "saved = train_gpt.save_checkpoint\n"
        "def save_and_stop(path, **state):\n"
        "    saved(path, **state)\n"
        "    raise SystemExit(0)\n"
        "train_gpt.save_checkpoint = save_and_stop\n"
        "train_gpt.main(sys.argv[1:])\n"
    )
    stopper = tmp_path / "stopper.py"
    stopper.write_text(f"import sys; sys.path.insert(0, {str(root / 'examples')!r})\n{code}", encoding="utf-8")
    arguments = [str(a) for a in (*common, "--steps", "8", "--out", "half")]
    subprocess.run([sys.executable, str(stopper), *arguments], cwd=tmp_path, check=True, timeout=600)
    half = losses(run(root, "train_gpt.py", *common, "--steps", "8", "--out", "half", "--resume", cwd=tmp_path))
    assert half == pytest.approx(whole[1:], abs=2e-4)


def test_a_checkpoint_of_another_shape_is_refused(root: Path, text: Path, tmp_path: Path) -> None:
    common = ["--backend", "eager", "--data", text, "--device", "cpu", *TINY_GPT, *SHORT, "--out", "run"]
    run(root, "train_gpt.py", *common, "--steps", "1", cwd=tmp_path)
    command = [sys.executable, str(root / "examples" / "train_gpt.py"), *map(str, common)]
    command += ["--n-layer", "3", "--resume"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "'n_layer': 2" in done.stderr and "Traceback" not in done.stderr


@both_backends
def test_finetune_hf_lowers_the_loss(root: Path, tmp_path: Path, backend: str) -> None:
    options = ["--config", "tiny", "--backend", backend, "--steps", "8", "--length", "64", "--lr", "1e-2"]
    printed = run(root, "finetune_hf.py", *options, cwd=tmp_path)
    before, after = (float(x) for x in re.findall(r"(?:before|after): +loss (\S+)", printed))
    assert after < before - 0.5
    assert ("lrcompile: " in printed) == (backend == "lrcompile")


def test_own_pass_runs(root: Path, tmp_path: Path) -> None:
    assert run(root, "own_pass.py", cwd=tmp_path).strip()


def test_demo_compares_the_twins(root: Path, text: Path, tmp_path: Path) -> None:
    printed = run(root, "demo.py", "--quick", "--data", text, "--out", "demo", cwd=tmp_path)
    assert printed.count("lrcompile: ") == 1
    for row in ("matrices of the blocks", "tokens/s", "validation loss, equal steps", "peak memory"):
        assert row in printed
    figures = json.loads((tmp_path / "demo" / "figures.json").read_text(encoding="utf-8"))
    assert figures["compression"] > 1.5
    picture = (tmp_path / "demo" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
