"""Step timings into tokens/s, MFU and peak memory.

    meter = Meter(flops_per_token=..., dense_flops_per_token=..., peak=peak_flops("cuda", "bfloat16", ranks))
    meter.start()
    for step in ...:
        ...                                   # data, forward, backward, optimizer, loss.item()
        log.step(step, loss=..., **meter.step(tokens))
        with meter.aside():
            ...                               # evaluation, a checkpoint: not counted

A step lasts from the end of the one before to its own: what waits for data counts, what is put aside doesn't.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lrcompile.cost import find_device

COLD_STEPS = 3  # compilation and, where a backend adopts by itself, adoption happen in these


class Meter:
    """Figures of each step, as RunLog.step takes them."""

    def __init__(
        self,
        *,
        tokens: int = 0,
        flops_per_token: float | None = None,
        dense_flops_per_token: float | None = None,
        peak: float | None = None,
        device: torch.device | str = "cpu",
        cold: int = COLD_STEPS,
    ) -> None:
        """
        Args:
            tokens: trained on before, by the run that this one resumes.
            flops_per_token: forward and backward of the model as it is, of one token; None where not known.
            dense_flops_per_token: the same of the dense model it was made from, so that speeds of both can be compared by
                one number ("dense-equivalent": may be above 1).
            peak: FLOP/s of all ranks together (`peak_flops`); None where not known.
            device: that trains; decides whose memory is told.
            cold: first steps of this process, marked as such: compilation is in them.
        """
        self._tokens, self._peak, self._cold = tokens, peak, cold
        self._flops, self._dense = flops_per_token, dense_flops_per_token
        self._device = torch.device(device)
        self._mark: float | None = None

    def start(self) -> None:
        """The first step begins now."""
        self._mark = time.perf_counter()

    def step(self, tokens: int) -> dict[str, Any]:
        """A step ends now and the next begins. On a GPU read the loss before, so that the step's work is done.

        Args:
            tokens: of this step, all ranks together.

        Returns:
            seconds; tokens (so far) and tokens_per_s of all ranks; mfu and mfu_dense as shares of the peak (None where
            FLOPs or peak aren't known); memory: peak bytes of this process; cold=True in the first steps.

        Raises:
            RuntimeError: start() was not called.
        """
        now = time.perf_counter()
        if self._mark is None:
            raise RuntimeError("Meter.start() comes before the first step")
        seconds, self._mark = now - self._mark, now
        self._tokens += tokens
        rate = tokens / seconds
        told = {
            "tokens_per_s": rate,
            "mfu": self._share(rate, self._flops),
            "mfu_dense": self._share(rate, self._dense),
            "memory": peak_memory(self._device),
            "seconds": seconds,
            "tokens": self._tokens,
        }
        if self._cold > 0:
            self._cold -= 1
            told["cold"] = True
        return told

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent in here belongs to no step."""
        self._synchronize()
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            if self._mark is not None:
                self._mark += time.perf_counter() - begun

    def _share(self, rate: float, flops: float | None) -> float | None:
        return rate * flops / self._peak if flops and self._peak else None

    def _synchronize(self) -> None:
        # Kernels that are still running would be charged to the wrong side.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory(device: torch.device | str) -> int:
    """The most bytes held at once: by tensors on a CUDA device, by the whole process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB, macOS in bytes


def peak_flops(device: torch.device | str, precision: str, ranks: int = 1) -> float | None:
    """Peak FLOP/s of so many devices like this one (the vendors' dense figures of lrcompile.cost).

    Args:
        device: one of them.
        precision: of the products: "bfloat16" or "float32" (tf32 where torch may use it).
        ranks: how many.

    Returns:
        None on a CPU, and for a GPU that the table doesn't know.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    known = find_device(properties.name, arch)
    if known is None:
        return None
    single = "single" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return ranks * known.rate(single if precision == "float32" else "half")
