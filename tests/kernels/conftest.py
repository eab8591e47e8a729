import pytest

from lrcompile.kernels import launch


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter, its bfloat16 put right; skips where kernels are compiled for a GPU instead."""
    pytest.importorskip("triton")
    if not launch.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 (with a GPU: pytest -m gpu)")
    from . import interpreter

    interpreter.install()
