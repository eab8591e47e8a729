"""The Recipe: what a user asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lrcompile.errors import RecipeError
from lrcompile.weights.formats import format_of

DEFAULT_COMPRESSION = 2.64
DIALS = ("compression", "rank", "rank_ratio", "budget_bytes")
SVD_METHODS = ("auto", "full", "randomized")
PLAIN_INITS = ("svd", "data")  # of a pair in a weight's place
BASE_INITS = ("zero", "pissa", "loftq", "qera")  # of a pair beside a base
INITS = (*PLAIN_INITS, *BASE_INITS)
MENDING_INITS = ("loftq", "qera")  # those of a pair that makes up for what quantising the base lost
CALIBRATED = ("data", "qera")  # need the inputs' covariances
ALLOCATIONS = ("uniform", "importance")
ATTENTION_SHARES = {"*[Aa]tt[ne]*": 0.4}  # attn, attention: as transformers, torch.nn and others name it
PAIR_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """What to make of a model's linear weights: a pair in each one's place, or a frozen base, or both together.

    At most one of the four dials is set. Without any, `weights` alone is a quantised model without pairs, and a Recipe
    that names no number format either is `compression=2.64`.

    Attributes:
        compression: (numbers in the selected linear weights) / (numbers left), at least 1. The default dial, 2.64.
        rank: the same rank for every selected weight.
        rank_ratio: rank = rank_ratio * min(in_features, out_features), in (0, 1].
        budget_bytes: bytes of all the model's parameters together, after adoption.
        weights: the frozen base that a pair is added to: a number format ("nf4", "fp4", "int8", "int4" and their variants, see
            `lrcompile.weights.formats.format_of`), or "dense", the weight in its own dtype (LoRA). None: no base, the
            pair stands in the weight's place.
        factors: number format of the pair, for inference; None: its weight's dtype.
        init: how a pair starts. In a weight's place "svd" (2105.01029) or "data", the optimum for the calibration inputs
            (2604.01609). Beside a base "zero" (LoRA 2106.09685, QLoRA 2305.14314), "pissa" (2404.02948), "loftq" (2310.08659)
            or "qera" (QERA-exact, 2410.06040). "data" and "qera" need `calibration`, see `lrcompile.adopt`. "auto":
            "svd" or "pissa".
        alternations: of LoftQ.
        alpha: a pair beside a base is multiplied by alpha / √rank (rank-stable scaling, 2312.03732).
        pair_dtype: of a pair beside a base, "float32", "bfloat16" or "float16"; None: its weight's.
        trainable: None leaves `requires_grad` as it is, bases aside. A list: the pairs beside bases (or, without a base, in
            a weight's place) are trained, and beside them only parameters that match one of these globs.
        allocation: how a compression or budget is shared: "uniform", or "importance": half of the uniform rank for
            everyone, the rest where it keeps most energy (2604.01609); for weights that are trained already.
        shares: glob -> how many times the others' share of a compression or budget the weights matching it get: {"*attn*": 0.5}.
            A weight goes by the first glob that matches it; those that match none have 1. A glob that decides about no
            weight is an error.
        svd: how the truncated SVD is computed: "full", "randomized", or "auto" (randomized where the rank is a
            small part of a large matrix).
        include: globs (`lrcompile.graph.names.matches` says what all globs mean), of which a weight must match one. Embeddings
            and output heads are taken only where a glob matches them or their own module, not one around that, and its last
            component is spelled out ("lm_head", "*.embed_tokens").
        exclude: globs; a matching weight stays dense.
        require_saving: leave a site dense where its pair would hold no fewer numbers than the weight.
        passes: passes of the user's own, each placed by its `after` (see `lrcompile.passes.contract`).

    Raises:
        RecipeError: a value out of range, more than one dial, an unknown method.
    """

    compression: float | None = None
    rank: int | None = None
    rank_ratio: float | None = None
    budget_bytes: int | None = None
    weights: str | None = None
    factors: str | None = None
    init: str = "auto"
    alternations: int = 5
    alpha: float = 16.0
    pair_dtype: str | None = None
    trainable: Sequence[str] | None = None
    allocation: str = "uniform"
    shares: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    svd: str = "auto"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    require_saving: bool = True
    passes: Sequence[Callable[..., Any]] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "passes", "trainable"):
            value = getattr(self, name)
            if name == "trainable" and value is None:
                continue
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise RecipeError(f"{name} takes a list, got {value!r}; write {name}=[{value!r}]")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "shares", _as_shares(self.shares))
        dials = [d for d in DIALS if getattr(self, d) is not None]
        if not dials and self.weights in (None, "dense"):
            object.__setattr__(self, "compression", DEFAULT_COMPRESSION)
            dials = ["compression"]
        if len(dials) > 1:
            raise RecipeError(f"set one of {', '.join(DIALS)}; got {' and '.join(dials)}")
        for dial in dials:
            self._check_number(dial)
        self._check_formats()
        self._check_pair()
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

    def _check_formats(self) -> None:
        for name in ("weights", "factors"):
            value = getattr(self, name)
            if value is None or (name == "weights" and value == "dense"):
                continue
            if not isinstance(value, str):
                raise RecipeError(f'{name} takes the name of a number format such as "nf4", got {value!r}')
            format_of(value)  # raises, listing the known ones
        if self.weights and self.factors:
            raise RecipeError("a pair beside a base is there to be trained, and can't be quantised: leave factors out")
        if self.weights and self.compression is not None:
            if self.weights == "dense" and self.compression == DEFAULT_COMPRESSION:
                raise RecipeError('weights="dense" keeps every weight and adds a pair: say of what rank, as rank=16')
            raise RecipeError(
                "a base keeps every number, so there is no compression to ask for: set rank, or budget_bytes"
            )

    def _check_pair(self) -> None:
        if self.init not in ("auto", *INITS):
            raise RecipeError(f"init={self.init!r} is not known; choose from auto, {', '.join(INITS)}")
        if self.init in BASE_INITS and self.weights is None:
            raise RecipeError(
                f'init={self.init!r} starts a pair beside a base: name the base with weights="nf4" or weights="dense", or '
                f"choose from {', '.join(PLAIN_INITS)}"
            )
        if self.init in PLAIN_INITS and self.weights is not None:
            raise RecipeError(
                f"init={self.init!r} puts a pair in a weight's place, and beside a base there is nothing left for it to "
                f"do; choose from {', '.join(BASE_INITS)}"
            )
        if self.weights == "dense" and self.init in MENDING_INITS:
            raise RecipeError(f'init={self.init!r} mends what quantising loses, and weights="dense" loses nothing')
        if type(self.alternations) is not int or self.alternations < 1:
            raise RecipeError(f"alternations must be a whole number of 1 or more, got {self.alternations!r}")
        if (
            isinstance(self.alpha, bool)
            or not isinstance(self.alpha, (int, float))
            or not 0 < self.alpha < float("inf")
        ):
            raise RecipeError(f"alpha must be a number above 0, got {self.alpha!r}")
        if self.pair_dtype is not None and self.pair_dtype not in PAIR_DTYPES:
            raise RecipeError(f"pair_dtype={self.pair_dtype!r} is not known; choose from {', '.join(PAIR_DTYPES)}")
        if self.pair_dtype is not None and self.weights is None:
            raise RecipeError("pair_dtype is of a pair beside a base: name one with weights=, or leave pair_dtype out")
        if self.allocation not in ALLOCATIONS:
            raise RecipeError(f"allocation={self.allocation!r} is not known; choose from {', '.join(ALLOCATIONS)}")
        if self.allocation == "importance" and self.compression is None and self.budget_bytes is None:
            raise RecipeError("allocation shares a total: set compression or budget_bytes, or leave allocation out")
        if self.shares and self.compression is None and self.budget_bytes is None:
            raise RecipeError("shares are of a total: set compression or budget_bytes, or leave shares out")

    @property
    def dial(self) -> str:
        """The one dial that is set, as "compression=2.64"; the base's format where there are no pairs."""
        name = next((d for d in DIALS if getattr(self, d) is not None), "weights")
        return f"{name}={getattr(self, name)}"

    @property
    def has_preset_shares(self) -> bool:
        """Whether the shares are those of `Recipe.pretrain()`, which a model with other names for attention needn't match."""
        return self.shares == tuple(ATTENTION_SHARES.items())

    @property
    def has_pairs(self) -> bool:
        """Whether weights get pairs, and not a base alone."""
        return any(getattr(self, d) is not None for d in DIALS)

    @property
    def start(self) -> str:
        """`init`, "auto" resolved."""
        if self.init != "auto":
            return self.init
        return "svd" if self.weights is None else "pissa"

    @classmethod
    def pretrain(cls, **changes: Any) -> Recipe:
        """For training from scratch: spectral init (2105.01029), and less of a total for attention than for the rest.

        Attention was seen to learn as much at a quarter of the others' ranks, and the rest learns more with what that frees
        (examples/LOG.md). `shares={}` is the uniform allocation.
        """
        uniform = any(changes.get(name) is not None for name in ("rank", "rank_ratio", "weights"))
        preset: dict[str, Any] = {} if uniform else {"shares": ATTENTION_SHARES}
        return cls.from_options({**preset, **changes})

    @classmethod
    def compress(cls, **changes: Any) -> Recipe:
        """For a pretrained model that is to be smaller: full-precision SVD of every weight."""
        return cls.from_options({"svd": "full", **changes})

    @classmethod
    def finetune(cls, **changes: Any) -> Recipe:
        """For finetuning in little memory: NF4 bases, pairs of rank 16 in float32, and nothing else trained."""
        preset: dict[str, Any] = {"weights": "nf4", "pair_dtype": "float32", "trainable": ()}
        if not any(changes.get(dial) is not None for dial in DIALS):
            preset["rank"] = 16
        return cls.from_options({**preset, **changes})

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
        for name in ("include", "exclude", "trainable"):
            if getattr(self, name) is not None:
                out[name] = list(getattr(self, name))
        out["shares"] = dict(self.shares)
        out["passes"] = [f"{p.__module__}:{getattr(p, '__qualname__', p)}" for p in self.passes]
        return out


def _as_shares(given: Any) -> tuple[tuple[str, float], ...]:
    """Pairs of a glob and its share, of a mapping or pairs.

    Raises:
        RecipeError: it is neither, or a share isn't a number above 0.
    """
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise RecipeError(f'shares takes a mapping of globs to numbers, as {{"*attn*": 0.5}}, got {given!r}')
    for glob, share in pairs:
        number = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < float("inf")
        if not isinstance(glob, str) or not number:
            raise RecipeError(
                f"shares[{glob!r}] must be a number above 0, as 0.5, got {share!r}; exclude= keeps a weight dense"
            )
    return tuple((glob, float(share)) for glob, share in pairs)


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
