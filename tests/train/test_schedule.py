"""Learning-rate schedules."""

import math

import pytest

from lrcompile.errors import TrainError
from lrcompile.train.optimizers import SCHEDULES, schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_shape(name: str, warmup: int) -> None:
    at = schedule(name, steps=100, warmup=warmup, final=0.0, decay=0.25)
    values = [at(step) for step in range(100)]
    assert all(0 < v <= 1 for v in values)  # every step moves, also the first and the last
    assert values[:warmup] == [(i + 1) / (warmup + 1) for i in range(warmup)]
    assert values[warmup] == 1
    assert all(b <= a for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    flat = {"constant": 100, "wsd": 76}.get(name, warmup + 1)  # steps at the full rate are over here
    assert values[flat - 1] == 1 and all(v < 1 for v in values[flat:])
    end = 1.0 if name == "constant" else 0.0
    assert at(100) == pytest.approx(end, abs=1e-12) and at(1000) == at(100)


def test_values() -> None:
    cosine = schedule("cosine", steps=110, warmup=10, final=0.1)
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule("linear", steps=110, warmup=10, final=0.2)(60) == pytest.approx(0.6)
    assert schedule("wsd", steps=100, final=0.1, decay=0.2)(85) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule("wsd", steps=100, final=0.1, decay=0.2)(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("cosin", {"steps": 10}, "cosine, wsd, linear, constant"),
        ("cosine", {"steps": 0}, "at least 1"),
        ("cosine", {"steps": 10, "warmup": 10}, "give 0 to 9"),
        ("constant", {"steps": 10, "warmup": -1}, "give 0 to 9"),
        ("linear", {"steps": 10, "final": 1.5}, "give 0 to 1"),
        ("linear", {"steps": 10, "final": math.nan}, "give 0 to 1"),
        ("wsd", {"steps": 10, "decay": 0.0}, "more than 0"),
        ("wsd", {"steps": 10, "warmup": 6, "decay": 0.5}, "shorten one of them"),
    ],
)
def test_nonsense_names_the_fix(name: str, given: dict, said: str) -> None:
    with pytest.raises(TrainError, match=said):
        schedule(name, **given)


def test_wsd_may_decay_from_the_first_step_on() -> None:
    at = schedule("wsd", steps=4, final=0.0, decay=1.0)
    assert [at(step) for step in range(4)] == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])
