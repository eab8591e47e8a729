"""Macro-F1 against scikit-learn, its error against a bootstrap of rows, and the comparison of texts by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lrcompile.tasks.metrics import first_named, macro_f1, macro_f1_error, token_f1, words


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        right = draw.choice("aaabc")
        rows.append((right, right if draw.random() < 0.6 else draw.choice("abcd")))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_scikit_learns(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rows = pairs(40, seed)
    right, chosen = zip(*rows, strict=True)
    assert macro_f1(rows) == pytest.approx(sklearn.f1_score(right, chosen, average="macro"))


def test_its_error_is_the_spread_over_rows_drawn_again() -> None:
    rows = pairs(60, 0)
    draw = random.Random(1)
    spread = np.std([macro_f1(draw.choices(rows, k=len(rows))) for _ in range(2000)])
    # Spreads of 1000 and of 2000 draws, off by 2.2% and 1.6% (1 / sqrt(2 draws)): together 2.7%, and 2.6% seen.
    assert macro_f1_error(rows) == pytest.approx(spread, rel=0.08)
    assert macro_f1_error(rows) == macro_f1_error(rows)
    # F1 is a ratio, so that the root's law holds for many rows alone: 60 are 7.8% off.
    assert macro_f1_error(rows * 16) == pytest.approx(spread / 4, rel=0.15), "as the root of the rows"


def test_an_answer_that_names_nothing_misses_its_class_alone() -> None:
    assert macro_f1([("a", "a"), ("a", ""), ("b", "b")]) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1([("a", "")]) == 0.0


def test_the_label_named_first_counts() -> None:
    labels = ("person", "location", "organization")
    assert first_named(" An Organization, not a person.", labels) == "organization"
    assert first_named(" none of them", labels) == ""


def test_words_are_compared_as_squad_does() -> None:
    assert words("The cash-outflow, a Tax.") == ["cash", "outflow", "tax"]
    assert token_f1("The cash outflow of taxes", "Cash outflow.") == pytest.approx(2 * 2 / 6)
    assert token_f1("a a cash cash", "cash flow") == pytest.approx(2 * 1 / 4)
    assert token_f1("", "cash") == 0.0 == token_f1("other", "cash")
