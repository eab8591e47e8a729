"""The eager form of an adopted module: the same object, its class swapped for one whose weight is computed.

Swapping the class in place keeps everything else as it was: hooks, buffers, mode, references from elsewhere. A weight
`name` becomes the leaves of its form (form.py), such as `name_a` (rank, in_features) and `name_b` (out_features, rank);
reading `module.name` still gives the dense weight, computed. Linear and Conv1D get a forward that never forms it; any other
module keeps its own forward, which reads the computed weight (and the `reassociate` pass mends that when compiled).
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
from lrcompile.weights.form import Form

MAGIC = "lrcompile/1"


class AdoptedModule:
    """Mixed into the class of every adopted module.

    Attributes:
        lr_base: the class it had.
        lr_forms: its computed parameters and the form of each.
        lr_told: name -> what the Plan said of it (JSON-able), kept on the instance.
        lr_dtypes: name -> the dtype that it reads as, likewise: packed leaves have none that a cast could change.
        lr_trainable: the globs of the recipe that said what is trained, likewise; None where none did.
    """

    lr_base: type[nn.Module]
    lr_forms: tuple[tuple[str, Form], ...]
    lr_told: dict[str, dict[str, Any]]
    lr_dtypes: dict[str, torch.dtype]
    lr_trainable: Sequence[str] | None = None

    @property
    def lr_leaves(self) -> dict[str, str]:
        """Leaf -> the parameter that it is part of: {"weight_a": "weight", ...}."""
        return {name + suffix: name for name, form in self.lr_forms for suffix in form.leaves}

    def lr_parts(self, name: str) -> dict[str, nn.Parameter]:
        """The leaves of one parameter, by suffix."""
        return {suffix: getattr(self, name + suffix) for suffix in dict(self.lr_forms)[name].leaves}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.lr_base._apply(self, fn, recurse)  # type: ignore[arg-type]
        self.lr_dtypes = {name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in self.lr_dtypes.items()}
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and this one is made on the fly: make it again.
        state = self.__getstate__() if hasattr(self, "__getstate__") else dict(self.__dict__)
        return _rebuild, (self.lr_base, self.lr_forms), state

    def get_extra_state(self) -> Any:
        told = {"format": MAGIC, "adopted": self.lr_told}
        if self.lr_trainable is not None:
            told["trainable"] = list(self.lr_trainable)
        text = json.dumps(told, sort_keys=True)
        plan = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()
        if self.lr_base.get_extra_state is nn.Module.get_extra_state:
            return plan
        return {"lrcompile": plan, "base": self.lr_base.get_extra_state(self)}  # type: ignore[arg-type]

    def set_extra_state(self, state: Any) -> None:
        told = read_extra_state(state)
        if told is None and isinstance(state.get("lrcompile") if isinstance(state, dict) else state, torch.Tensor):
            raise StateError(
                f"what the state says of the weights in this {type(self).__name__} can't be read: its _extra_state was "
                "scaled or cut; keep the `_extra_state` entries of a state as they are"
            )
        there, here = _scaled(told), _scaled(self.lr_told)
        if told is None or there != here:
            raise StateError(
                f"the state holds {there or 'no pair'} where this module has {here}; "
                "build the dense model again and call lrcompile.adopt_like(model, state) before load_state_dict"
            )
        self.lr_told = told
        if isinstance(state, dict):
            self.lr_base.set_extra_state(self, state["base"])  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in dict(self.lr_forms):
            raise AdoptError(
                f"{name} of {type(self).__name__} is computed from {_spelled(name, dict(self.lr_forms)[name])}: assign "
                "those, or lrcompile.merge(model) first"
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
        for name, form in self.lr_forms:
            first = next(iter(form.leaves))
            if f"{prefix}{name}{first}" not in state_dict:
                told = _why_not_there(f"{prefix}{name}", first, state_dict, unexpected_keys)
                if told and not any(line.startswith("lrcompile: ") for line in error_msgs):
                    error_msgs.append(f"lrcompile: {told}")

    def reset_parameters(self) -> None:
        raise AdoptError(
            f"{type(self).__name__} is adopted: there is no dense weight to draw anew; initialise before adopting, or "
            "lrcompile.merge(model) first"
        )

    def extra_repr(self) -> str:
        forms = ", ".join(f"{name}: {form}" for name, form in self.lr_forms)
        base = self.lr_base.extra_repr(self)  # type: ignore[arg-type]
        return f"{base}, {forms}" if base else forms


def _scaled(told: Mapping[str, Mapping[str, Any]] | None) -> dict[str, str]:
    """The forms in words, with the scale of a pair where there is one."""
    return {
        name: str(Form.of(entry)) + (f" times {entry['scale']:.6g}" if entry["scale"] != 1 else "")
        for name, entry in (told or {}).items()
    }


def _spelled(name: str, form: Form) -> str:
    return " and ".join(name + suffix for suffix in form.leaves)


def _why_not_there(weight: str, first: str, state_dict: Mapping[str, Any], unexpected_keys: Sequence[str]) -> str:
    """Why a state lacks the leaves of a weight, and what to do; "" where nothing is known."""
    if weight in state_dict:
        return f"{weight} is adopted here and dense in the state; load it before lrcompile.adopt, or after lrcompile.merge(model)"
    # torch looks for unexpected keys from the outside in, so those of the wrappers around are listed by now.
    for key in unexpected_keys:
        if key.endswith(first) and _unwrapped(key) == _unwrapped(f"{weight}{first}"):
            return (
                f"the state calls {key!r} what this model calls {f'{weight}{first}'!r}: `_orig_mod.` comes from torch.compile's "
                "wrapper, `module.` from DDP's; load into the same wrapper, or rename the state's keys"
            )
    return ""


def _unwrapped(key: str) -> str:
    return plain_name(key).removeprefix("module.")


def read_extra_state(state: Any) -> dict[str, dict[str, Any]] | None:
    """What a module's extra state tells of its adopted weights; None where it is not ours."""
    content = _content(state)
    return None if content is None else content["adopted"]


def read_trainable(state: Any) -> list[str] | None:
    """The globs of what is trained that a module's extra state tells; None where it tells none."""
    return (_content(state) or {}).get("trainable")


def _content(state: Any) -> dict[str, Any] | None:
    if isinstance(state, dict):
        state = state.get("lrcompile")
    if not isinstance(state, torch.Tensor) or state.dim() != 1 or state.is_meta:
        return None
    state = state.to(torch.uint8)  # averaged or converted along with the weights: any dtype holds ASCII
    try:
        content = json.loads(bytes(state.cpu().tolist()).decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("format") == MAGIC else None


@contextmanager
def plainly(tensor: torch.Tensor) -> Iterator[None]:
    """Compute ordinary tensors in their own precision, whatever modes the caller is in."""
    device = tensor.device.type
    autocast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def dense_weight(module: nn.Module, name: str) -> torch.Tensor:
    """The product that `module.name` reads, in the layout and dtype it was stored in: contiguous, no gradient."""
    assert isinstance(module, AdoptedModule)
    with plainly(next(iter(module.lr_parts(name).values()))):
        product: torch.Tensor = getattr(module, name)
        return product.detach().contiguous()


def _computed(name: str, form: Form) -> property:
    names = {suffix: name + suffix for suffix in form.leaves}

    def read(self: Any) -> torch.Tensor:
        leaves = {suffix: getattr(self, leaf) for suffix, leaf in names.items()}
        # A parameter read under no_grad gives gradients where it is used later; so must what stands for one.
        lent = any(leaf.requires_grad for leaf in leaves.values()) and not torch.is_grad_enabled()
        if lent:
            with torch.enable_grad():
                product = form.read(leaves, dtype=self.lr_dtypes[name])
        else:
            product = form.read(leaves, dtype=self.lr_dtypes[name])
        stored = self.lr_dtypes[name] if form.base or form.factors else leaves["_b"].dtype
        if product.dtype != stored:
            product = product.to(stored)  # under autocast: model code asks for the dtype that is stored
        if not torch.compiler.is_compiling() and not product.is_inference():
            _warn_if_written(product, f"{type(self).__name__}.{name}", _spelled(name.rpartition(".")[2], form))
        return product

    return property(read)


def _warn_if_written(product: torch.Tensor, name: str, leaves: str) -> None:
    """Warn once the product is let go if somebody wrote to it (nn.init, clamp_): nobody reads it any more."""
    alias = product.detach()  # shares the count of writes; `.data` does not
    weakref.finalize(product, _tell_if_written, alias, alias._version, name, leaves).atexit = False


def _tell_if_written(alias: torch.Tensor, version: int, name: str, leaves: str) -> None:
    if alias._version != version:
        warnings.warn(
            f"a write to {name} is lost: it is computed from {leaves} at each read. Write to those, or initialise before "
            "adopting",
            stacklevel=2,
        )


def _linear_forward(form: Form) -> Callable[..., torch.Tensor]:
    names = {suffix: f"weight{suffix}" for suffix in form.leaves}

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return form.linear(input, {suffix: getattr(self, leaf) for suffix, leaf in names.items()}, self.bias)

    return forward


# Modules whose whole forward is one product, by name: nothing optional is imported to know them.
_ONE_PRODUCT = ("torch.nn.modules.linear.Linear.forward", "transformers.pytorch_utils.Conv1D.forward")


def one_product(base: type[nn.Module]) -> bool:
    """Whether a module's whole forward is one product with its weight, and a bias: Linear, Conv1D."""
    return f"{base.forward.__module__}.{base.forward.__qualname__}" in _ONE_PRODUCT


def _list_item(self: Any, index: int | slice) -> Any:
    """A slice of a ParameterList as a plain list: as a ParameterList it would hold the products as new parameters."""
    if isinstance(index, slice):
        return [self[i] for i in range(*index.indices(len(self)))]
    return self.lr_base.__getitem__(self, index)


@functools.cache
def adopted_class(base: type[nn.Module], forms: tuple[tuple[str, Form], ...]) -> type[nn.Module]:
    """The subclass of `base` whose parameters have these forms; the same class for the same arguments."""
    members: dict[str, Any] = {"lr_base": base, "lr_forms": forms, "__module__": base.__module__}
    members |= {name: _computed(name, form) for name, form in forms}
    if issubclass(base, nn.ParameterList):
        members["__getitem__"] = _list_item
    if one_product(base) and [name for name, _ in forms] == ["weight"]:
        members["forward"] = _linear_forward(forms[0][1])
    prefix = "LowRank" if all(form.base is None for _, form in forms) else "Adopted"
    return type(f"{prefix}{base.__name__}", (AdoptedModule, base), members)


def _rebuild(base: type[nn.Module], forms: tuple[tuple[str, Form], ...]) -> nn.Module:
    cls = adopted_class(base, forms)  # type: ignore[arg-type]
    return cls.__new__(cls)


def install(
    module: nn.Module,
    name: str,
    leaves: Mapping[str, nn.Parameter],
    told: dict[str, Any],
    trainable: Sequence[str] | None = None,
) -> None:
    """Put leaves, by suffix, where a parameter of a module was, keeping its place in the order of parameters."""
    if name not in module._parameters:
        raise AdoptError(f"{type(module).__name__} has no parameter {name!r} (any more)")
    if isinstance(module, AdoptedModule):
        base, forms, before = module.lr_base, module.lr_forms, dict(module.lr_told)
    else:
        base, forms, before = type(module), (), {}
    replaced: dict[str, nn.Parameter | None] = {}
    for key, parameter in module._parameters.items():
        replaced |= {name + suffix: leaf for suffix, leaf in leaves.items()} if key == name else {key: parameter}
    form = Form.of(told)
    assert form is not None
    made = adopted_class(base, (*forms, (name, form)))  # type: ignore[arg-type]
    was = module._parameters[name].dtype  # type: ignore[union-attr]
    dtype = was if was.is_floating_point else form.torch_dtype  # a library's packed weight has none of its own
    dtypes = {**module.__dict__.get("lr_dtypes", {}), name: dtype}
    module._parameters.clear()
    module._parameters.update(replaced)
    # Past the module's own __setattr__, which may refuse.
    module.__dict__.update(lr_told={**before, name: told}, lr_dtypes=dtypes)
    if trainable is not None:
        module.__dict__["lr_trainable"] = tuple(trainable)
    object.__setattr__(module, "__class__", made)


def remove(module: nn.Module, dense: dict[str, nn.Parameter]) -> None:
    """The inverse of install, for several parameters of a module at once: `dense` maps names to new parameters."""
    assert isinstance(module, AdoptedModule)
    parts = module.lr_leaves
    replaced: dict[str, nn.Parameter | None] = {}
    for key, parameter in module._parameters.items():
        name = parts.get(key)
        if name in dense:
            replaced[name] = dense[name]  # at the place of the first leaf
        else:
            replaced[key] = parameter
    module._parameters.clear()
    module._parameters.update(replaced)
    left = tuple(kept for kept in module.lr_forms if kept[0] not in dense)
    for kept in ("lr_told", "lr_dtypes"):
        was = module.__dict__.pop(kept)
        if left:
            module.__dict__[kept] = {name: was[name] for name, _ in left}
    if not left:
        module.__dict__.pop("lr_trainable", None)
    object.__setattr__(module, "__class__", adopted_class(module.lr_base, left) if left else module.lr_base)  # type: ignore[arg-type]
