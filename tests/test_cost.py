"""The roofline and its table of devices."""

from __future__ import annotations

import pytest

from lrcompile import cost
from lrcompile.cost import DEVICES, LAUNCH_SECONDS, Choice, Cost, choose, find_device, library_product, total


def device(name: str, arch: str) -> cost.Device:
    found = find_device(name, arch)
    assert found is not None
    return found


H100 = device("NVIDIA H100 80GB HBM3", "sm_90")


@pytest.mark.parametrize(
    ("name", "arch", "entry"),
    [
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "A100-SXM4-40GB"),
        ("NVIDIA A10G", "sm_86", "A10"),
        ("NVIDIA GeForce RTX 3090", "sm_86", "RTX 3090"),
        ("NVIDIA L40S", "sm_89", "L40S"),
        ("NVIDIA L4", "sm_89", "L4"),
        ("NVIDIA H100 PCIe", "sm_90", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA B200", "sm_100", "B200"),
        ("NVIDIA GeForce RTX 5090", "sm_120", "RTX 5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", "RTX PRO 6000"),
        ("AMD Instinct MI300X", "gfx942", "MI300X"),
        ("a card of tomorrow", "sm_90", "H100"),
        ("NVIDIA B300", "sm_103", "B200"),
        ("NVIDIA RTX A2000", "sm_86", "RTX 3090"),
        ("AMD Instinct MI325X", "gfx942", "MI300X"),
    ],
)
def test_devices_are_found_by_name_or_target(name: str, arch: str, entry: str):
    assert device(name, arch).name == entry


@pytest.mark.parametrize(("name", "arch"), [("NVIDIA V100", "sm_70"), ("AMD Radeon", "gfx900"), ("Intel", "xe")])
def test_older_and_other_devices_have_no_entry(name: str, arch: str):
    assert find_device(name, arch) is None


def test_every_device_is_whole():
    for entry in DEVICES:
        assert entry.half >= entry.tf32 >= entry.single > 1e12, entry
        assert 1e11 < entry.bandwidth < entry.l2_bandwidth, entry
        assert entry.shared_bytes >= 64 * 1024 and entry.multiprocessors > 0
        assert find_device(entry.name, entry.arch) == entry, "a shorter name stands above it"
    assert {entry.arch for entry in DEVICES} == set(cost.SHARED_BYTES)


def test_the_slowest_resource_decides():
    # 1 TB/s-second of traffic, or as much time of computing
    memory = Cost(0, 3.35e9).seconds(H100, "half")
    assert memory == pytest.approx(1e-3 / cost.MEMORY_REACH + LAUNCH_SECONDS)
    computing = Cost(989e9, 0, library=True).seconds(H100, "half")
    assert computing == pytest.approx(1e-3 / cost.LIBRARY_REACH + LAUNCH_SECONDS)
    assert Cost(989e9, 3.35e9, library=True).seconds(H100, "half") == max(memory, computing)
    assert Cost(989e9, 0).seconds(H100, "half") > computing, "ours compute slower than the library's"
    assert Cost(989e9, 0).seconds(H100, "single") > 10 * computing
    assert Cost(0, 0, steps=1000).seconds(H100, "half") == pytest.approx(1000 * cost.STEP_SECONDS + LAUNCH_SECONDS)
    assert Cost(0, 0, launches=3).seconds(H100, "half") == 3 * LAUNCH_SECONDS


def test_idle_multiprocessors_cost_time():
    whole, half, few = (Cost(1e12, 0, programs=n).seconds(H100, "half") for n in (264, 66, 1))
    assert half == pytest.approx(2 * whole, rel=0.01) and few == pytest.approx(132 * whole, rel=0.01)
    assert Cost(0, 1e9, programs=66).seconds(H100, "half") == Cost(0, 1e9).seconds(H100, "half")
    assert Cost(0, 1e9, programs=33).seconds(H100, "half") > Cost(0, 1e9).seconds(H100, "half")
    assert Cost(0, 0, cached_bytes=1e9).seconds(H100, "half") < Cost(0, 1e9).seconds(H100, "half")


def test_thin_outputs_of_the_library_take_a_second_launch():
    assert library_product(16, 128, 4096, 1e6, H100).launches == 2
    assert library_product(1, 128, 4096, 1e6, H100).launches == 1
    assert library_product(4096, 4096, 128, 1e6, H100) == Cost(2 * 4096 * 4096 * 128, 1e6, library=True)


def test_total_is_one_after_the_other():
    costs = [Cost(1e9, 1e6), Cost(0, 1e8)]
    assert total(costs, H100, "half") == sum(one.seconds(H100, "half") for one in costs)


def test_choose_wants_a_margin():
    assert choose({"gemms": 1.0, "fused": 0.5}) == Choice("fused", 0.5, 1.0)
    assert choose({"gemms": 1.0, "fused": 0.99}) == Choice("gemms", 1.0, 1.0)
    assert choose({"gemms": 1.0, "narrow": 0.5, "fused": 0.5}).variant == "fused", "ties fall the same way everywhere"
    assert choose({"gemms": 1.0, "fused": 0.5}).gain == 2.0
