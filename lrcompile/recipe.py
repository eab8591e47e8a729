"""The Recipe: what a user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lrcompile.errors import RecipeError

DEFAULT_COMPRESSION = 2.64
DIALS = ("compression", "rank", "rank_ratio", "budget_bytes")
SVD_METHODS = ("auto", "full", "randomized")


@dataclass(frozen=True)
class Recipe:
    """What to make of a model's linear weights. Exactly one of the four dials is set.

    Attributes:
        compression: (numbers in the selected linear weights) / (numbers left), at least 1. The default dial, 2.64.
        rank: the same rank for every selected weight.
        rank_ratio: rank = rank_ratio * min(in_features, out_features), in (0, 1].
        budget_bytes: bytes of all the model's parameters together, after adoption.
        svd: how the truncated SVD is computed: "full", "randomized", or "auto" (randomized where the rank is a
            small part of a large matrix).
        include: globs; a weight must match one, by its own name, by the module that owns it ("*.q_proj"), or by any
            module around that ("layers.0", "encoder.*"). Embeddings and output heads are taken only where a glob
            matches them or their own module, and its last component is spelled out ("lm_head", "*.embed_tokens").
        exclude: globs, matching likewise; a matching weight stays dense.
        require_saving: leave a site dense where its pair would hold no fewer numbers than the weight.
        passes: passes of the user's own, each placed by its `after` (see `lrcompile.passes.contract`).

    Raises:
        RecipeError: a value out of range, more than one dial, an unknown method.
    """

    compression: float | None = None
    rank: int | None = None
    rank_ratio: float | None = None
    budget_bytes: int | None = None
    svd: str = "auto"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    require_saving: bool = True
    passes: Sequence[Callable[..., Any]] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "passes"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise RecipeError(f"{name} takes a list, got {value!r}; write {name}=[{value!r}]")
            object.__setattr__(self, name, tuple(value))
        dials = [d for d in DIALS if getattr(self, d) is not None]
        if not dials:
            object.__setattr__(self, "compression", DEFAULT_COMPRESSION)
            dials = ["compression"]
        if len(dials) > 1:
            raise RecipeError(f"set one of {', '.join(DIALS)}; got {' and '.join(dials)}")
        self._check_number(dials[0])
        if self.svd not in SVD_METHODS:
            raise RecipeError(f"svd={self.svd!r} is not known; choose from {', '.join(SVD_METHODS)}")
        if not self.include:
            raise RecipeError("include=() selects nothing; leave it out to select every linear weight")
        for p in self.passes:
            if not callable(p) or not hasattr(p, "exact"):
                raise RecipeError(
                    f"{p!r} is not a pass; decorate it with @lrcompile.passes.graph_pass(exact=..., after=...)"
                )

    def _check_number(self, dial: str) -> None:
        value = getattr(self, dial)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise RecipeError(f"{dial} must be a number, got {value!r}")
        if dial in ("rank", "budget_bytes") and not isinstance(value, int):
            raise RecipeError(f"{dial} must be a whole number, got {value!r}")
        if dial == "compression" and not 1 <= value < float("inf"):
            raise RecipeError(f"compression must be 1 or more (2.64 keeps 1/2.64 of the numbers), got {value}")
        if dial == "rank" and value < 1:
            raise RecipeError(f"rank must be 1 or more, got {value}")
        if dial == "rank_ratio" and not 0 < value <= 1:
            raise RecipeError(f"rank_ratio must be above 0 and at most 1, got {value}")
        if dial == "budget_bytes" and value < 1:
            raise RecipeError(f"budget_bytes must be 1 or more, got {value}")

    @property
    def dial(self) -> str:
        """The one dial that is set, as "compression=2.64"."""
        name = next(d for d in DIALS if getattr(self, d) is not None)
        return f"{name}={getattr(self, name)}"

    @classmethod
    def pretrain(cls, **changes: Any) -> Recipe:
        """For training from scratch: uniform ranks, spectral init (2105.01029)."""
        return cls.from_options({**changes})

    @classmethod
    def compress(cls, **changes: Any) -> Recipe:
        """For a pretrained model that is to be smaller: full-precision SVD of every weight."""
        return cls.from_options({"svd": "full", **changes})

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Recipe:
        """A Recipe from a plain dict.

        Raises:
            RecipeError: an unknown key; the message lists the known ones.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(repr(name) for name in options if name not in known)
        if unknown:
            raise RecipeError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: the set dial and the options; passes by name."""
        out = {k: v for k, v in asdict(self).items() if v is not None and k != "passes"}
        out["include"], out["exclude"] = list(self.include), list(self.exclude)
        out["passes"] = [f"{p.__module__}:{getattr(p, '__qualname__', p)}" for p in self.passes]
        return out


def as_recipe(given: Any, example_inputs: Any) -> Recipe:
    """The Recipe that a function taking (model, example_inputs, recipe) was given; the default for None.

    Raises:
        RecipeError: something else was given, or the Recipe stands where the example inputs belong.
    """
    if isinstance(example_inputs, Recipe):
        raise RecipeError("the example inputs come before the recipe: pass (model, example_inputs, recipe)")
    if given is None:
        return Recipe()
    if isinstance(given, dict):
        Recipe.from_options(given)  # what is wrong in it is told first
        written = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise RecipeError(f"the recipe is a dict; pass lrcompile.Recipe({written})")
    if not isinstance(given, Recipe):
        known = ", ".join(f.name for f in fields(Recipe))
        raise RecipeError(f"the recipe must be a lrcompile.Recipe, got {type(given).__name__}; its fields are {known}")
    return given
