"""The eager form of an adopted module: the same object, its class swapped for one whose weight is a pair.

Swapping the class in place keeps everything else as it was: hooks, buffers, mode, references from elsewhere. A weight
`name` becomes the leaves `name_a` (rank, in_features) and `name_b` (out_features, rank); reading `module.name` still
gives the dense weight, computed. Linear and Conv1D get a forward of two thin products; any other module keeps its own
forward, which reads the computed weight (and the `reassociate` pass turns that into thin products when compiled).
"""

from __future__ import annotations

import functools
import json
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lrcompile.errors import AdoptError, StateError
from lrcompile.graph.names import plain_name
from lrcompile.kernels.lowrank_linear import reference

MAGIC = "lrcompile/1"


class PairedModule:
    """Mixed into the class of every adopted module.

    Attributes:
        lr_base: the class it had.
        lr_names: its factored parameters, as (name, stored_in_out).
        lr_pairs: name -> what the Plan said of it (JSON-able), kept on the instance.
    """

    lr_base: type[nn.Module]
    lr_names: tuple[tuple[str, bool], ...]
    lr_pairs: dict[str, dict[str, Any]]

    @property
    def lr_leaves(self) -> list[str]:
        """Names of the parameters that are sides of pairs."""
        return [name + side for name, _ in self.lr_names for side in ("_a", "_b")]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and this one is made on the fly: make it again.
        state = self.__getstate__() if hasattr(self, "__getstate__") else dict(self.__dict__)
        return _rebuild, (self.lr_base, self.lr_names), state

    def get_extra_state(self) -> Any:
        text = json.dumps({"format": MAGIC, "pairs": self.lr_pairs}, sort_keys=True)
        plan = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()
        if self.lr_base.get_extra_state is nn.Module.get_extra_state:
            return plan
        return {"lrcompile": plan, "base": self.lr_base.get_extra_state(self)}  # type: ignore[arg-type]

    def set_extra_state(self, state: Any) -> None:
        pairs = read_extra_state(state)
        if pairs is None and isinstance(state.get("lrcompile") if isinstance(state, dict) else state, torch.Tensor):
            raise StateError(
                f"what the state says of the pair in this {type(self).__name__} can't be read: its _extra_state was "
                "scaled or cut; keep the `_extra_state` entries of a state as they are"
            )
        ranks = {name: pair["rank"] for name, pair in (pairs or {}).items()}
        if pairs is None or ranks != {name: pair["rank"] for name, pair in self.lr_pairs.items()}:
            own = {name: pair["rank"] for name, pair in self.lr_pairs.items()}
            raise StateError(
                f"the state holds {ranks or 'no pair'} where this module has {own}; "
                "build the dense model again and call lrcompile.adopt_like(model, state) before load_state_dict"
            )
        self.lr_pairs = pairs
        if isinstance(state, dict):
            self.lr_base.set_extra_state(self, state["base"])  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in dict(self.lr_names):
            raise AdoptError(
                f"{name} of {type(self).__name__} is computed from {name}_a and {name}_b: assign those, or "
                "lrcompile.merge(model) first"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.lr_base._load_from_state_dict(self, *args)  # type: ignore[arg-type]
        # Of torch's list of keys nobody learns what to do: that is told below it, once for the whole model.
        for name, _ in self.lr_names:
            if f"{prefix}{name}_a" not in state_dict:
                told = _why_not_there(f"{prefix}{name}", state_dict, unexpected_keys)
                if told and not any(line.startswith("lrcompile: ") for line in error_msgs):
                    error_msgs.append(f"lrcompile: {told}")

    def reset_parameters(self) -> None:
        raise AdoptError(
            f"{type(self).__name__} holds a pair: there is no dense weight to draw anew; initialise before adopting, or "
            "lrcompile.merge(model) first"
        )

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: rank {pair['rank']}" for name, pair in self.lr_pairs.items())
        base = self.lr_base.extra_repr(self)  # type: ignore[arg-type]
        return f"{base}, {ranks}" if base else ranks


def _why_not_there(weight: str, state_dict: Mapping[str, Any], unexpected_keys: Sequence[str]) -> str:
    """Why a state lacks the pair of a weight, and what to do; "" where nothing is known."""
    if weight in state_dict:
        return f"{weight} is a pair here and dense in the state; load it before lrcompile.adopt, or after lrcompile.merge(model)"
    # torch looks for unexpected keys from the outside in, so those of the wrappers around are listed by now.
    for key in unexpected_keys:
        if key.endswith("_a") and _unwrapped(key) == _unwrapped(f"{weight}_a"):
            return (
                f"the state calls {key!r} what this model calls {f'{weight}_a'!r}: `_orig_mod.` comes from torch.compile's "
                "wrapper, `module.` from DDP's; load into the same wrapper, or rename the state's keys"
            )
    return ""


def _unwrapped(key: str) -> str:
    return plain_name(key).removeprefix("module.")


def read_extra_state(state: Any) -> dict[str, dict[str, Any]] | None:
    """The pairs told by a module's extra state; None where it is not ours."""
    if isinstance(state, dict):
        state = state.get("lrcompile")
    if not isinstance(state, torch.Tensor) or state.dim() != 1 or state.is_meta:
        return None
    state = state.to(torch.uint8)  # averaged or converted along with the weights: any dtype holds ASCII
    try:
        content = json.loads(bytes(state.cpu().tolist()).decode())
    except ValueError:
        return None
    return content["pairs"] if isinstance(content, dict) and content.get("format") == MAGIC else None


@contextmanager
def plainly(tensor: torch.Tensor) -> Iterator[None]:
    """Compute ordinary tensors in their own precision, whatever modes the caller is in."""
    device = tensor.device.type
    autocast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def dense_weight(module: nn.Module, name: str) -> torch.Tensor:
    """The product that `module.name` reads, in the layout and dtype it was stored in: contiguous, no gradient."""
    with plainly(getattr(module, f"{name}_a")):
        product: torch.Tensor = getattr(module, name)
        return product.detach().contiguous()


def _product(name: str, stored_in_out: bool) -> property:
    a, b = f"{name}_a", f"{name}_b"

    def read(self: Any) -> torch.Tensor:
        left, right = getattr(self, b), getattr(self, a)
        # A parameter read under no_grad gives gradients where it is used later; so must what stands for one.
        lent = (left.requires_grad or right.requires_grad) and not torch.is_grad_enabled()
        if lent:
            with torch.enable_grad():
                product = torch.matmul(left, right)
        else:
            product = torch.matmul(left, right)
        if product.dtype != left.dtype:  # under autocast: model code asks for the dtype that is stored
            product = product.to(left.dtype)
        if not torch.compiler.is_compiling() and not product.is_inference():
            _warn_if_written(product, f"{type(self).__name__}.{name}")
        return product.t() if stored_in_out else product

    return property(read)


def _warn_if_written(product: torch.Tensor, name: str) -> None:
    """Warn once the product is let go if somebody wrote to it (nn.init, clamp_): nobody reads it any more."""
    alias = product.detach()  # shares the count of writes; `.data` does not
    weakref.finalize(product, _tell_if_written, alias, alias._version, name).atexit = False


def _tell_if_written(alias: torch.Tensor, version: int, name: str) -> None:
    if alias._version != version:
        warnings.warn(
            f"a write to {name} is lost: it is computed from {name.rpartition('.')[2]}_a and _b at each read. Write to "
            "those, or initialise before adopting",
            stacklevel=2,
        )


def _linear_forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    return reference(input, self.weight_a, self.weight_b, self.bias)


# Modules whose whole forward is one product, by name: nothing optional is imported to know them.
_THIN_FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "torch.nn.modules.linear.Linear.forward": _linear_forward,
    "transformers.pytorch_utils.Conv1D.forward": _linear_forward,
}


def _list_item(self: Any, index: int | slice) -> Any:
    """A slice of a ParameterList as a plain list: as a ParameterList it would hold the products as new parameters."""
    if isinstance(index, slice):
        return [self[i] for i in range(*index.indices(len(self)))]
    return self.lr_base.__getitem__(self, index)


@functools.cache
def paired_class(base: type[nn.Module], names: tuple[tuple[str, bool], ...]) -> type[nn.Module]:
    """The subclass of `base` whose parameters `names` are pairs; the same class for the same arguments."""
    members: dict[str, Any] = {"lr_base": base, "lr_names": names, "__module__": base.__module__}
    members |= {name: _product(name, stored) for name, stored in names}
    if issubclass(base, nn.ParameterList):
        members["__getitem__"] = _list_item
    thin = _THIN_FORWARDS.get(f"{base.forward.__module__}.{base.forward.__qualname__}")
    if thin is not None and [name for name, _ in names] == ["weight"]:
        members["forward"] = thin
    return type(f"LowRank{base.__name__}", (PairedModule, base), members)


def _rebuild(base: type[nn.Module], names: tuple[tuple[str, bool], ...]) -> nn.Module:
    cls = paired_class(base, names)  # type: ignore[arg-type]
    return cls.__new__(cls)


def install_pair(
    module: nn.Module, name: str, a: nn.Parameter, b: nn.Parameter, stored_in_out: bool, told: dict[str, Any]
) -> None:
    """Turn one parameter of a module into a pair, keeping its place in the order of parameters."""
    if name not in module._parameters:
        raise AdoptError(f"{type(module).__name__} has no parameter {name!r} (any more)")
    if isinstance(module, PairedModule):
        base, names, pairs = module.lr_base, module.lr_names, dict(module.lr_pairs)
    else:
        base, names, pairs = type(module), (), {}
    replaced: dict[str, nn.Parameter | None] = {}
    for key, parameter in module._parameters.items():
        replaced |= {f"{name}_a": a, f"{name}_b": b} if key == name else {key: parameter}
    made = paired_class(base, (*names, (name, stored_in_out)))  # type: ignore[arg-type]
    module._parameters.clear()
    module._parameters.update(replaced)
    # Past the module's own __setattr__, which may refuse.
    module.__dict__["lr_pairs"] = {**pairs, name: told}
    object.__setattr__(module, "__class__", made)


def remove_pairs(module: nn.Module, dense: dict[str, nn.Parameter]) -> None:
    """The inverse of install_pair, for several pairs of a module at once: `dense` maps names to new parameters."""
    assert isinstance(module, PairedModule)
    replaced: dict[str, nn.Parameter | None] = {}
    for key, parameter in module._parameters.items():
        stem, side = key[:-2], key[-2:]
        if stem in dense and side == "_a":
            replaced[stem] = dense[stem]
        elif not (stem in dense and side == "_b"):
            replaced[key] = parameter
    module._parameters.clear()
    module._parameters.update(replaced)
    left = tuple(pair for pair in module.lr_names if pair[0] not in dense)
    told = module.__dict__.pop("lr_pairs")
    if left:
        module.__dict__["lr_pairs"] = {name: told[name] for name, _ in left}
    object.__setattr__(module, "__class__", paired_class(module.lr_base, left) if left else module.lr_base)  # type: ignore[arg-type]
