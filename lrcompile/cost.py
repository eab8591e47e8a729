"""What an operation costs on a device: FLOPs, bytes and launches against a table of devices (a roofline).

Deterministic and measured nowhere at run time, so that every rank of a training run decides alike. The peaks are the
vendors' dense figures; REACH says which part of a peak real code gets, and is an assumption until measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.errors import KernelError

# The part of a peak that is reached: by the vendor's library, by our Triton code, and of memory bandwidth by both.
# cuBLAS runs large bf16 products at about three quarters of the H100's dense peak and Triton's own tutorial matmul a
# little below it; a plain copy reaches 85 to 92 % of the nominal bandwidth on every card of the table.
LIBRARY_REACH = 0.75
TRITON_REACH = 0.60
MEMORY_REACH = 0.85

# Seconds from the end of one kernel to the start of the next one in a stream that is kept full.
LAUNCH_SECONDS = 2e-6

# Seconds of one turn of a loop whose loads are pipelined: the latency of memory, about 0.7 µs, over three stages.
STEP_SECONDS = 0.25e-6

# Our kernel is taken where it is predicted to be faster by this factor, so that an optimistic prediction costs nothing.
MARGIN = 1.05


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: found in what torch calls the device.
        arch: compilation target: "sm_90", "gfx942".
        half, tf32, single: peak rates in FLOP/s with fp32 accumulation: bf16 or fp16, tf32, fp32.
        bandwidth: of the device's memory, bytes/s.
        l2_bytes: size of the last-level cache on the chip.
        multiprocessors: SMs, or compute units.
        clock: boost clock, Hz.
    """

    name: str
    arch: str
    half: float
    tf32: float
    single: float
    bandwidth: float
    l2_bytes: int
    multiprocessors: int
    clock: float

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may use (CUDA C++ Programming Guide, "Compute Capabilities"; AMD: the LDS)."""
        return SHARED_BYTES[self.arch]

    @property
    def l2_bandwidth(self) -> float:
        """Bytes/s from the last-level cache: half of the 64 bytes per clock and multiprocessor that the wires carry."""
        return 32.0 * self.multiprocessors * self.clock

    @property
    def issued(self) -> float:
        """Instructions/s of single threads: four schedulers of 32 lanes for each multiprocessor, of 16 on AMD's."""
        return (128.0 if self.arch.startswith("sm_") else 64.0) * self.multiprocessors * self.clock

    def rate(self, precision: str) -> float:
        """Peak FLOP/s for "half", "tf32" or "single"."""
        rates = {"half": self.half, "tf32": self.tf32, "single": self.single}
        return rates[precision]


_KIB = 1024
_MIB = 1024 * 1024
SHARED_BYTES = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,
    "sm_89": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "sm_120": 99 * _KIB,
    "gfx942": 64 * _KIB,
    "gfx950": 160 * _KIB,
}


def _device(
    name: str, arch: str, half: float, tf32: float, single: float, gb_s: float, l2_mib: int, sms: int, ghz: float
) -> Device:
    return Device(name, arch, half * 1e12, tf32 * 1e12, single * 1e12, gb_s * 1e9, l2_mib * _MIB, sms, ghz * 1e9)


# TFLOP/s half, tf32, fp32; GB/s; MiB of L2; multiprocessors; GHz. Dense figures, without structured sparsity. Looked up
# from the top, so a longer name stands above the shorter one it contains. Sources: NVIDIA's data sheets "A100", "A10",
# "L4", "L40S", "H100" (2023), "H200" (2024), "DGX B200", "RTX PRO 6000 Blackwell" and the architecture white papers
# GA102, Ada, "RTX Blackwell" (appendix A; consumer cards halve tensor rates with fp32 accumulation); AMD's data sheets
# "Instinct MI300X" and "MI355X", with the Infinity Cache as last level.
DEVICES = (
    _device("A100-SXM4-40GB", "sm_80", 312, 156, 19.5, 1555, 40, 108, 1.41),
    _device("A100-PCIE-40GB", "sm_80", 312, 156, 19.5, 1555, 40, 108, 1.41),
    _device("A100", "sm_80", 312, 156, 19.5, 2039, 40, 108, 1.41),
    _device("A10", "sm_86", 125, 62.5, 31.2, 600, 6, 72, 1.70),
    _device("RTX 3090", "sm_86", 71, 35.6, 35.6, 936, 6, 82, 1.70),
    _device("L40S", "sm_89", 362, 183, 91.6, 864, 96, 142, 2.52),
    _device("L4", "sm_89", 121, 60, 30.3, 300, 48, 58, 2.04),
    _device("RTX 4090", "sm_89", 165, 82.6, 82.6, 1008, 72, 128, 2.52),
    _device("H100 PCIe", "sm_90", 756, 378, 51, 2000, 50, 114, 1.76),
    _device("H100", "sm_90", 989, 495, 67, 3350, 50, 132, 1.83),
    _device("H200", "sm_90", 989, 495, 67, 4800, 50, 132, 1.83),
    _device("B200", "sm_100", 2250, 1100, 75, 7700, 126, 148, 1.85),
    _device("RTX 5090", "sm_120", 209, 105, 105, 1792, 96, 170, 2.41),
    _device("RTX PRO 6000", "sm_120", 504, 252, 125, 1792, 128, 188, 2.60),
    _device("MI300X", "gfx942", 1307, 654, 163, 5300, 256, 304, 2.10),
    _device("MI355X", "gfx950", 2500, 157, 157, 8000, 256, 256, 2.40),
)

# What stands for a device of this target that the table doesn't name.
_TYPICAL = {
    "sm_80": "A100",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90": "H100",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
    "gfx942": "MI300X",
    "gfx950": "MI355X",
}


def find_device(name: str, arch: str) -> Device | None:
    """The table's entry for a device.

    Args:
        name: what torch calls it ("NVIDIA H100 80GB HBM3").
        arch: its target ("sm_90"); decides where the name is unknown, the nearest older target of the family where
            the target is unknown too (sm_103 counts as sm_100).

    Returns:
        None for what is older than every entry, or from another vendor.
    """
    known = next((device for device in DEVICES if device.name in name and device.arch == arch), None)
    if known is not None:
        return known
    older = [target for target in _TYPICAL if _family(target) == _family(arch) and _number(target) <= _number(arch)]
    if not older:
        return None
    typical = _TYPICAL[max(older, key=_number)]
    return next(device for device in DEVICES if device.name == typical)


def device_named(name: str) -> Device:
    """The table's entry called so ("H100").

    Raises:
        KernelError: there is none; the message lists the names.
    """
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    raise KernelError(f"no device {name!r} in the cost table; there are {', '.join(d.name for d in DEVICES)}")


def _family(arch: str) -> str:
    return arch[:3]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_").removeprefix("gfx"), 16)


@dataclass(frozen=True)
class Cost:
    """What one kernel, or several that follow each other (`+`), asks of a device.

    Attributes:
        flops: 2 for a multiply-add.
        bytes: to and from the device's memory.
        cached_bytes: read again from the last-level cache.
        programs: blocks that run side by side; fewer than the multiprocessors leave some idle. 0: enough of them.
        library: the vendor's kernel, not ours.
        launches: kernels that this takes.
        steps: turns of the loops that one program goes through, where that may be what takes longest.
        instructions: of single threads, where there are many beside the products: decoding.
    """

    flops: float
    bytes: float
    cached_bytes: float = 0.0
    programs: int = 0
    library: bool = False
    launches: int = 1
    steps: int = 0
    instructions: float = 0.0

    def seconds(self, device: Device, precision: str) -> float:
        """The slowest of computing, memory, cache and one program's own loops, and the launches.

        Args:
            device: where.
            precision: of the products, as Device.rate takes it.
        """
        # A few multiprocessors draw more than their share of the bandwidth: half of them saturate it.
        busy = min(1.0, self.programs / device.multiprocessors) if self.programs else 1.0
        memory_busy = min(1.0, 2 * busy)
        reach = LIBRARY_REACH if self.library else TRITON_REACH
        computing = self.flops / (device.rate(precision) * reach * busy)
        memory = self.bytes / (device.bandwidth * MEMORY_REACH * memory_busy)
        cache = (self.bytes + self.cached_bytes) / (device.l2_bandwidth * memory_busy)
        issuing = self.instructions / (device.issued * busy)
        return max(computing, memory, cache, issuing, self.steps * STEP_SECONDS) + self.launches * LAUNCH_SECONDS


def library_product(m: int, n: int, k: int, moved: float, device: Device) -> Cost:
    """(m, k) by (k, n) in the vendor's library, `moved` bytes going to or from memory.

    An output of too few tiles for the device is split over k there, which takes a second launch to sum the parts; a
    single row is computed by a matrix-vector kernel that needs none.
    """
    tiles = -(-m // 64) * -(-n // 64)
    split = m > 1 and 2 * tiles < device.multiprocessors
    return Cost(2.0 * m * n * k, moved, library=True, launches=2 if split else 1)


def total(costs: list[Cost], device: Device, precision: str) -> float:
    """Seconds of kernels that run one after the other."""
    return sum(cost.seconds(device, precision) for cost in costs)


@dataclass(frozen=True)
class Choice:
    """Which implementation computes a site, and why.

    Attributes:
        variant: the name of the implementation taken; "gemms" is what Inductor does too.
        seconds: what it is predicted to take.
        gemms: what the library's products, their intermediate written and read, are predicted to take.
    """

    variant: str
    seconds: float
    gemms: float

    @property
    def gain(self) -> float:
        """Predicted speed over the library's products."""
        return self.gemms / self.seconds


def choose(predicted: dict[str, float]) -> Choice:
    """The fastest implementation, or "gemms" where nothing beats it by MARGIN.

    Args:
        predicted: implementation -> seconds, "gemms" among them.
    """
    fastest = min(predicted, key=lambda name: (predicted[name], name))
    gemms = predicted["gemms"]
    if predicted[fastest] * MARGIN > gemms:
        fastest = "gemms"
    return Choice(fastest, predicted[fastest], gemms)
