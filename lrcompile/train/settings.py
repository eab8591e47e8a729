"""What a training run is told: typed, checked, and the same whether it comes from a file, the command line or a script.

The docstring below each field is what `lrcompile pretrain --help` prints. config.py reads files and command lines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lrcompile.errors import TrainError
from lrcompile.recipe import Recipe


class Strict:
    """To pydantic, which checks files: no unknown keys, and no "3" for 3."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class Model(Strict):
    """The model, from local files: nothing is fetched."""

    source: str = ""
    """A transformers config.json (weights are drawn from the seed), a transformers directory or GGUF file (its weights), or
    module:factory, a callable that returns (model, example_inputs)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that are trained and of AdamW's means; `parallel.precision` is what products are computed in."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Which of transformers' attentions: PyTorch's fused one, or plain products."""


@dataclass(frozen=True)
class RecipeTable(Strict):
    """What the linear weights become: changes to a preset of lrcompile.Recipe, whose fields these are."""

    dense: bool = False
    """Train the weights as they are: the dense twin, full finetuning. Nothing else of the recipe is read then."""
    preset: Literal["pretrain", "finetune", "compress"] = "pretrain"
    """What the other fields change. pretrain: low-rank pairs, 2.64 times fewer numbers, those of attention smaller than the rest.
    finetune: NF4 bases and pairs of rank 16. compress: pairs from the full-precision SVD of trained weights."""
    compression: float | None = None
    """Dial: numbers in the linear weights over those left. At most one dial is set; one given on the command line replaces the
    file's."""
    rank: int | None = None
    """Dial: the same rank everywhere."""
    rank_ratio: float | None = None
    """Dial: rank = rank_ratio * min(in, out)."""
    budget_bytes: int | None = None
    """Dial: bytes of all parameters together."""
    weights: str | None = None
    """Format of a frozen base beside the pair: nf4, int8, int4, ..., or dense (LoRA)."""
    factors: str | None = None
    """Format of the pair, for inference."""
    init: str | None = None
    """How a pair starts: svd, data; beside a base pissa, loftq, qera, zero."""
    alternations: int | None = None
    """Of LoftQ."""
    alpha: float | None = None
    """A pair beside a base is multiplied by alpha / √rank."""
    pair_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of a pair beside a base."""
    trainable: tuple[str, ...] | None = None
    """Globs of what is trained beside the pairs."""
    allocation: Literal["uniform", "importance"] | None = None
    """How a compression or budget is shared among the weights."""
    shares: dict[str, float] | None = None
    """Globs of weights, and how many times the others' share of it they get, as {"*attn*" = 0.5}."""
    svd: Literal["auto", "full", "randomized"] | None = None
    """How the SVDs are computed."""
    include: tuple[str, ...] | None = None
    """Globs: only weights that match one."""
    exclude: tuple[str, ...] | None = None
    """Globs: weights that match one stay dense."""
    require_saving: bool | None = None
    """Leave a weight dense where its pair would hold no fewer numbers."""

    def make(self) -> Recipe | None:
        """The Recipe; None for a dense run.

        Raises:
            RecipeError: a value out of range, two dials, or what doesn't go together.
        """
        if self.dense:
            return None
        given = {name: value for name, value in asdict(self).items() if value is not None}
        del given["dense"]
        preset: Recipe = getattr(Recipe, given.pop("preset"))(**given)
        return preset


@dataclass(frozen=True)
class Data(Strict):
    """Token shards, as `lrcompile data` writes them."""

    train: str = ""
    """Directory of the shards to train on."""
    validation: str | None = None
    """Directory of held-out shards; None: no held-out loss."""
    length: int = 1024
    """Tokens a sequence."""
    calibration: int = 32
    """Sequences of `train` that the starts which look at data (recipe.init: data, qera) are made for."""

    def __post_init__(self) -> None:
        _need(self.length >= 2, "data.length", self.length, "must be 2 or more: a token, and the one to predict")
        _need(self.calibration >= 1, "data.calibration", self.calibration, "must be 1 or more sequences")


@dataclass(frozen=True)
class Optimizer(Strict):
    """How the weights are moved."""

    name: Literal["adamw", "adamw8bit", "spectron", "muon"] = "adamw"
    """adamw; adamw8bit: its states in 8 bits; spectron: orthogonalised, spectrally bounded updates of the pairs (2602.12429); muon:
    orthogonalised updates of every matrix in the blocks. Both leave the rest to AdamW."""
    lr: float = 6e-4
    """Learning rate at the schedule's top."""
    factor_lr: float | None = None
    """That of the pairs; None: lr, and 0.02 for spectron, whose rate is the spectral norm that a step may change a product by."""
    matrix_lr: float | None = None
    """That of the dense matrices which muon moves; None: lr."""
    rates: dict[str, float] = field(default_factory=dict)
    """Globs of parameters, and what their learning rate is multiplied by, as {"*attn*" = 0.3}; the first that matches counts. A
    pair goes by its weight's name."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW's running means."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Of dense matrices. Factors, norms and biases have none: decay on a factor penalises the nuclear norm of the product."""
    product_decay: float = 0.0
    """Decay of a pair's product, shared between its factors."""
    momentum: float = 0.95
    """Of spectron and muon."""
    nesterov: bool = False
    """Of spectron: what is orthogonalised looks ahead to this step's gradient, as muon's always does."""

    def __post_init__(self) -> None:
        _need(_positive(self.lr), "optimizer.lr", self.lr, "must be above 0, as 3e-4")
        factor_lr = self.factor_lr is None or _positive(self.factor_lr)
        _need(factor_lr, "optimizer.factor_lr", self.factor_lr, "must be above 0; leave it out for lr")
        matrix_lr = self.matrix_lr is None or (_positive(self.matrix_lr) and self.name == "muon")
        _need(matrix_lr, "optimizer.matrix_lr", self.matrix_lr, "is muon's, and must be above 0; leave it out for lr")
        for glob, times in self.rates.items():
            _need(_positive(times), f"optimizer.rates[{glob!r}]", times, "must be above 0, as 0.3")
        nesterov = not self.nesterov or self.name == "spectron"
        _need(nesterov, "optimizer.nesterov", self.nesterov, "is spectron's; leave it out (muon always looks ahead)")
        shares = all(0 <= beta < 1 for beta in self.betas)
        _need(shares, "optimizer.betas", self.betas, "must both be at least 0 and below 1, as [0.9, 0.95]")
        _need(_positive(self.eps), "optimizer.eps", self.eps, "must be above 0")
        _need(0 <= self.weight_decay < 1, "optimizer.weight_decay", self.weight_decay, "must be in [0, 1)")
        _need(0 <= self.product_decay < 1, "optimizer.product_decay", self.product_decay, "must be in [0, 1)")
        _need(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1)")


@dataclass(frozen=True)
class Schedule(Strict):
    """The learning rate over the steps, as a share of optimizer.lr."""

    name: Literal["cosine", "wsd", "constant", "linear"] = "cosine"
    """After the warm-up: cosine or linear from 1 down to `final`; wsd: 1, and down over the last `decay` of the steps as
    1 - √share (2405.18392); constant: 1."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final: float = 0.1
    """Share of lr at the end."""
    decay: float = 0.2
    """Share of the steps that wsd goes down in."""

    def __post_init__(self) -> None:
        _need(self.warmup >= 0, "schedule.warmup", self.warmup, "must be 0 or more steps")
        _need(0 <= self.final <= 1, "schedule.final", self.final, "must be a share of lr, from 0 to 1")
        _need(0 < self.decay <= 1, "schedule.decay", self.decay, "must be a share of the steps, above 0 and at most 1")


@dataclass(frozen=True)
class Parallel(Strict):
    """How the ranks share the work (FSDP2), and how each computes."""

    shard: int | None = None
    """Ranks that share one copy of the parameters; None: all of them, or all over `replicate`."""
    replicate: int = 1
    """Copies of the parameters (HSDP): replicate * shard = ranks."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What products are computed in."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """What gradients are summed over the ranks in."""
    compile: bool = True
    """Compile each block with the lrcompile backend."""
    kernels: Literal["auto", "triton", "inductor"] = "auto"
    """What computes the pairs when compiled: whichever the cost model expects to be faster, or always one."""
    checkpoint: Literal["none", "block", "selective"] = "none"
    """Activations recomputed in the backward pass: none, all of each block, or all but the results of its products."""

    def __post_init__(self) -> None:
        shard = self.shard is None or self.shard >= 1
        _need(shard, "parallel.shard", self.shard, "must be 1 or more ranks; leave it out for all")
        _need(self.replicate >= 1, "parallel.replicate", self.replicate, "must be 1 or more copies")


@dataclass(frozen=True)
class Save(Strict):
    """Checkpoints, in the run's directory."""

    every: int = 500
    """Steps between them; one is written at the end in any case."""
    keep: int = 2
    """How many of the last are kept."""
    asynchronous: bool = True
    """Write while training goes on."""
    merged: bool = True
    """At the end write the merged dense model too, for transformers and others; rank 0 holds it on its CPU."""

    def __post_init__(self) -> None:
        _need(self.every >= 1, "save.every", self.every, "must be 1 or more steps")
        _need(self.keep >= 1, "save.keep", self.keep, "must be 1 or more checkpoints")


@dataclass(frozen=True)
class Evaluate(Strict):
    """Held-out loss and samples, while training."""

    every: int = 500
    """Steps between evaluations; there is one at the end in any case."""
    batches: int = 32
    """Batches (of `batch` sequences) of the held-out loss, spread over what there is and the same ones every time."""
    prompts: tuple[str, ...] = ()
    """Texts to go on from."""
    new_tokens: int = 64
    """Tokens to go on for."""

    def __post_init__(self) -> None:
        _need(self.every >= 1, "evaluate.every", self.every, "must be 1 or more steps")
        _need(self.batches >= 1, "evaluate.batches", self.batches, "must be 1 or more")
        _need(self.new_tokens >= 1, "evaluate.new_tokens", self.new_tokens, "must be 1 or more")


@dataclass(frozen=True)
class Log(Strict):
    """What is told of the run; metrics.jsonl is always written."""

    live: bool = True
    """A live display, where there is a terminal."""
    tensorboard: bool = False
    """TensorBoard's files too."""
    every: int = 10
    """Steps between plain lines, where there is no terminal; metrics.jsonl has every step."""

    def __post_init__(self) -> None:
        _need(self.every >= 1, "log.every", self.every, "must be 1 or more steps")


class Layout(NamedTuple):
    """How ranks share a step.

    Attributes:
        replicate, shard: copies of the parameters, and ranks that share one.
        rows, accumulate: sequences that a rank takes at once, and how often in a step.
    """

    replicate: int
    shard: int
    rows: int
    accumulate: int


@dataclass(frozen=True)
class Run(Strict):
    """A training run. Paths are taken from the current directory, in files as on the command line."""

    model: Model = field(default_factory=Model)
    recipe: RecipeTable = field(default_factory=RecipeTable)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = field(default_factory=Parallel)
    save: Save = field(default_factory=Save)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)
    steps: int = 1000
    """Updates of the weights."""
    batch: int = 32
    """Sequences a step, over all ranks."""
    micro_batch: int = 8
    """Sequences that a rank takes at once, at most; the rest of its share is accumulated."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None or inf: not clipped (TOML has no null: write inf)."""
    seed: int = 0
    """Of the drawn weights and of the order of the data."""
    bad_loss: Literal["stop", "skip"] = "stop"
    """At a NaN or infinite loss or gradient: stop, or skip the step."""
    out: str = "out"
    """Directory of the run: its config, metrics, checkpoints and the finished model."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        _need(
            self.batch % self.micro_batch == 0,
            "batch",
            self.batch,
            f"must be a multiple of micro_batch, {self.micro_batch}",
        )
        _need(self.clip is None or self.clip > 0, "clip", self.clip, "must be above 0; inf for no clipping")
        _need(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        _need(self.out != "", "out", self.out, "must name a directory")
        warmup = self.schedule.warmup
        _need(
            warmup < self.steps,
            "schedule.warmup",
            warmup,
            f"must be below steps, {self.steps}: shorten it, as schedule.warmup={self.steps // 20}",
        )
        if self.schedule.name == "wsd":
            most = 1 - warmup / self.steps
            told = f"leaves no room for the warm-up: at most {most:.3g} with {warmup} of {self.steps} steps of it"
            _need(self.schedule.decay <= most, "schedule.decay", self.schedule.decay, told)

    @classmethod
    def pretrain_defaults(cls) -> Run:
        """What `lrcompile pretrain` starts from: muon, which was ahead of AdamW for pairs and dense twins (examples/LOG.md)."""
        return cls(optimizer=Optimizer(name="muon"))

    @classmethod
    def finetune_defaults(cls) -> Run:
        """What `lrcompile finetune` starts from: NF4 bases and pairs, a shorter warm-up, no weight decay."""
        return cls(
            recipe=RecipeTable(preset="finetune"),
            optimizer=Optimizer(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0),
            schedule=Schedule(name="linear", warmup=20, final=0.0),
        )

    def layout(self, ranks: int) -> Layout:
        """How so many ranks share a step.

        Raises:
            TrainError: the ranks can't be divided so; the message says what fits.
        """
        replicate = self.parallel.replicate
        shard = self.parallel.shard or max(1, ranks // replicate)
        if replicate * shard != ranks:
            raise TrainError(
                f"parallel.replicate={replicate} times parallel.shard={shard} is {replicate * shard}, and there are {ranks} "
                "ranks: leave shard out, and let replicate divide the ranks"
            )
        share = self.batch // ranks
        rows = min(self.micro_batch, share)
        if self.batch % ranks or share % rows:
            raise TrainError(
                f"batch={self.batch} can't be divided among {ranks} ranks that take micro_batch={self.micro_batch} at once: "
                f"make it a multiple of {self.micro_batch * ranks}, or micro_batch smaller"
            )
        return Layout(replicate, shard, rows, share // rows)


def _need(ok: bool, name: str, value: Any, what: str) -> None:
    if not ok:
        raise TrainError(f"{name}={value!r}: {what}")


def _positive(value: float) -> bool:
    return 0 < value < float("inf")
