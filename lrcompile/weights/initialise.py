"""How a pair starts: W ≈ base + scale · weight_b @ weight_a, with or without calibration data. float64 inside."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrcompile.errors import AdoptError, RecipeError
from lrcompile.recipe import CALIBRATED, INITS, MENDING_INITS, PLAIN_INITS
from lrcompile.weights.covariance import Inputs, energy_of, inputs_of, truncate_outputs
from lrcompile.weights.factor import check_finite, method_for, truncate, unit_of
from lrcompile.weights.formats import Format, Packed, dequantise, quantise

# init -> what it goes with: no base, any, or a quantised one.
GOES_WITH = {i: "no" if i in PLAIN_INITS else "quantised" if i in MENDING_INITS else "any" for i in INITS}


@dataclass
class Start:
    """What a weight starts as.

    Attributes:
        weight_a: (rank, in_features) in the pair's dtype; None without a pair.
        weight_b: (out_features, rank), likewise.
        packed: the tensors of the quantised base by key; None without one.
        base: the dense base, in the weight's dtype; None without one.
        error: ‖W - Ŵ‖ / ‖W‖ in the Frobenius norm, with Ŵ as the module computes it: base decoded, leaves rounded; None
            where it wasn't asked for.
        output_error: ‖(W - Ŵ) C^½‖ / ‖W C^½‖, where a covariance was given.
    """

    weight_a: Float[Tensor, "rank in_features"] | None
    weight_b: Float[Tensor, "out_features rank"] | None
    packed: Packed | None
    base: Float[Tensor, "out_features in_features"] | None
    error: float | None
    output_error: float | None


@torch.no_grad()
def initialise(
    weight: Float[Tensor, "out_features in_features"],
    *,
    rank: int | None,
    init: str,
    base: Format | None = None,
    dense_base: bool = False,
    scale: float = 1.0,
    pair_dtype: torch.dtype | None = None,
    covariance: Tensor | None = None,
    svd: str = "auto",
    alternations: int = 5,
    measured: bool = True,
    name: str = "weight",
) -> Start:
    """Compute what stands in the place of a weight.

    Args:
        weight: (out_features, in_features) in fp16, bf16, fp32 or fp64.
        rank: of the pair, 1 to min(out_features, in_features); None for the base alone.
        init: without a base "svd" (the nearest product) or "data" (the one with the nearest outputs). Beside a base:
            "zero" (LoRA, 2106.09685; QLoRA, 2305.14314): weight_b is zero, weight_a uniform as Kaiming's with a = √5;
            "pissa" (2404.02948): the pair has the principal part, the base what is left. Beside a quantised base:
            "loftq" (2310.08659): quantising and truncating in turn, the best of all turns is kept; "qera" (2410.06040):
            the pair makes up for the error of the quantised weight where the inputs are.
        base: the format of a quantised base.
        dense_base: a base in the weight's own dtype.
        scale: the module computes base + scale · weight_b @ weight_a.
        pair_dtype: of the leaves; by default the weight's.
        covariance: (in_features, in_features), Σ or mean of x xᵀ over inputs x; its scale has no meaning.
        svd: "full", "randomized" or "auto", see `factor.truncate` and `factor.method_for`.
        alternations: turns of "loftq".
        measured: tell the errors, which takes a third of the time of a pair without a base.
        name: of the weight, for messages; also seeds "zero", so that every process draws the same.

    Raises:
        RecipeError: an init that doesn't exist or doesn't go with the base, or lacks a covariance; a rank or scale out
            of range.
        PlanError: the format can't hold the weight's shape or dtype.
        AdoptError: NaN or Inf in the weight or the covariance, a covariance of another shape or that is none, leaves
            that overflow or vanish in their dtype.
    """
    _check(weight, rank, init, base, dense_base, scale, covariance, alternations, name)
    task = _Task(weight, base, dense_base, scale, pair_dtype or weight.dtype, name, measured)
    inputs = None if covariance is None else inputs_of(covariance, weight, name)
    if rank is None:
        return task.start(None, task.hold(task.matrix), inputs)
    if init == "zero":
        return task.start(_zero(task, rank), task.hold(task.matrix), inputs)
    method = method_for(weight.shape, rank, svd)
    if init == "svd":
        return task.start(task.leaves(*truncate(task.matrix, rank, method)), None, inputs)
    if init == "pissa":
        leaves = task.leaves(*truncate(task.matrix, rank, method))
        return task.start(leaves, task.hold(task.matrix - task.product(leaves)), inputs)
    if init == "loftq":
        return task.start(*_loftq(task, rank, method, alternations), inputs)
    assert inputs is not None
    held = task.hold(task.matrix) if init == "qera" else None
    rest = task.matrix if held is None else task.matrix - held.value
    return task.start(task.leaves(*truncate_outputs(rest, inputs, rank, method)), held, inputs)


@torch.no_grad()
def spectrum(
    weight: Float[Tensor, "out_features in_features"], covariance: Tensor | None = None, name: str = "weight"
) -> Float[Tensor, " min"]:
    """The shares σᵢ² / Σσ² of the singular values of W, or of W C^½: what each rank is worth. Float64, largest first.

    Args:
        weight: (out_features, in_features), floating.
        covariance: (in_features, in_features), of its inputs.
        name: of the weight, for messages.

    Returns:
        (min(out_features, in_features),); they sum to 1, or are all zero where the weight (or its output) is.

    Raises:
        AdoptError: NaN or Inf in the weight or the covariance, a covariance of another shape, or that is none.
    """
    check_finite(weight, name)
    work = weight.detach().double()
    work = work / unit_of(work)
    wide = work.shape[0] <= work.shape[1]
    if covariance is None:
        gram = work @ work.T if wide else work.T @ work
    else:
        inputs = inputs_of(covariance, weight, name)
        if not wide:
            work = work @ inputs.root(0.0)
        gram = work @ inputs.c @ work.T if wide else work.T @ work
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return energy / energy.sum() if bool(energy.sum() > 0) else energy


# --- what is computed in, and what comes out --------------------------------------------------------------------------


@dataclass
class _Leaves:
    """A pair as it is stored."""

    a: Tensor
    b: Tensor


@dataclass
class _Held:
    """A base as it is stored, and the matrix it stands for, (out_features, in_features) float64 in the task's unit."""

    packed: Packed | None
    base: Tensor | None
    value: Tensor


class _Task:
    """One weight, and how what stands in its place is stored. Matrices are float64 in a unit, a power of two."""

    def __init__(
        self,
        weight: Tensor,
        base: Format | None,
        dense_base: bool,
        scale: float,
        pair_dtype: torch.dtype,
        name: str,
        measured: bool = True,
    ) -> None:
        self.weight, self.base, self.dense_base = weight.detach(), base, dense_base
        self.scale, self.pair_dtype, self.name, self.measured = scale, pair_dtype, name, measured
        self.unit = unit_of(self.weight)
        self.matrix = self.weight.double() / self.unit

    def leaves(self, b: Tensor, a: Tensor) -> _Leaves:
        """The pair whose scaled product is b @ a, rounded to its dtype."""
        half = (self.unit / self.scale).sqrt()
        made = _Leaves((a * half).to(self.pair_dtype).contiguous(), (b * half).to(self.pair_dtype).contiguous())
        largest = float(torch.maximum(a.abs().max(), b.abs().max()) * half)
        if not (torch.isfinite(made.a).all() and torch.isfinite(made.b).all()):
            self._refuse(f"reach {largest:.3g}, which overflows")
        if bool(((made.a == 0).all(1) & (made.b == 0).all(0)).any()):
            self._refuse(f"are {largest:.3g} at most, and some vanish in")
        return made

    def _refuse(self, what: str) -> None:
        dtype = str(self.pair_dtype).removeprefix("torch.")
        raise AdoptError(
            f"the sides of {self.name}'s pair {what} {dtype}: store pairs in bfloat16 or float32, or leave the weight as "
            f"it is with exclude=[{self.name!r}]"
        )

    def product(self, leaves: _Leaves) -> Tensor:
        """What the pair adds, in the unit."""
        half = (self.scale / self.unit).sqrt()
        return (leaves.b.double() * half) @ (leaves.a.double() * half)

    def hold(self, matrix: Tensor) -> _Held:
        """Store a matrix as the base."""
        dense = (matrix * self.unit).to(self.weight.dtype)
        if not torch.isfinite(dense).all():
            dtype = str(self.weight.dtype).removeprefix("torch.")
            raise AdoptError(
                f"what is left of {self.name} beside its pair overflows {dtype}: convert the model to bfloat16 or float32 "
                f"first, or leave the weight as it is with exclude=[{self.name!r}]"
            )
        if self.base is None:
            return _Held(None, dense, dense.double() / self.unit)
        packed = quantise(self.base, dense, self.name)
        shape = (dense.shape[0], dense.shape[1])
        value = dequantise(self.base, packed, shape, dense.dtype).double() / self.unit
        return _Held(packed, None, value)

    def rest(self, leaves: _Leaves | None, held: _Held | None) -> Tensor:
        """What is left of the weight beside them, in the unit."""
        rest = self.matrix if held is None else self.matrix - held.value
        return rest if leaves is None else rest - self.product(leaves)

    def start(self, leaves: _Leaves | None, held: _Held | None, inputs: Inputs | None) -> Start:
        """Measured where that is wanted, and all together."""
        error = output = None
        if self.measured:
            rest = self.rest(leaves, held)
            error = _ratio(float(rest.square().sum()), float(self.matrix.square().sum()))
            output = None if inputs is None else _ratio(energy_of(rest, inputs.c), energy_of(self.matrix, inputs.c))
        return Start(
            None if leaves is None else leaves.a,
            None if leaves is None else leaves.b,
            None if held is None else held.packed,
            None if held is None else held.base,
            error,
            output,
        )


def _ratio(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total > 0 else 0.0 if lost == 0 else math.inf


# --- the inits --------------------------------------------------------------------------------------------------------


def _zero(task: _Task, rank: int) -> _Leaves:
    rows, columns = task.matrix.shape
    # Drawn on the CPU, where every process and device draws the same; the user's random stream stays as it is.
    generator = torch.Generator().manual_seed(zlib.crc32(task.name.encode()))
    a = torch.empty(rank, columns, dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    b = torch.zeros(rows, rank, dtype=task.pair_dtype, device=task.weight.device)
    return _Leaves(a.to(task.weight.device, task.pair_dtype), b)


def _loftq(task: _Task, rank: int, method: str, alternations: int) -> tuple[_Leaves, _Held]:
    """Quantise what the pair leaves, truncate what the base leaves, and again; the best of all turns.

    The first turn is taken from no pair, as LoftQ has it, and from the principal part, as QPiSSA does, and the others go
    on from the better: of a pretrained weight mostly QPiSSA's.
    """

    def turn(leaves: _Leaves | None) -> tuple[float, _Leaves, _Held]:
        held = task.hold(task.rest(leaves, None))
        made = task.leaves(*truncate(task.rest(None, held), rank, method))
        return float(torch.linalg.vector_norm(task.rest(made, held))), made, held

    principal = task.leaves(*truncate(task.matrix, rank, method))
    last = best = min(turn(None), turn(principal), key=lambda t: t[0])
    for _ in range(alternations - 1):
        last = turn(last[1])
        best = min(best, last, key=lambda t: t[0])
    return best[1], best[2]


# --- what is refused --------------------------------------------------------------------------------------------------


def _check(
    weight: Tensor,
    rank: int | None,
    init: str,
    base: Format | None,
    dense_base: bool,
    scale: float,
    covariance: Tensor | None,
    alternations: int,
    name: str,
) -> None:
    if init not in INITS:
        raise RecipeError(f"init={init!r} is not known; choose from {', '.join(INITS)}")
    if base is not None and dense_base:
        raise RecipeError(f"{name} is to have a base in {base.name} and a dense one; choose one of them")
    kept = "quantised" if base is not None else "dense" if dense_base else "no"
    if rank is None:
        if kept == "no":
            raise RecipeError(f"{name} is to have neither a pair nor a base; give a rank, or a format for the base")
    elif GOES_WITH[init] == "no" and kept != "no":
        raise RecipeError(
            f"init={init!r} of {name} replaces the weight, and a base is kept beside it; {_fitting(kept)}"
        )
    elif GOES_WITH[init] == "any" and kept == "no" or GOES_WITH[init] == "quantised" and kept != "quantised":
        needs = "a base" if GOES_WITH[init] == "any" else "a quantised base"
        raise RecipeError(
            f"init={init!r} of {name} needs {needs} beside the pair, and there is {kept} base; {_fitting(kept)}"
        )
    elif init in CALIBRATED and covariance is None:
        raise RecipeError(f"init={init!r} of {name} needs calibration data, and there is none; {_fitting(kept, False)}")
    elif not 1 <= rank <= min(weight.shape):
        raise RecipeError(
            f"rank {rank} of {name} is out of range: a pair for {tuple(weight.shape)} has 1 to {min(weight.shape)}"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise RecipeError(f"the scale of {name}'s pair is {scale}; it must be above 0 and finite")
    if alternations < 1:
        raise RecipeError(f"alternations={alternations} of {name}: loftq takes at least one turn")
    check_finite(weight, name)


def _fitting(kept: str, data: bool = True) -> str:
    """Which inits to choose from beside what is kept."""
    fit = [
        i
        for i, needs in GOES_WITH.items()
        if (needs == "no") == (kept == "no") and (kept == "quantised" or needs != "quantised")
    ]
    return f"choose {' or '.join(i for i in fit if data or i not in CALIBRATED)}"
