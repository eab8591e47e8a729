"""Labels by their log-likelihood after the prompt, as lm-eval scores them: no text is generated.

The score of a label is Σ log p over its tokens, given the prompt and the label's earlier tokens; the largest wins. A prompt
is run once, and the further tokens of the labels on its cached keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .methods import Subject
from .tasks import Row, Task


@dataclass(frozen=True)
class Scores:
    """Accuracy and macro-F1 in [0, 1]; nll: of the right label among the labels, mean, in nats."""

    accuracy: float
    macro_f1: float
    nll: float


def pad(sequences: list[list[int]]) -> Tensor:
    """(sequences, longest) int64, zeros on the right: causal attention never looks there."""
    longest = max(map(len, sequences))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])


def training_loss(subject: Subject, rows: list[Row], labels: tuple[str, ...]) -> tuple[Tensor, int]:
    """Mean negative log-likelihood of the label's tokens, and how many tokens went through the model, padding too.

    The head runs on the positions that predict a label alone.
    """
    prompts = [subject.encode(row.prompt) for row in rows]
    answers = [subject.encode(labels[row.label]) for row in rows]
    ids = pad([p + a for p, a in zip(prompts, answers, strict=True)])
    where = [(n, len(p) + j - 1) for n, (p, a) in enumerate(zip(prompts, answers, strict=True)) for j in range(len(a))]
    targets = torch.tensor([token for answer in answers for token in answer])
    with subject.autocast():
        hidden = subject.backbone(input_ids=ids, use_cache=False).last_hidden_state
        logits = subject.head(hidden[[n for n, _ in where], [at for _, at in where]])
    return F.cross_entropy(logits.float(), targets), ids.numel()


@torch.no_grad()
def label_scores(subject: Subject, prompts: list[str], labels: tuple[str, ...]) -> Tensor:
    """Σ log p of every label after every prompt, (prompts, labels) fp32."""
    tokens = [subject.encode(label) for label in labels]
    encoded = [subject.encode(prompt) for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in encoded])
    longer = max(map(len, tokens)) > 1
    with subject.autocast():
        out = subject.backbone(input_ids=pad(encoded), use_cache=longer)
    hidden = out.last_hidden_state[torch.arange(len(prompts)), lengths - 1]
    first = _log_softmax(subject, hidden)[:, [ids[0] for ids in tokens]]
    return first + _further(subject, out.past_key_values, lengths, tokens) if longer else first


def _further(subject: Subject, cache: Any, lengths: Tensor, tokens: list[list[int]]) -> Tensor:
    """Σ log p of the labels' tokens from the second on, (prompts, labels): every label after every cached prompt."""
    prompts, count = len(lengths), len(tokens)
    given, wanted = pad([ids[:-1] or [0] for ids in tokens]), pad([ids[1:] or [0] for ids in tokens])
    kept = pad([[1] * (len(ids) - 1) or [0] for ids in tokens])
    cache.batch_repeat_interleave(count)
    longest, extra = int(lengths.max()), given.shape[1]
    seen = (torch.arange(longest) < lengths[:, None]).long().repeat_interleave(count, 0)
    mask = torch.cat([seen, torch.ones(prompts * count, extra, dtype=torch.long)], 1)
    positions = lengths.repeat_interleave(count)[:, None] + torch.arange(extra)
    with subject.autocast():
        hidden = subject.backbone(
            input_ids=given.repeat(prompts, 1),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    found = _log_softmax(subject, hidden).gather(-1, wanted.repeat(prompts, 1)[..., None])[..., 0] * kept.repeat(
        prompts, 1
    )
    return found.sum(1).view(prompts, count)


def _log_softmax(subject: Subject, hidden: Tensor) -> Tensor:
    """log p of every token, in float32 throughout: bfloat16 logits of 20 are 0.125 apart, and labels would tie."""
    return F.linear(hidden.float(), subject.head.weight.float()).log_softmax(-1)


def evaluate(subject: Subject, rows: list[Row], labels: tuple[str, ...], batch_size: int) -> Scores:
    """Scores over rows, which are run in the order of their lengths."""
    subject.model.eval()
    rows = sorted(rows, key=lambda row: len(row.prompt))
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    scores = torch.cat([label_scores(subject, [row.prompt for row in part], labels) for part in parts])
    truth = torch.tensor([row.label for row in rows])
    return score(scores, truth)


def score(scores: Tensor, truth: Tensor) -> Scores:
    """From (rows, labels) log-likelihoods and (rows,) label numbers. F1 is meaned over the labels that occur in the truth."""
    said = scores.argmax(1)
    f1 = []
    for label in truth.unique().tolist():
        hit = int(((said == label) & (truth == label)).sum())
        f1.append(2 * hit / int((said == label).sum() + (truth == label).sum()))
    nll = F.cross_entropy(scores, truth)
    return Scores(float((said == truth).double().mean()), sum(f1) / len(f1), float(nll))


def commonest(task: Task) -> Scores:
    """What saying the commonest label of the training side every time would score: the floor to look at figures from."""
    counts = torch.bincount(torch.tensor([row.label for row in task.train]), minlength=len(task.labels))
    return score((counts + 0.5).log().expand(len(task.test), -1), torch.tensor([row.label for row in task.test]))
