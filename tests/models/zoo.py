"""One table of small random models: what each is built from, called with, and which weights its blocks hold.

Nothing here knows of lrcompile. `block_linears` finds the weights by walking modules, so that the tests can
tell whether a product was skipped in silence. Every model is fp32, has 2 layers of width 128 and no dropout:
outputs of two copies compare, a forward takes milliseconds, and the smallest block matrix (64 x 128) still
saves at rank 16, the smallest rank a tile allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB, WIDTH, HIDDEN, HEADS, LAYERS, BATCH, TOKENS, CLASSES = 128, 128, 256, 4, 2, 2, 16, 4


def ids(seed: int = 0, high: int = VOCAB, shape: tuple[int, ...] = (BATCH, TOKENS)) -> Tensor:
    """Random token ids (int64); 0 to 3 are kept free for padding and the like."""
    return torch.randint(4, high, shape, generator=torch.Generator().manual_seed(seed))


def text() -> dict[str, Tensor]:
    """A language model's batch: ids and labels, (BATCH, TOKENS)."""
    return {"input_ids": ids(), "labels": ids()}


def classes() -> Tensor:
    """A class for each row of a batch, (BATCH,) int64."""
    return torch.arange(BATCH) % CLASSES


def model_loss(model: nn.Module, output: Any) -> Tensor:
    """The loss that a transformers model computes from `labels`; a scalar."""
    return output.loss


@dataclass(frozen=True)
class Case:
    """A small model of one family.

    blocks: dotted prefixes of the repeated layers; `block_linears` looks inside these only.
    heads: names of the output heads that are not an embedding's weight.
    raw: a block's products are spelled with bare parameters, so each of its matrices counts.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: tuple[str, ...]
    heads: tuple[str, ...] = ()
    inputs: Callable[[], dict[str, Tensor]] = text
    loss: Callable[[nn.Module, Any], Tensor] = model_loss
    raw: bool = False

    def fresh(self, seed: int = 0) -> nn.Module:
        """The model drawn from `seed`, in training mode."""
        torch.manual_seed(seed)
        return self.build().train()

    def logits(self, output: Any) -> Tensor:
        """The tensor to compare between two models: (..., VOCAB or CLASSES) fp32."""
        return output if isinstance(output, Tensor) else output.logits

    def dense(self, model: nn.Module) -> set[str]:
        """Names of the embeddings (with heads tied to them) and the heads: never replaced by default."""
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        return {n for n, p in model.named_parameters() if id(p) in tables or n in self.heads}

    def block_linears(self, model: nn.Module) -> list[str]:
        """Names of every linear weight inside the blocks, found by module type.

        Raises AssertionError if a block holds a matrix that is neither a linear weight nor an embedding, or
        holds no linear weight at all: then this table, not the compiler, has a gap.
        """
        found, matrices = [], []
        for prefix, module in model.named_modules():
            if not any(prefix == b or prefix.startswith(b + ".") for b in self.blocks):
                continue
            own = [n for n, p in module.named_parameters(prefix, recurse=False) if p.ndim >= 2]
            if isinstance(module, nn.Linear | Conv1D):
                found.append(f"{prefix}.weight")
            elif isinstance(module, nn.MultiheadAttention):
                found.append(f"{prefix}.in_proj_weight")
            elif self.raw:
                found += own
            if not isinstance(module, nn.Embedding):
                matrices += own
        assert found and sorted(found) == sorted(matrices), f"{self.name}: {set(found) ^ set(matrices)}"
        return found


def hf(model: str, config: str, *settings: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    """A builder of a transformers model, by the names of its class and its config's."""
    sizes = {key: value for group in (*settings, more) for key, value in group.items()}
    return lambda: getattr(tf, model)(getattr(tf, config)(**sizes))


# What most configs call their sizes. `KV` halves the key and value heads: those weights are then 64 x 128.
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
LM = {**SIZES, **SPECIAL, "intermediate_size": HIDDEN, "max_position_embeddings": 64}
KV = {**LM, "num_key_value_heads": HEADS // 2}
GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, **SPECIAL}
GPT_NO_DROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {**LM, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
DISTIL = {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": HIDDEN}
DISTIL_NO_DROP = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": CLASSES}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 32,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}
SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": HIDDEN}
WHISPER = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE.items()}
WHISPER |= {"vocab_size": VOCAB, "d_model": WIDTH, "num_mel_bins": 16, "dropout": 0.0}


def sentence() -> dict[str, Tensor]:
    """A classifier's batch: ids with the second row padded, and a class for each row."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, TOKENS // 2 :] = 0
    return {"input_ids": ids(), "attention_mask": mask, "labels": classes()}


def image() -> dict[str, Tensor]:
    """Two 32 x 32 RGB images and their classes."""
    pixels = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": classes()}


def speech() -> dict[str, Tensor]:
    """Log-mel features (BATCH, 16 mels, 32 frames) and the transcript's ids."""
    features = torch.randn(BATCH, 16, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "labels": ids()}


class Encoder(nn.Module):
    """torch's own nn.TransformerEncoder between an embedding and a per-token head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        # Nested tensors only matter with a padding mask, and make the layer warn when it can't use them.
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, VOCAB) logits."""
        return self.head(self.encoder(self.embed(input_ids)))


class TinyBlock(nn.Module):
    """A pre-norm block whose query, key and value are one packed nn.Linear, cut apart afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, WIDTH) -> the same."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).split(WIDTH, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class RawBlock(nn.Module):
    """The same block with bare parameters: matmul on (in, out) matrices, einsum on both layouts, F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        for name in "qkvo":
            setattr(self, f"w_{name}", nn.Parameter(torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)))
        self.w_up = nn.Parameter(torch.randn(WIDTH, HIDDEN) / math.sqrt(WIDTH))
        self.w_down = nn.Parameter(torch.randn(WIDTH, HIDDEN) / math.sqrt(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, WIDTH) -> the same."""
        h = self.norm_1(x)
        q, k = torch.matmul(h, self.w_q), h @ self.w_k.T
        v = torch.einsum("btd,de->bte", h, self.w_v)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + torch.einsum("btd,od->bto", mixed, self.w_o)
        return x + F.linear(F.gelu(self.norm_2(x) @ self.w_up), self.w_down)


class TinyGPT(nn.Module):
    """A GPT in one file: learned positions, blocks of the given class, the head tied to the embedding."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, VOCAB) logits."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def only_ids() -> dict[str, Tensor]:
    """The batch of a model that computes no loss of its own."""
    return {"input_ids": ids()}


def next_ids_loss(model: nn.Module, output: Tensor) -> Tensor:
    """Mean cross-entropy of the logits against fixed random targets; a scalar."""
    return F.cross_entropy(output.flatten(0, 1), ids(seed=1).flatten())


def llama_like(name: str, family: str, heads: tuple[str, ...] = ("lm_head.weight",), **config: Any) -> Case:
    """A decoder of transformers that is put together as llama is."""
    return Case(name, hf(f"{family}ForCausalLM", f"{family}Config", KV, config), ("model.layers",), heads)


def gpt_like(name: str, family: str, model: str, heads: tuple[str, ...] = (), **config: Any) -> Case:
    """A decoder of transformers that is put together as GPT-2 is."""
    return Case(name, hf(model, f"{family}Config", GPT, GPT_NO_DROP, config), ("transformer.h",), heads)


def masked(name: str, family: str, blocks: str, **config: Any) -> Case:
    """An encoder of transformers with its masked-token head, which is tied to the embedding."""
    return Case(name, hf(f"{family}ForMaskedLM", f"{family}Config", BERT, config), (blocks,))


def classifier(name: str, builder: Callable[[], nn.Module], blocks: str, inputs: Callable) -> Case:
    """An encoder of transformers that gives a class to each row."""
    return Case(name, builder, (blocks,), ("classifier.weight",), inputs)


def plain(name: str, build: Callable[[], nn.Module], blocks: str, *heads: str, raw: bool = False) -> Case:
    """A model written with torch alone."""
    return Case(name, build, (blocks,), heads, only_ids, next_ids_loss, raw)


CASES: tuple[Case, ...] = (
    gpt_like("gpt2", "GPT2", "GPT2LMHeadModel"),
    llama_like("llama", "Llama"),
    llama_like("mistral", "Mistral", sliding_window=8),
    llama_like("qwen2", "Qwen2"),
    llama_like("qwen3", "Qwen3", head_dim=32),
    llama_like("gemma2", "Gemma2", heads=(), head_dim=32, sliding_window=8),
    llama_like("phi3", "Phi3", original_max_position_embeddings=64),
    Case(
        "opt",
        hf("OPTForCausalLM", "OPTConfig", LM, ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH, dropout=0.0),
        ("model.decoder.layers",),
    ),
    Case("gpt_neox", hf("GPTNeoXForCausalLM", "GPTNeoXConfig", LM), ("gpt_neox.layers",), ("lm_head.weight",)),
    gpt_like("gptj", "GPTJ", "GPTJForCausalLM", ("lm_head.weight",), rotary_dim=16),
    classifier("bert", hf("BertForSequenceClassification", "BertConfig", BERT), "bert.encoder.layer", sentence),
    masked("roberta", "Roberta", "roberta.encoder.layer"),
    classifier(
        "distilbert",
        hf("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, DISTIL_NO_DROP),
        "distilbert.transformer.layer",
        sentence,
    ),
    Case(
        "t5",
        hf("T5ForConditionalGeneration", "T5Config", T5, SPECIAL, dropout_rate=0.0),
        ("encoder.block", "decoder.block"),
    ),
    classifier(
        "vit",
        hf("ViTForImageClassification", "ViTConfig", BERT, image_size=32, patch_size=8),
        "vit.layers",
        image,
    ),
    Case(
        "whisper",
        hf(
            *("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, SPECIAL),
            max_source_positions=16,
            max_target_positions=32,
        ),
        ("model.encoder.layers", "model.decoder.layers"),
        inputs=speech,
    ),
    masked("albert", "Albert", "albert.encoder.albert_layer_groups", embedding_size=64, num_hidden_groups=1),
    plain("torch_encoder", Encoder, "encoder.layers", "head.weight"),
    plain("tiny_gpt", lambda: TinyGPT(TinyBlock), "blocks"),
    plain("raw_gpt", lambda: TinyGPT(RawBlock), "blocks", raw=True),
)
