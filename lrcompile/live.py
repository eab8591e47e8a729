"""Who holds a parameter: the modules, optimizers and wrappers alive in this process.

A compiled function is given parameters, not the modules they live in, and it serves other models of the same class than
the one it was compiled for. So the owners are looked for, by identity, among all live objects, in one sweep (about
0.2 s), whenever a model is about to be adopted.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


@dataclass
class Live:
    """One sweep.

    Attributes:
        owners: id(parameter) -> the modules that have it, with its name there.
        parents: id(module) -> the modules that it is a child of; torch.compile's shells are seen through.
        optimizers: all of them.
    """

    owners: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)
    parents: dict[int, list[nn.Module]] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    @classmethod
    def sweep(cls, *known: nn.Module) -> Live:
        """Look at every live object; `known` models are found even where gc.freeze() hides them."""
        found = cls()
        shells: list[nn.Module] = []
        hidden = [m for model in known for m in model.modules()] if gc.get_freeze_count() else []
        interesting: dict[type, type | None] = {}
        for item in (*gc.get_objects(), *hidden):
            kind = type(item)
            base = interesting.get(kind, kind)
            if base is kind:  # first seen
                base = next((c for c in (nn.Module, torch.optim.Optimizer) if issubclass(kind, c)), None)
                interesting[kind] = base
            if base is None:
                continue
            held = item.__dict__
            if base is torch.optim.Optimizer:
                if "param_groups" in held:
                    found.optimizers.append(item)
                continue
            for name, p in held.get("_parameters", {}).items():
                if p is not None:
                    found.owners.setdefault(id(p), []).append((item, name))
            if kind.__name__ == "OptimizedModule":  # torch.compile's shell, no part of the model
                shells.append(item)
                continue
            for child in held.get("_modules", {}).values():
                if child is not None:
                    found.parents.setdefault(id(child), []).append(item)
        for shell in shells:
            inner = shell._modules["_orig_mod"]
            found.parents.setdefault(id(inner), []).extend(found.parents.get(id(shell), []))
        return found

    def wrapper_of(self, module: nn.Module) -> str | None:
        """The kind of data-parallel wrapper that a module sits in, if any."""
        for above in self.ancestors(module):
            names = {c.__name__ for c in type(above).__mro__}
            if names & set(_WRAPPERS):
                return next(n for n in _WRAPPERS if n in names)
            if "FSDPModule" in names:
                return "fully_shard"
        return None

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """The module and everything it is part of."""
        seen, queue = {id(module): module}, [module]
        while queue:
            for above in self.parents.get(id(queue.pop()), []):
                if id(above) not in seen:
                    seen[id(above)] = above
                    queue.append(above)
        return list(seen.values())

    def collections_of(self, parameters: Sequence[nn.Parameter]) -> list[Collection[nn.Parameter]]:
        """Lists, sets and dicts of parameters alone, held by neither module nor optimizer, with one of these in them.

        Found by the garbage collector: what only C code or a generator holds is not.
        """
        known = {id(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups}
        known |= {id(held) for owners in self.owners.values() for m, _ in owners for held in (m._parameters,)}
        found: list[Collection[nn.Parameter]] = []
        for held in gc.get_referrers(*parameters) if parameters else ():
            if held is parameters or id(held) in known or not isinstance(held, (list, set, dict)):
                continue
            items = list(held.values() if isinstance(held, dict) else held)
            if len(items) > 1 and all(isinstance(p, nn.Parameter) for p in items):
                found.append(items)
        return found

    def top(self, module: nn.Module) -> nn.Module:
        """The outermost model that a module is part of."""
        for above in reversed(self.ancestors(module)):
            if not self.parents.get(id(above)):
                return above
        return module
