"""Learning-rate schedules: the share of the base rate at a step, from the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from lrcompile.errors import TrainError

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def schedule(
    name: str, *, steps: int, warmup: int = 0, final: float = 0.1, decay: float = 0.2
) -> Callable[[int], float]:
    """What to multiply every base learning rate with at a step, counted from 0. Stateless: a resumed run needs none.

    A linear warmup, (step + 1) / (warmup + 1), is never zero and reaches one at step `warmup`. Then, with p the share done:

    - "cosine": final + (1 - final) (1 + cos πp) / 2 from `warmup` to `steps`;
    - "linear": 1 - (1 - final) p, likewise;
    - "wsd": one, then over the last `decay · steps` steps 1 - (1 - final) √p, the best of the shapes in arXiv 2405.18392;
    - "constant": one.

    `final` would be reached at step `steps`, the first that isn't done, so with final=0 every step still moves; it holds
    for any later one.

    Args:
        name: one of SCHEDULES.
        steps: of the run.
        warmup: steps.
        final: share of the base rate at the end, 0 to 1.
        decay: share of the steps, for "wsd".

    Raises:
        TrainError: an unknown name; steps that don't fit in each other; a share that is none.
    """
    if name not in SCHEDULES:
        raise TrainError(f"schedule={name!r} is unknown; known are {', '.join(SCHEDULES)}")
    if steps < 1:
        raise TrainError(f"a schedule over steps={steps} makes no sense; give at least 1")
    if not 0 <= warmup < steps:
        raise TrainError(
            f"warmup={warmup} doesn't fit in steps={steps}; give 0 to {steps - 1} (a few percent is usual)"
        )
    if not 0 <= final <= 1:
        raise TrainError(f"final={final} is a share of the learning rate; give 0 to 1")
    if name == "wsd" and not 0 < decay <= 1:
        raise TrainError(f"decay={decay} is a share of the steps; give more than 0, up to 1 (0.2 is usual)")
    last = max(1, round(decay * steps)) if name == "wsd" else steps - warmup
    if warmup + last > steps:
        raise TrainError(
            f"warmup={warmup} and a decay of {last} steps ({decay} of {steps}) don't fit in steps={steps}; shorten one of them"
        )

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, max(0.0, (step - (steps - last)) / last))
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "wsd": 1 - math.sqrt(done)}.get(
            name, 1.0
        )
        return final + (1 - final) * left

    return multiplier
