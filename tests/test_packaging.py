"""A wheel built from the tree installs and works in an empty environment, from any directory."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PROBE = """
import importlib.util, json, sys
import lrcompile
heavy = ["bitsandbytes", "torchao", "transformers", "torch._inductor", "triton"]
loaded = [name for name in heavy if name in sys.modules]
import lrcompile.kernels, lrcompile.passes
import torch._dynamo
print(json.dumps({
    "homes": [lrcompile.__file__, lrcompile.passes.__file__, lrcompile.kernels.__file__],
    "loaded": loaded,
    "top": [name for name in ("passes", "kernels") if importlib.util.find_spec(name)],
    "backends": torch._dynamo.list_backends(),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    # A variable that pointed Python at the checkout would hide what the wheel lacks.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would keep files of deleted modules in the checkout's build/."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("lrcompile", "passes", "kernels"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it and nothing else but this one's dependencies."""
    place = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=place)
    # A directory named in a .pth file is searched for modules, after the environment's own, but the .pth files in it
    # (the editable install's among them) are not read.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python


def test_the_wheel_works_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    seen = json.loads(run(python, "-c", PROBE, cwd=tmp_path))
    for home in seen["homes"]:
        assert Path(home).is_relative_to(python.parent.parent), f"{home} is not the installed one"
    assert seen["loaded"] == [], "import lrcompile must stay light"
    assert seen["top"] == [], "passes and kernels must not be importable by these names"
    assert "lrcompile" in seen["backends"]


def test_the_wheel_compiles_a_model(python: Path, tmp_path: Path) -> None:
    code = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
compiled = torch.compile(model, backend="lrcompile", options={"rank": 16, "inner": "eager"})
for _ in range(2):
    compiled(torch.randn(4, 64)).sum().backward()
print(sorted(name for name, _ in model.named_parameters()))
"""
    names = run(python, "-c", code, cwd=tmp_path)
    assert "'0.weight_a', '0.weight_b'" in names and "'0.weight'" not in names


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    assert "usage" in run(python.with_name("lrcompile"), "--help", cwd=tmp_path).lower()


def test_the_wheel_holds_every_module_and_its_type_marker(root: Path, python: Path, tmp_path: Path) -> None:
    """The list of packages in pyproject.toml is written by hand: a new folder must not be forgotten."""
    site = Path(run(python, "-c", "import lrcompile; print(lrcompile.__path__[0])", cwd=tmp_path).strip())
    homes = {"lrcompile": site, "passes": site / "passes", "kernels": site / "kernels"}
    missing = [
        str(file.relative_to(root))
        for name, home in homes.items()
        for file in (root / name).rglob("*.py")
        if not (home / file.relative_to(root / name)).exists()
    ]
    missing += [f.name for f in (root / "kernels").rglob("*.json") if not (site / "kernels/tuning" / f.name).exists()]
    assert missing == []
    assert (site / "py.typed").exists()


def test_every_import_is_a_declared_dependency(root: Path) -> None:
    """Whatever a module imports as it loads is installed along with the wheel, not only beside these tests."""
    declared = re.search(r"^dependencies = (\[.*\])$", (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert declared is not None
    allowed = {re.split(r"[^\w-]", name)[0] for name in ast.literal_eval(declared[1])}
    allowed |= {"lrcompile", *sys.stdlib_module_names}
    for file in (f for folder in ("lrcompile", "passes", "kernels") for f in (root / folder).rglob("*.py")):
        loading = ast.parse(file.read_text("utf-8")).body
        names = [alias.name for node in loading if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in loading if isinstance(node, ast.ImportFrom) and not node.level]
        # Imported where a kernel is launched or compiled: torch's CUDA builds bring Triton along.
        lazy = {"triton"} if file.name.endswith("_triton.py") or file.name == "aot.py" else set()
        if file.parts[-2:] == ("export", "cached.py"):  # imported when a model of transformers is exported
            lazy = {"transformers"}
        if file.parts[-2:] == ("export", "score.py"):  # imported when a file for a phone is evaluated
            lazy = {"lm_eval"}
        assert {name.split(".")[0] for name in names} <= allowed | lazy, file


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_missing_compiler_is_named_before_anything_is_installed(root: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)

    def make(compiler: str) -> str:
        # Under `make test` itself the outer make's flags would make this one tell of directories.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"CXX": compiler}
        # The set-up's first command says what Python it was given: where it gets so far, nothing was missing.
        done = subprocess.run(
            ["make", "test", "PYTHON=@echo set up:"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode != 0 and not (tmp_path / ".venv").exists()
        return done.stdout + done.stderr

    told = make("absent-c++")
    assert told.splitlines()[0].startswith("no C++ compiler: absent-c++ is not there") and "set up:" not in told
    assert "set up: -m venv" in make("sh") and "no C++ compiler" not in make("sh")
    assert "set up: -m venv" in make("env sh")  # one with a launcher in front
