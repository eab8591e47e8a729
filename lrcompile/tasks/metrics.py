"""Figures over (right class, chosen class) pairs, and between texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Pairs = Sequence[tuple[str, str]]
NONE = ""  # the class of an answer that names none
_DRAWS = 1000


def macro_f1(pairs: Pairs) -> float:
    """The mean F1 of the classes, in [0, 1]; over those that are right or chosen somewhere, as scikit-learn means it.

    Nothing is no class: an answer that names none only misses the class that was right.
    """
    return float(_macro_f1(_confusion(pairs)))


def macro_f1_error(pairs: Pairs) -> float:
    """The standard error of macro_f1 by the bootstrap: 1000 samples of the rows, drawn with replacement, always the same.

    Macro-F1 depends on how often each pair occurs alone, so that those numbers are drawn.
    """
    counts, total = _confusion(pairs), len(pairs)
    draws = np.random.default_rng(0).multinomial(total, counts.ravel() / total, size=_DRAWS)
    return float(_macro_f1(draws.reshape(_DRAWS, *counts.shape)).std(ddof=1))


def _confusion(pairs: Pairs) -> np.ndarray:
    """(1 + classes, 1 + classes) int64, right by chosen; the first is NONE."""
    names = [NONE, *sorted({name for pair in pairs for name in pair} - {NONE})]
    index = {name: n for n, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for right, chosen in pairs:
        counts[index[right], index[chosen]] += 1
    return counts


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    """Of confusion counts (..., 1 + classes, 1 + classes)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)[..., 1:]
    seen = (counts.sum(-1) + counts.sum(-2))[..., 1:]
    return (2 * hits / np.maximum(seen, 1)).sum(-1) / np.maximum((seen > 0).sum(-1), 1)


def first_named(text: str, labels: Sequence[str]) -> str:
    """The label that a generated answer names first, in any case; NONE where it names none."""
    places = [(place, label) for label in labels if (place := text.lower().find(label.lower())) >= 0]
    return min(places)[1] if places else NONE


def words(text: str) -> list[str]:
    """Without case, punctuation and articles, as SQuAD compares answers (1606.05250)."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def token_f1(said: str, wanted: str) -> float:
    """F1 of the words that two texts share, in [0, 1] (1606.05250)."""
    given, right = words(said), words(wanted)
    shared = sum((Counter(given) & Counter(right)).values())
    return 2 * shared / (len(given) + len(right)) if shared else 0.0
