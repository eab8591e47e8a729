"""lrcompile: replace a transformer's linear layers by low-rank pairs, in one word of a training script.

The public names are loaded on first use, so that `import lrcompile` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrcompile.errors import (
        AdoptError,
        CaptureError,
        EvalError,
        KernelError,
        LrcompileError,
        PassError,
        PlanError,
        RecipeError,
        StateError,
    )
    from lrcompile.graph.capture import capture
    from lrcompile.graph.inspect import Report, inspect
    from lrcompile.recipe import Recipe
    from lrcompile.weights.adapters import load_adapter, save_adapter
    from lrcompile.weights.adopt import adopt, adopt_like, merge
    from lrcompile.weights.library import export_quantised
    from lrcompile.weights.peft_export import export_peft
    from lrcompile.weights.peft_load import load_peft
    from lrcompile.weights.plan import Plan
    from lrcompile.weights.planner import plan
    from lrcompile.weights.state import load, original_state_dict, save

__version__ = "0.1.0"

_HOME = {
    "AdoptError": "errors",
    "CaptureError": "errors",
    "EvalError": "errors",
    "KernelError": "errors",
    "LrcompileError": "errors",
    "PassError": "errors",
    "PlanError": "errors",
    "RecipeError": "errors",
    "StateError": "errors",
    "Recipe": "recipe",
    "capture": "graph.capture",
    "Report": "graph.inspect",
    "inspect": "graph.inspect",
    "Plan": "weights.plan",
    "plan": "weights.planner",
    "adopt": "weights.adopt",
    "adopt_like": "weights.adopt",
    "merge": "weights.adopt",
    "export_quantised": "weights.library",
    "original_state_dict": "weights.state",
    "save": "weights.state",
    "load": "weights.state",
    "save_adapter": "weights.adapters",
    "load_adapter": "weights.adapters",
    "export_peft": "weights.peft_export",
    "load_peft": "weights.peft_load",
}

__all__ = [
    "AdoptError",
    "CaptureError",
    "EvalError",
    "KernelError",
    "LrcompileError",
    "PassError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "StateError",
    "adopt",
    "adopt_like",
    "capture",
    "export_peft",
    "export_quantised",
    "inspect",
    "load",
    "load_adapter",
    "load_peft",
    "merge",
    "original_state_dict",
    "plan",
    "save",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lrcompile' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"lrcompile.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
