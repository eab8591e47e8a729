"""Several low-rank linears over one input (q, k and v; gate and up): y_i = (x @ weight_a_iᵀ) @ weight_b_iᵀ + bias_i.

Forward is one of: `fused`, one kernel that reads x once and keeps the intermediates of all pairs on the chip; `joined`,
one product of x with all weight_a together, then one for each pair; `gemms`, each pair for itself. Backward starts from
x and is always joined: x @ weight_aᵀ of all pairs is one product, and so are dX, which sums over the pairs without
ever storing a term of it, and the gradient of all weight_a.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.cost import Choice, Cost, Device, choose, library_product, total
from lrcompile.errors import KernelError
from lrcompile.kernels import launch, lowrank_linear
from lrcompile.kernels.launch import Tile, padded, rows, tuned
from lrcompile.kernels.lowrank_linear import Shape, forward_seconds
from lrcompile.kernels.op import register

FAMILY = "lowrank_group"

# Pairs of one kernel: it has as many sets of arguments.
MOST = 3


def reference(
    x: Tensor, weight_a: Sequence[Tensor], weight_b: Sequence[Tensor], bias: Sequence[Tensor]
) -> list[Tensor]:
    """Each pair for itself in plain torch, the oracle of this family.

    Args:
        x: (..., in_features), floating.
        weight_a: a (rank_i, in_features) for each pair, same dtype; ranks may differ.
        weight_b: an (out_features_i, rank_i) for each.
        bias: an (out_features_i,) for each, or an empty list.

    Returns:
        (..., out_features_i) for each, in x's dtype (or autocast's).
    """
    given: list[Tensor | None] = [*bias] or [None] * len(weight_a)
    return [lowrank_linear.reference(x, *pair) for pair in zip(weight_a, weight_b, given, strict=True)]


def tile_of(shapes: tuple[Shape, ...], precision: str, device: Device) -> Tile | None:
    """The shipped tile of "fused"; None where that kernel is not for these shapes."""
    if len(shapes) > MOST:
        return None
    return tuned(FAMILY, "fused", device.arch, precision, rank=sum(padded(shape.rank) for shape in shapes))


def fused_splits(shapes: tuple[Shape, ...], size: int, tile: Tile, precision: str, device: Device) -> int:
    """Programs that share a block of rows: more of them keep more multiprocessors busy, and each computes x·Aᵀ anew."""
    most = min(32, math.ceil(max(shape.out_features for shape in shapes) / tile.block_n))
    options = [1 << i for i in range(most.bit_length())]
    return min(options, key=lambda splits: _fused_cost(shapes, size, tile, splits).seconds(device, precision))


def _fused_cost(shapes: tuple[Shape, ...], size: int, tile: Tile, splits: int) -> Cost:
    m, k, rank = shapes[0].tokens, shapes[0].in_features, sum(shape.rank for shape in shapes)
    up = sum(shape.rank * shape.out_features for shape in shapes)
    blocks = math.ceil(m / tile.block_m)
    flops = splits * k * sum(padded(s.rank) for s in shapes) + sum(padded(s.rank) * s.out_features for s in shapes)
    least = (m * k + m * sum(shape.out_features for shape in shapes) + rank * k + up) * size
    again = blocks * (splits * rank * k + up) * size + (splits - 1) * m * k * size
    steps = math.ceil(k / tile.block_k) + sum(math.ceil(s.out_features / (tile.block_n * splits)) for s in shapes)
    return Cost(2 * blocks * tile.block_m * flops, least, again, programs=blocks * splits, steps=steps)


def predict_forward(shapes: tuple[Shape, ...], dtype: torch.dtype, device: Device) -> Choice:
    """Which of "fused", "joined" and "gemms" computes the results, and the predicted seconds.

    Args:
        shapes: of each pair; tokens and in_features are the same.
        dtype, device: of the operands.

    Returns:
        Its `gemms` is without us: the faster of lowrank_linear and the library's products, for each pair.
    """
    return _predict_forward(shapes, dtype.itemsize, launch.precision(dtype), device)


@functools.cache
def _predict_forward(shapes: tuple[Shape, ...], size: int, precision: str, device: Device) -> Choice:
    predicted = {"gemms": sum(min(forward_seconds(shape, size, precision, device).values()) for shape in shapes)}
    m = shapes[0].tokens
    joined = [_join(shapes, size, device)]
    for shape in shapes:
        moved = (shape.out_features * (shape.rank + m)) * size + _far(shapes, size, device) * shape.rank
        joined.append(library_product(m, shape.out_features, shape.rank, moved, device))
    predicted["joined"] = total(joined, device, precision) + _concatenate(shapes, size).seconds(device, precision)
    tile = tile_of(shapes, precision, device)
    if tile is not None:
        splits = fused_splits(shapes, size, tile, precision, device)
        predicted["fused"] = _fused_cost(shapes, size, tile, splits).seconds(device, precision)
    return choose(predicted)


def _far(shapes: tuple[Shape, ...], size: int, device: Device) -> int:
    """Bytes through memory for each number of a rank-wide intermediate: none where all of it stays in the cache."""
    thin = shapes[0].tokens * sum(shape.rank for shape in shapes) * size
    return shapes[0].tokens * size if thin > device.l2_bytes / 2 else 0


def _join(shapes: tuple[Shape, ...], size: int, device: Device) -> Cost:
    """x times all weight_a together."""
    m, k, rank = shapes[0].tokens, shapes[0].in_features, sum(shape.rank for shape in shapes)
    return library_product(m, rank, k, (m * k + rank * k) * size + _far(shapes, size, device) * rank, device)


def _concatenate(shapes: tuple[Shape, ...], size: int) -> Cost:
    """All weight_a written one below the other."""
    return Cost(0, 2 * sum(shape.rank for shape in shapes) * shapes[0].in_features * size)


# Whether x wants its gradient; then whether each weight_a, weight_b and bias does.
Needed = tuple[bool, tuple[tuple[bool, bool, bool], ...]]


def predict_backward(
    shapes: tuple[Shape, ...], dtype: torch.dtype, device: Device, needed: Needed | None = None
) -> Choice:
    """The predicted seconds of the gradients asked for.

    Args:
        shapes, dtype, device: as predict_forward takes them.
        needed: whether x wants its gradient, and for each pair whether weight_a, weight_b and the bias do.

    Returns:
        Its variant is "joined". Its `gemms` is without us: the faster backward of each pair, and the sum of their dX.
    """
    of_x, of_pairs = needed or (True, ((True, True, True),) * len(shapes))
    return _predict_backward(shapes, dtype, launch.precision(dtype), device, of_x, of_pairs)


@functools.cache
def _predict_backward(
    shapes: tuple[Shape, ...], dtype: torch.dtype, precision: str, device: Device, of_x: bool, of_pairs: Any
) -> Choice:
    m, k, size, rank = shapes[0].tokens, shapes[0].in_features, dtype.itemsize, sum(shape.rank for shape in shapes)
    apart = 0.0
    for shape, of_pair in zip(shapes, of_pairs, strict=True):
        ways = [lowrank_linear.predict_backward(shape, dtype, device, (of_x, *of_pair), kept=k) for k in (False, True)]
        apart += min(ways[0].seconds, ways[1].seconds, ways[1].gemms)
    # The library adds to what it finds in dX: it is read once more for each pair but the first.
    apart += Cost(0, of_x * (len(shapes) - 1) * m * k * size, launches=0).seconds(device, precision)

    of_a, of_b = (any(of_pair[i] for of_pair in of_pairs) for i in (0, 1))
    whole, far = [_join(shapes, size, device)] * of_b, _far(shapes, size, device) * rank
    whole += [_concatenate(shapes, size)] * (of_x or of_b)
    whole += [library_product(m, k, rank, (m * k + rank * k) * size + far, device)] * of_x
    whole += [library_product(rank, k, m, (m * k + rank * k) * size + far, device)] * of_a
    seconds = total(whole, device, precision)
    for shape, of_pair in zip(shapes, of_pairs, strict=True):
        seconds += _own_seconds(shape, dtype, precision, device, of_x or of_a, of_pair)
    return Choice("joined", seconds, apart)


def _own_seconds(
    shape: Shape, dtype: torch.dtype, precision: str, device: Device, of_g: bool, of_pair: tuple[bool, bool, bool]
) -> float:
    """Of a pair's own products: dY·B, and dYᵀ times its intermediate."""
    own = lowrank_linear.predict_backward(shape, dtype, device, (of_g, False, *of_pair[1:]), kept=True)
    m, k, size = shape.tokens, shape.in_features, dtype.itemsize
    # That one counts dX, which is made for all pairs at once here.
    thin = m * shape.rank * size
    far = thin if thin > device.l2_bytes / 2 else 0
    product = library_product(m, k, shape.rank, (m * k + k * shape.rank) * size + far, device)
    return own.seconds - of_g * product.seconds(device, precision)


def check(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor]) -> None:
    """Raise KernelError for operands that don't fit together."""
    if not a or len(a) != len(b) or len(bias) not in (0, len(a)):
        counts = f"{len(a)} weight_a, {len(b)} weight_b, {len(bias)} bias"
        raise KernelError(f"lowrank_group: {counts}; as many of each are wanted, a pair at least, or no bias at all")
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        lowrank_linear.check(x, left, right, bias[i] if bias else None, f"lowrank_group, pair {i}")


def _shapes(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: bool) -> tuple[Shape, ...]:
    return tuple(
        Shape(len(x), left.shape[1], right.shape[0], right.shape[1], bias) for left, right in zip(a, b, strict=True)
    )


def _forward(x: Tensor, a: list[Tensor], b: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    check(x, a, b, bias)
    flat, device = rows(x), launch.describe(x.device)
    shapes = _shapes(flat, a, b, bool(bias))
    variant = launch.pick(FAMILY, flat, device, functools.partial(predict_forward, shapes, x.dtype))
    if variant == "gemms" or device is None:
        results = reference(flat, a, b, bias)
    elif variant == "joined":
        parts = F.linear(flat, torch.cat(a)).split([len(left) for left in a], 1)
        given: list[Tensor | None] = [*bias] or [None] * len(a)
        results = [F.linear(h, right, c) for h, right, c in zip(parts, b, given, strict=True)]
    else:
        from lrcompile.kernels import lowrank_group_triton as kernels

        precision = launch.precision(x.dtype)
        tile = launch.need(tile_of(shapes, precision, device), FAMILY, variant)
        splits = fused_splits(shapes, x.dtype.itemsize, tile, precision, device)
        a, b = [t.contiguous() for t in a], [t.contiguous() for t in b]
        results = kernels.fused(flat, a, b, bias, tile, splits)
    return [launch.shaped(y, (*x.shape[:-1], y.shape[1])) for y in results]


def _forward_fake(x: Tensor, a: list[Tensor], b: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    check(x, a, b, bias)
    return [x.new_empty((*x.shape[:-1], right.shape[0])) for right in b]


def _backward(
    dy: list[Tensor], x: Tensor | None, a: list[Tensor], b: list[Tensor], of_x: bool, needed: list[bool]
) -> list[Tensor]:
    """dx, then the gradients of every weight_a, every weight_b and every bias; an empty tensor where not needed.

    needed: of every weight_a, every weight_b and every bias. x may be None where no weight's gradient is needed.
    """
    count = len(a)
    if not count == len(b) == len(dy) == len(needed) / 3:
        raise KernelError(
            f"lowrank_group_backward: {len(dy)} dY, {count} weight_a, {len(b)} weight_b don't fit together"
        )
    for i, pair in enumerate(zip(dy, a, b, strict=True)):
        lowrank_linear.check_backward(f"lowrank_group_backward, pair {i}", pair[0], x, None, *pair[1:])
    of_a, of_b, of_bias = (needed[i * count : (i + 1) * count] for i in range(3))
    flat = None if x is None else rows(x)
    if flat is None and any(of_a + of_b):
        raise KernelError("lowrank_group_backward: a weight's gradient needs x, and it was not given")
    ranks = [len(left) for left in a]
    joined = torch.cat(a) if of_x or any(of_b) else None
    h = [None] * count if flat is None or not any(of_b) else (flat @ _given(joined).t()).split(ranks, 1)
    g: list[Tensor] = []
    db: list[Tensor] = []
    dbias: list[Tensor] = []
    for i in range(count):
        own = _own_gradients(rows(dy[i]), h[i], a[i], b[i], of_x or any(of_a), of_b[i], of_bias[i])
        for into, found in zip((g, db, dbias), own, strict=True):
            into.append(found)
    all_g = torch.cat(g, 1) if of_x or any(of_a) else None
    none = a[0].new_empty(0)
    dx = (_given(all_g) @ _given(joined)).view(*dy[0].shape[:-1], a[0].shape[1]) if of_x else none
    da = (_given(all_g).t() @ _given(flat)).split(ranks) if any(of_a) else [none] * count
    results = [dx, *(t if want else none for t, want in zip(da, of_a, strict=True)), *db, *dbias]
    # The results of an operator must be tensors of their own.
    return [t.clone() if t is none or 1 <= i <= count else t for i, t in enumerate(results)]


def _given(t: Tensor | None) -> Tensor:
    assert t is not None
    return t


def _own_gradients(
    dy: Tensor, h: Tensor | None, a: Tensor, b: Tensor, of_g: bool, of_b: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dY·B (tokens, rank), the gradients of weight_b and the bias; lowrank_linear's kernel where dY is read once by it."""
    device, shape = launch.describe(dy.device), Shape(len(dy), a.shape[1], b.shape[0], b.shape[1], of_bias)
    predict = functools.partial(
        lowrank_linear.predict_backward, shape, dy.dtype, needed=(of_g, False, of_b, of_bias), kept=True
    )
    variant = launch.pick("lowrank_linear_backward", dy, device, predict)
    if variant == "shared" and device is not None and of_g and of_b and h is not None:
        from lrcompile.kernels import lowrank_linear_triton as kernels

        tile = lowrank_linear.backward_tile(shape, launch.precision(dy.dtype), device)
        tile = launch.need(tile, "lowrank_linear_backward", variant)
        return kernels.shared(dy, None, h.contiguous(), a, b.contiguous(), of_bias, tile)
    none = dy.new_empty(0)
    db = dy.t() @ h if of_b and h is not None else none.clone()
    return dy @ b if of_g else none, db, dy.sum(0) if of_bias else none.clone()


def _backward_fake(
    dy: list[Tensor], x: Tensor | None, a: list[Tensor], b: list[Tensor], of_x: bool, needed: list[bool]
) -> list[Tensor]:
    shapes: list[Any] = [t.shape for t in (*a, *b)] + [t.shape[:1] for t in b]
    found = [a[0].new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True)]
    return [a[0].new_empty((*dy[0].shape[:-1], a[0].shape[1]) if of_x else 0), *found]


def _setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]], output: list[Tensor]) -> None:
    x, a, b, _ = inputs
    ctx.set_materialize_grads(False)  # a result that nothing was derived from gives no gradients, not zeros
    # All operands in a row here: x, every weight_a, every weight_b.
    of_weights = any(ctx.needs_input_grad[1 : 1 + 2 * len(a)])
    ctx.save_for_backward(x if of_weights else None, *a, *b)


def _autograd(ctx: Any, dy: list[Tensor | None]) -> tuple[Any, ...]:
    x, *pairs = ctx.saved_tensors
    count = len(pairs) // 2
    of_x, *of_pairs = ctx.needs_input_grad
    wanted = [each or [False] * count for each in of_pairs]
    used = [i for i in range(count) if dy[i] is not None]
    gradients: list[list[Tensor | None]] = [[None] * count for _ in range(3)]
    dx = None
    if used:
        needed = [each[i] for each in wanted for i in used]
        a, b = ([side[i] for i in used] for side in (pairs[:count], pairs[count:]))
        dx, *found = lowrank_group_backward([dy[i] for i in used], x, a, b, of_x, needed)
        places = [(side, i) for side in range(3) for i in used]
        for (side, i), t, want in zip(places, found, needed, strict=True):
            gradients[side][i] = t if want else None
    da, db, dbias = gradients
    return dx if of_x else None, da, db, dbias if of_pairs[2] else []


lowrank_group_backward = register(
    f"{FAMILY}_backward",
    "(Tensor[] dy, Tensor? x, Tensor[] a, Tensor[] b, bool of_x, bool[] needed) -> Tensor[]",
    {"CPU": _backward, "CUDA": _backward},
    _backward_fake,
    cast=False,
)
# An optional tensor in a list (Tensor?[]) would pass autograd by, so biases are given for all pairs or for none.
lowrank_group = register(
    FAMILY,
    "(Tensor x, Tensor[] a, Tensor[] b, Tensor[] bias) -> Tensor[]",
    {"CPU": _forward, "CUDA": _forward},
    _forward_fake,
    (_autograd, _setup),
)
