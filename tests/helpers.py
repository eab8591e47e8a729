"""Small models and measures that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lrcompile import Recipe
from lrcompile.graph.capture import Capture, CapturedGraph, capture
from lrcompile.graph.pipeline import Snapshot, run_passes
from lrcompile.passes import (
    PassContext,
    PassFunction,
    allocate_ranks,
    canonicalize,
    factorize,
    fuse_epilogue,
    lower,
    reassociate,
    select,
    share_input,
)
from lrcompile.passes.graphs import linear_fn, pair_product, scopes, value
from lrcompile.weights.initialise import Start, initialise
from lrcompile.weights.planner import context_for

WIDTH, HIDDEN, VOCAB = 32, 64, 50
BLOCKS = {
    f"body.blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")
}  # the weights of a LanguageModel's blocks
DECIDE = [canonicalize, select, allocate_ranks]
ALL = [*DECIDE, factorize, reassociate, fuse_epilogue, share_input, lower]


class Block(nn.Module):
    """A residual MLP, (..., width) -> (..., width)."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after the other, each checkpointed where asked; (..., width) -> (..., width)."""

    def __init__(self, depth: int = 2, width: int = WIDTH, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, 2 * width) for _ in range(depth))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


class LanguageModel(nn.Module):
    """Embedding, blocks, head: token ids (batch, tokens) -> logits (batch, tokens, VOCAB)."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = Stack()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


class Attention(nn.Module):
    """nn.MultiheadAttention, batch first, over (x, key, value) or x alone; called with its options."""

    def __init__(self, width: int = 16, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True, **options)

    def forward(self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Any:
        key = x if key is None else key
        return self.attn(x, key, key if value is None else value, **options)


class Spelled(nn.Module):
    """One raw matrix parameter `weight`, and a function (x, weight) -> y that says how it is multiplied."""

    def __init__(self, function: Any, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape).to(dtype))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def run(
    model: nn.Module, inputs: Any, passes: Sequence[PassFunction], recipe: Recipe | None = None, verify: bool = True
) -> tuple[Capture, PassContext, list[Snapshot]]:
    """Capture a model and run passes over it, with snapshots and translation validation of the exact ones."""
    captured = capture(model, inputs)
    ctx = context_for(model, captured, recipe or Recipe(rank=2))
    values = pair_values(captured, ctx)
    return captured, ctx, run_passes(captured, passes, ctx, snapshots=True, verify=verify, values=values)


def ids(batch: int = 2, tokens: int = 7) -> Tensor:
    """Token ids, (batch, tokens) int64."""
    return torch.arange(batch * tokens).view(batch, tokens) % VOCAB


def tiny_llama() -> Any:
    """A Llama of two small layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def tiny_t5() -> Any:
    """An encoder-decoder of one small layer each."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def svd_pair(weight: torch.Tensor, rank: int, method: str = "auto", name: str = "weight") -> Start:
    """A plain pair in a weight's place, by truncated SVD."""
    return initialise(weight, rank=rank, init="svd", svd=method, name=name)


def pair_values(captured: Capture, ctx: PassContext) -> Any:
    """What `run_passes` takes as `values`: a graph's inputs, the new leaves filled by the truncated SVD."""
    parameters = {captured.names[id(p)][0]: p for g in captured.graphs for p in g.inputs if id(p) in captured.names}

    def values(graph: CapturedGraph, gm: fx.GraphModule) -> list[Any]:
        inputs = list(graph.inputs)
        for node in gm.graph.find_nodes(op="placeholder")[len(inputs) :]:
            key, suffix = node.meta["lr_leaf"]
            weight = parameters[key].detach()
            pair = svd_pair(weight.T if ctx.weights[key].stored_in_out else weight, ctx.weights[key].rank)
            inputs.append(pair.weight_a if suffix == "_a" else pair.weight_b)
        return inputs

    return values


def check_clean(gm) -> None:
    """A well-formed graph whose every tensor node still tells its shape truly."""
    for scope in scopes(gm):
        scope.gm.graph.lint()
        for node in scope.gm.graph.nodes:
            if node.target in (linear_fn, F.embedding):
                assert isinstance(value(node), Tensor), node
                matrix, x = value(node.args[1]), value(node.args[0])
                last = matrix.shape[0] if node.target is linear_fn else matrix.shape[1]
                assert value(node).shape[-1] == last and value(node).shape[:-1] == (
                    x.shape[:-1] if node.target is linear_fn else x.shape
                )


def targets(gm) -> list:
    return [n.target for scope in scopes(gm) for n in scope.gm.graph.nodes if n.op.startswith("call")]


def no_dense_product(gm) -> bool:
    return not any(pair_product(scope, n) for scope in scopes(gm) for n in scope.gm.graph.nodes)
