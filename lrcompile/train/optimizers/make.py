"""The optimizers of a model, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from lrcompile.errors import TrainError
from lrcompile.graph.names import among, dense_names, matches, parameter_names
from lrcompile.train.optimizers.adamw8bit import adamw8bit
from lrcompile.train.optimizers.groups import Pair, flat, roles
from lrcompile.train.optimizers.muon import Muon
from lrcompile.train.optimizers.product_decay import decay_products
from lrcompile.train.optimizers.spectron import Spectron

# Spectron's rate is a spectral norm: what one step may change a product's by.
SPECTRON_LR = 0.02

OPTIMIZERS = ("adamw", "adamw8bit", "muon", "spectron")

Group = dict[str, Any]


def optimizers(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    factor_lr: float | Callable[[Pair], float] | None = None,
    matrix_lr: float | None = None,
    rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    product_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = False,
) -> list[torch.optim.Optimizer]:
    """Optimizers that between them hold each trainable parameter of a model once, with the groups that pairs need.

    ===========  =========================================  ===================================================
    name         pairs                                      everything else
    ===========  =========================================  ===================================================
    adamw        AdamW (fused where the device has it)      the same
    adamw8bit    AdamW with 8-bit state (torchao)           the same
    muon         Muon, each side a matrix                   Muon for the matrices of the blocks, AdamW for the rest
    spectron     Spectron                                   AdamW
    ===========  =========================================  ===================================================

    Weight decay falls on dense matrices (also the output head, convolutions, experts); never on norms, biases and embeddings,
    nor on the sides of a pair, where it would penalise the nuclear norm: `product_decay` decays their product instead.
    Each group carries `base_lr`: set group["lr"] = group["base_lr"] * schedule(step) before each step.

    Build them after `fully_shard`, and after what is frozen has been.

    Args:
        lr: of all but the pairs; AdamW's scale.
        factor_lr: of the pairs: a number; or a function of a Pair, for a rate that depends on its rank. None: lr, and for
            Spectron SPECTRON_LR: its rate is the spectral norm that one step may change a product by, hundreds of times AdamW's.
        matrix_lr: of the dense matrices that Muon moves; None: lr, which Muon scales to the size of AdamW's steps.
        rates: globs of parameters (`lrcompile.graph.names.matches`: both sides of a pair go by their weight's name), and what
            their learning rate is multiplied by: {"*attn*": 0.3}. A parameter goes by the first that matches it.
        betas, eps: AdamW's.
        weight_decay: of dense matrices, decoupled.
        product_decay: of the pairs' products, decoupled.
        momentum: Muon's and Spectron's.
        nesterov: Spectron's; Muon's momentum always looks ahead.

    Raises:
        TrainError: an unknown name; nothing to train; "spectron" for a model without trainable pairs; a glob of `rates` that
            matches nothing that is trained.
        MissingLibraryError: "adamw8bit" without torchao.
    """
    if name not in OPTIMIZERS:
        raise TrainError(f"optimizer {name!r} is unknown; known are {', '.join(OPTIMIZERS)}")
    found = roles(model)
    if factor_lr is None:
        factor_lr = SPECTRON_LR if name == "spectron" else lr
    times = _times(model, rates or {})
    of_pair = factor_lr if callable(factor_lr) else lambda _: factor_lr
    pairs = _pair_groups(found.pairs, lambda pair: of_pair(pair) * times.get(id(pair.a), 1.0), product_decay)
    sides = _groups(found.sides, lr if name == "spectron" or callable(factor_lr) else factor_lr, 0.0, times)
    hidden = _groups(found.hidden, lr if matrix_lr is None or name != "muon" else matrix_lr, weight_decay, times)
    rest = _groups(found.outer, lr, weight_decay, times) + _groups(found.plain, lr, 0.0, times)
    if not pairs + sides + hidden + rest:
        raise TrainError(
            "no parameter of the model is trainable; adopt a recipe that trains pairs, or set requires_grad"
        )
    if name == "spectron" and not pairs:
        raise TrainError(
            "spectron trains pairs, and this model has none that are trainable; use adamw or muon, or adopt first"
        )

    made: list[torch.optim.Optimizer] = []
    if name == "spectron":
        made.append(Spectron(pairs, momentum=momentum, nesterov=nesterov))
        others = sides + hidden + rest
    elif name == "muon":
        matrices = pairs + sides + hidden
        made += [Muon(matrices, weight_decay=0.0, momentum=momentum)] if matrices else []
        others = rest
    else:
        others = pairs + sides + hidden + rest
    if others:
        made.append(_adamw(name, others, betas, eps))
    if product_decay and pairs:
        made[0].register_step_pre_hook(decay_products)  # the first one holds the pairs
    return made


def _times(model: nn.Module, rates: Mapping[str, float]) -> dict[int, float]:
    """What the learning rates of parameters are multiplied by, by id; those that no glob matches aside."""
    found: dict[int, float] = {}
    used: set[str] = set()
    names, trained = dense_names(model), [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        glob = next((glob for glob in rates if any(matches(name, glob) for name in names[id(p)])), None)
        if glob is not None:
            used.add(glob)
            found[id(p)] = rates[glob]
    if left := next((glob for glob in rates if glob not in used), None):
        known = [name for p in trained for name in names[id(p)]]
        if any(matches(name, left) for name in known):
            raise TrainError(f"rates[{left!r}]: every trained parameter that matches it goes by a glob before it")
        sides = [name for p in trained for name in parameter_names(model)[id(p)] if name not in names[id(p)]]
        if any(matches(name, left) for name in sides):
            weight = left.removesuffix("_a").removesuffix("_b")
            raise TrainError(
                f"rates[{left!r}] would split pairs, whose sides have one rate: name their weight, as {weight!r}"
            )
        raise TrainError(f"rates[{left!r}]: no trained parameter matches it{among(known, left)}")
    return found


def _groups(parameters: list[nn.Parameter], lr: float, weight_decay: float, times: dict[int, float]) -> list[Group]:
    """A group for each learning rate."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        by_rate.setdefault(lr * times.get(id(p), 1.0), []).append(p)
    return [
        {"params": theirs, "lr": rate, "base_lr": rate, "weight_decay": weight_decay}
        for rate, theirs in by_rate.items()
    ]


def _pair_groups(pairs: list[Pair], rate: Callable[[Pair], float], product_decay: float) -> list[Group]:
    """A group for each learning rate."""
    by_rate: dict[float, list[Pair]] = {}
    for pair in pairs:
        by_rate.setdefault(rate(pair), []).append(pair)
    more = {"weight_decay": 0.0, "product_decay": product_decay}
    return [
        {"params": flat(theirs), "scales": [p.scale for p in theirs], "lr": lr, "base_lr": lr, **more}
        for lr, theirs in by_rate.items()
    ]


def _adamw(name: str, groups: list[Group], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    if name == "adamw8bit":
        return adamw8bit(groups, betas=betas, eps=eps)
    devices = {p.device.type for p in chain.from_iterable(group["params"] for group in groups)}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"} or None)
