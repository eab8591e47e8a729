"""The leaves of one weight: computed from its numbers by the mathematics of initialise.py, or empty and to be loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lrcompile.kernels.compose import DENSE
from lrcompile.weights.form import Form, run, store
from lrcompile.weights.formats import Quantised, dequantise, quantise
from lrcompile.weights.initialise import Start, initialise
from lrcompile.weights.layers import plainly
from lrcompile.weights.library import held
from lrcompile.weights.plan import Entry

# weight, entry -> leaves by suffix, relative error (None: not known)
Maker = Callable[[nn.Parameter, Entry], tuple[dict[str, torch.Tensor], float | None]]


def computed(
    recipe: Mapping[str, Any], covariances: Mapping[str, torch.Tensor] | None = None, *, measured: bool = True
) -> Maker:
    """Leaves computed from the weight; shapes only on the `meta` device.

    Args:
        recipe: `Recipe.to_dict()`, for how the singular values are found and how often LoftQ alternates.
        covariances: key of a weight -> Σ x xᵀ of its inputs, (in_features, in_features), for data-aware starts.
        measured: tell the errors, which takes time.
    """

    def make(weight: nn.Parameter, entry: Entry) -> tuple[dict[str, torch.Tensor], float | None]:
        if weight.is_meta:
            return empty_leaves(weight, entry)
        form = entry.form
        assert form is not None
        if (quantised := held(weight)) is not None:
            return _beside(quantised, form, entry.key)
        covariance = (covariances or {}).get(entry.key)
        start = initialise(
            weight.detach().T if form.stored_in_out else weight.detach(),
            rank=form.rank,
            init=entry.init,
            base=form.format_of("base"),
            dense_base=form.base == DENSE,
            scale=form.scale,
            pair_dtype=form.torch_pair_dtype,
            covariance=None if covariance is None else covariance.to(weight.device),
            svd=str(recipe.get("svd", "auto")),
            alternations=int(recipe.get("alternations", 5)),
            measured=measured,
            name=entry.key,
        )
        if form.factors:
            return _quantised_pair(weight, form, start, entry.key)
        leaves: dict[str, torch.Tensor] = {}
        if start.base is not None:
            leaves["_base"] = start.base.T.contiguous() if form.stored_in_out else start.base
        if start.packed is not None:
            leaves |= _stored(form, "base", start.packed)
        if start.weight_a is not None and start.weight_b is not None:
            leaves |= {"_a": start.weight_a, "_b": start.weight_b}
        return leaves, start.error

    return make


def _beside(quantised: Quantised, form: Form, name: str) -> tuple[dict[str, torch.Tensor], float | None]:
    """A library's packed weight as it is, and a pair that starts at zero."""
    leaves = _stored(form, "base", quantised.packed)
    if form.rank is not None:
        dense = dequantise(*quantised)
        start = initialise(
            dense,
            rank=form.rank,
            init="zero",
            dense_base=True,
            scale=form.scale,
            pair_dtype=form.torch_pair_dtype,
            name=name,
        )
        assert start.weight_a is not None and start.weight_b is not None
        leaves |= {"_a": start.weight_a, "_b": start.weight_b}
    return leaves, 0.0


def _stored(form: Form, part: str, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    number_format = form.format_of(part)
    assert number_format is not None
    return {s: store(packed[key]) for key, s in zip(number_format.keys, form.suffixes(part), strict=True)}


def _quantised_pair(
    weight: torch.Tensor, form: Form, start: Start, name: str
) -> tuple[dict[str, torch.Tensor], float | None]:
    leaves: dict[str, torch.Tensor] = {}
    sides = []
    for (side, shape), values in zip(form.sides, (start.weight_a, start.weight_b), strict=True):
        number_format = form.format_of(side)
        assert number_format is not None and values is not None
        packed = quantise(number_format, values, name)
        leaves |= _stored(form, side, packed)
        sides.append(dequantise(number_format, packed, shape, form.torch_dtype).double())
    matrix = weight.detach().double()
    matrix = matrix.T if form.stored_in_out else matrix
    size = float(torch.linalg.vector_norm(matrix))
    return leaves, float(torch.linalg.vector_norm(matrix - sides[1] @ sides[0])) / size if size else 0.0


def empty_leaves(weight: torch.Tensor, entry: Entry) -> tuple[dict[str, torch.Tensor], float | None]:
    """Leaves of the right shapes, to be filled by load_state_dict."""
    form = entry.form
    assert form is not None
    # The weight's own dtype where the form says the same: a model may have been cast since it was planned.
    dtypes = {s: weight.dtype if leaf.dtype == form.torch_dtype else leaf.dtype for s, leaf in form.leaves.items()}
    return {
        s: torch.zeros(leaf.shape, dtype=dtypes[s], device=weight.device) for s, leaf in form.leaves.items()
    }, entry.error


def parameters(weight: nn.Parameter, entry: Entry, make: Maker) -> tuple[dict[str, nn.Parameter], float | None]:
    """The leaves that replace a weight, by suffix: ordinary tensors, whatever modes the caller is in.

    A weight's attributes go over to all of them; what it requires of gradients, and a gradient that it has (by the chain
    rule), to the sides of a plain pair. Bases and quantised factors are frozen.
    """
    form = entry.form
    assert form is not None
    with plainly(weight):
        tensors, error = make(weight, entry)
        quantised = held(weight) is not None  # frozen always: a pair beside it is there to be trained
        leaves = {
            suffix: nn.Parameter(tensor, requires_grad=(weight.requires_grad or quantised) and form.leaves[suffix].pair)
            for suffix, tensor in tensors.items()
        }
        for leaf in leaves.values():
            leaf.__dict__.update({} if quantised else weight.__dict__)
        # Not to leaves that are yet to be filled: a gradient at zero is none of the values that will be loaded.
        gradient = None if make is empty_leaves or weight.is_meta or quantised else weight.grad
        if gradient is not None and any(leaf.requires_grad for leaf in leaves.values()):
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gradient = run("t", gradient) if form.stored_in_out else gradient
            a, b = leaves["_a"], leaves["_b"]
            of_pair = gradient.to(a.dtype) * form.scale if form.base else gradient
            a.grad, b.grad = b.detach().T @ of_pair, of_pair @ a.detach().T
    return leaves, error
