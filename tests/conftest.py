"""What holds for the whole test run: the installed package is tested, with its annotations checked at run time."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU our Triton kernels run in Triton's interpreter. It is switched on as triton is imported, which Dynamo does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

# Every annotated function of these modules has its arguments and result checked in the tests: types by beartype, shapes
# and dtypes where the annotation is jaxtyping's. Modules whose code Dynamo traces are left out: it would trace the
# checks along with it. So is the Recipe, which checks its own arguments: those messages are the ones tested.
CHECKED = [
    "lrcompile.weights.factor",
    "lrcompile.weights.covariance",
    "lrcompile.weights.initialise",
    "lrcompile.weights.plan",
    "lrcompile.weights.planner",
    "lrcompile.weights.state",
    "lrcompile.weights.folder",
    "lrcompile.weights.adapters",
    "lrcompile.weights.peft_export",
    "lrcompile.weights.peft_load",
]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, where examples/ stand."""
    return ROOT


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Dynamo counts recompiles by code object: no test runs into a limit that others used up. And one seed for all."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _log_level():
    """The backend's one line at adoption is INFO; caplog sees it in every test."""
    logger = logging.getLogger("lrcompile")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, for the wrappers that need one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
