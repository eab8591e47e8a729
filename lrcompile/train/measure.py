"""What a training step of a model costs, without running one: FLOPs, bytes kept for backward, and the products behind them.

The model is called once on fake tensors, which have shapes and no numbers, with the precision that training computes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lrcompile.errors import TrainError
from lrcompile.graph.measure import FORMULAS
from lrcompile.train.language import args_of, inputs, layers, logits_in
from lrcompile.weights.layers import AdoptedModule, one_product


@dataclass(frozen=True)
class Product:
    """One operation that multiplies, in the forward pass.

    Attributes:
        flops: 2 a multiply-add.
        bytes: of what it reads and writes.
        in_block: whether it is computed in a block, where activation checkpointing may compute it again.
    """

    flops: int
    bytes: int
    in_block: bool


@dataclass
class Measured:
    """One micro-batch through the model and its loss.

    Attributes:
        tokens: in it.
        products: of the forward pass, in order.
        saved_outside: bytes kept for backward outside the blocks: embeddings, logits, loss.
        saved: bytes kept inside each block.
        entered: bytes of each block's inputs that nothing before it keeps anyway.
        results: bytes of what each block's products gave.
        dense_flops: forward FLOPs that the dense model would take.
        frozen_flops: those of products with a frozen weight, whose gradient is never computed.
    """

    tokens: int
    products: list[Product] = field(default_factory=list)
    saved_outside: int = 0
    saved: list[int] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    dense_flops: int = 0
    frozen_flops: int = 0

    @property
    def forward_flops(self) -> int:
        return sum(p.flops for p in self.products)

    @property
    def training_flops(self) -> int:
        """Forward and backward: three times the forward, without the gradients of frozen weights.

        The first layer's gradient for its input is counted even where nothing below it is trained.
        """
        return 3 * self.forward_flops - self.frozen_flops

    def kept(self, policy: str) -> int:
        """Bytes kept for backward at the most, under an activation checkpointing policy.

        "block": every block's input, and all of the one block that is computed again. "selective": the results of products
        are kept too.
        """
        if policy == "none":
            return self.saved_outside + sum(self.saved)
        again = max(self.saved, default=0)
        results = sum(self.results) - max(self.results, default=0) if policy == "selective" else 0
        return self.saved_outside + sum(self.entered) + results + again


def flops_per_token(model: nn.Module, length: int) -> tuple[float, float]:
    """Training FLOPs a token (forward and backward), and those that the dense model would take.

    Matrix products and attention, whose part grows with the length; 2 FLOPs a multiply-add, nothing computed again counted.
    Attention is counted whole, as FLOP counters do, though a causal mask needs half of it.

    Args:
        model: a language model, adopted or not; not sharded yet, on any device.
        length: tokens a sequence.

    Raises:
        TrainError: the model can't be run without numbers.
    """
    found = measure(model, rows=1, length=length)
    return found.training_flops / found.tokens, 3 * found.dense_flops / found.tokens


def measure(
    model: nn.Module, *, rows: int, length: int, precision: torch.dtype | None = None, targets: bool = True
) -> Measured:
    """Call a language model on fake tensors, (rows, length) tokens.

    Args:
        model: as for `flops_per_token`.
        rows: sequences.
        length: tokens a sequence.
        precision: floating parameters and buffers are taken in this dtype, as mixed precision does; None: their own.
        targets: whether the cross-entropy, in fp32, is part of it.

    Raises:
        TrainError: the model can't be run without numbers, or gives no logits.
    """
    found = Measured(rows * length)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    # The modes of a caller (a device, autocast) would reach into what is only looked at.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), torch.device("cpu"):
        fakes = _fakes(model, precision)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        watch = _Watch(found, counter, {t.untyped_storage()._cdata for t in fakes.values()})
        with counter, watch, watch.on(model):
            try:
                args = args_of(inputs(model, tokens, torch.zeros_like(tokens)))
                logits = logits_in(model, functional_call(model, fakes, *args, tie_weights=False))
                if targets:
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
                    del loss
            except TrainError:
                raise
            except Exception as error:
                first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
                told = f"{type(error).__name__}: {first[:200]}"
                raise TrainError(f"{type(model).__name__} can't be measured without numbers: {told}") from error
    _weigh(model, watch, found)
    return found


def _fakes(model: nn.Module, precision: torch.dtype | None) -> dict[str, torch.Tensor]:
    """A tensor in the place of every parameter and buffer, one for all that are the same.

    Each place has one name here: functional_call leaves what it is given in a module that is given to it by two.
    """
    made: dict[int, torch.Tensor] = {}
    fakes: dict[str, torch.Tensor] = {}
    for owner, module in model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is None:
                continue
            if id(t) not in made:
                cast = precision is not None and isinstance(t, nn.Parameter) and t.is_floating_point()
                made[id(t)] = torch.empty(t.shape, dtype=precision if cast else t.dtype).requires_grad_(t.requires_grad)
            fakes[f"{owner}.{name}" if owner else name] = made[id(t)]
    return fakes


class _Watch(TorchDispatchMode):
    """Follows a call: what it multiplies, what it keeps for backward and in which block, rows through each module."""

    def __init__(self, found: Measured, counter: FlopCounterMode, apart: set[int]) -> None:
        super().__init__()
        self.found, self.counter, self.apart = found, counter, apart
        self.block: int | None = None
        self.rows: dict[nn.Module, int] = {}
        self.held: dict[int, torch.UntypedStorage] = {}  # so that no address is used twice
        self.kept: set[int] = set()  # for backward
        self.seen: set[int] = set()  # entered a block, or given by a product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        flops = self.counter.get_total_flops() - before
        if flops:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            moved = sum(t.numel() * t.element_size() for t in given + made)
            self.found.products.append(Product(flops, moved, self.block is not None))
            if self.block is not None:
                self.found.results[self.block] += sum(map(self._fresh, made))
        return out

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        hooks: list[Any] = []
        for block in layers(model):
            hooks.append(block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            hooks.append(block.register_forward_hook(self._leave, always_call=True))
        for module in model.modules():
            if _multiplies(module):
                hooks.append(module.register_forward_pre_hook(self._count))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.block = len(self.found.saved)
        self.found.saved.append(0)
        self.found.results.append(0)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.found.entered.append(sum(map(self._fresh, given)))

    def _leave(self, *_: Any) -> None:
        self.block = None

    def _count(self, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self.rows[module] = self.rows.get(module, 0) + math.prod(args[0].shape[:-1])

    def _fresh(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage()
        if storage._cdata in self.seen or storage._cdata in self.apart:
            return 0
        self.seen.add(storage._cdata)
        self.held[storage._cdata] = storage
        return storage.nbytes()

    def _save(self, t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self.apart and storage._cdata not in self.kept:
            self.kept.add(storage._cdata)
            self.held[storage._cdata] = storage
            if self.block is None:
                self.found.saved_outside += storage.nbytes()
            else:
                self.found.saved[self.block] += storage.nbytes()
        return t


def _multiplies(module: nn.Module) -> bool:
    base = module.lr_base if isinstance(module, AdoptedModule) else type(module)
    return one_product(base)


def _weigh(model: nn.Module, watch: _Watch, found: Measured) -> None:
    """FLOPs of the dense twin, and those with frozen weights, from the rows that went through each weight."""
    found.dense_flops = found.forward_flops
    for module in model.modules():
        # What is no single product (packed attention) is taken to see every token once.
        rows = watch.rows.get(module, 0) if _multiplies(module) else found.tokens
        if isinstance(module, AdoptedModule):
            for name, form in module.lr_forms:
                found.dense_flops += 2 * rows * (form.out_features * form.in_features - form.numel)
                parts = module.lr_parts(name).items()
                frozen = sum(form.numbers_in(suffix) for suffix, leaf in parts if not leaf.requires_grad)
                found.frozen_flops += 2 * rows * frozen
        elif _multiplies(module) and not (weight := module.get_parameter("weight")).requires_grad:
            found.frozen_flops += 2 * rows * weight.numel()
