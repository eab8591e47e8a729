"""Tokens/s, MFU and memory of steps."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from lrcompile import cost
from lrcompile.train.meter import Meter, peak_flops, peak_memory


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    at = [100.0]
    monkeypatch.setattr("lrcompile.train.meter.time", SimpleNamespace(perf_counter=lambda: at[0]))
    return at


def test_figures_of_a_step(now: list[float]) -> None:
    meter = Meter(tokens=1000, flops_per_token=1e9, dense_flops_per_token=2.5e9, peak=4e12, cold=1)
    meter.start()
    now[0] += 2.0
    first = meter.step(4096)
    assert first.pop("memory") > 10_000_000
    assert first == {
        **{"tokens_per_s": 2048.0, "mfu": 2048e9 / 4e12, "mfu_dense": 2.5 * 2048e9 / 4e12},
        **{"seconds": 2.0, "tokens": 5096, "cold": True},
    }
    now[0] += 0.5
    second = meter.step(4096)
    assert (second["seconds"], second["tokens"], "cold" in second) == (0.5, 9192, False)


def test_time_aside_belongs_to_no_step(now: list[float]) -> None:
    meter = Meter()
    meter.start()
    now[0] += 1.0
    meter.step(10)
    now[0] += 0.25  # the next one's data
    with pytest.raises(KeyError), meter.aside():
        now[0] += 50.0
        raise KeyError
    now[0] += 0.25
    told = meter.step(10)
    assert told["seconds"] == 0.5 and told["mfu"] is None and told["mfu_dense"] is None


def test_a_meter_that_was_not_started_says_so() -> None:
    with pytest.raises(RuntimeError, match="start"):
        Meter().step(1)


def test_the_real_clock() -> None:
    meter = Meter()
    meter.start()
    time.sleep(0.02)
    assert 0.02 <= meter.step(100)["seconds"] < 2.0


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory("cpu")
    held = torch.ones(before // 4 + 8_000_000)  # more than the process ever held
    assert peak_memory("cpu") >= before + 30_000_000
    del held


def test_peak_flops_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("cpu", "bfloat16") is None
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    h100 = cost.device_named("H100")
    assert peak_flops("cuda", "bfloat16", 8) == 8 * h100.half
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops("cuda", "float32") == h100.single
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("cuda", "float32") == h100.tf32
    card.name, card.major = "GTX 1080", 6
    assert peak_flops("cuda", "bfloat16") is None
