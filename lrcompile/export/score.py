"""An exported file, or the eager model of one, for lm-eval: a prompt is read once and its answers are tried after it."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from lrcompile.errors import EvalError


class PhoneLM(TemplateLM):
    """lm-eval's view of what gives the logits of the last token: `runtime.Program` or `runtime.Eager`.

    Args:
        model: what of a prompt it has read stays in its cache; what two prompts begin with is read once.
        tokenizer: of transformers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self._read: list[int] = []

    @property
    def eot_token_id(self) -> int:
        """The first end token: the tokenizer's, or else the model's.

        Raises:
            EvalError: there is none.
        """
        ends = [self.tokenizer.eos_token_id, *self.model.ends]
        if (end := next((end for end in ends if end is not None), None)) is None:
            raise EvalError(
                "neither the tokenizer nor the model has an end token, and an answer to no question is scored after one: "
                "name it in the tokenizer's files (eos_token)"
            )
        return int(end)

    @property
    def prefix_token_id(self) -> int:
        """What stands before an answer to no question: the begin token, as in lm-eval's own models, or else an end token."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **more))

    def _after(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities (vocabulary,) fp32 of what follows these tokens."""
        same = 0
        while same < min(len(self._read), len(tokens) - 1) and self._read[same] == tokens[same]:
            same += 1
        self._read = []  # should reading fail, nothing is known of the cache
        logits = self.model.logits(tokens[same:], same)
        self._read = list(tokens)
        return logits.float().log_softmax(-1)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        found, context, first = [], None, torch.empty(0)
        for _, before, answer in requests:
            if before != context:
                context, first = before, self._after(before)
            total, greedy, following = 0.0, True, first
            for n, token in enumerate(answer):
                total += float(following[token])
                greedy = greedy and int(following.argmax()) == token
                if n + 1 < len(answer):
                    following = self._after(before + answer[: n + 1])
            found.append((total, greedy))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in requests:
            prompt, how = request.args
            tokens, made, text = self.tok_encode(prompt), list[int](), ""
            stops = how["until"]
            while len(made) < how["max_gen_toks"] and not any(stop in text for stop in stops):
                if made and len(tokens) + len(made) > self.model.max_length:
                    break  # the cache's end ends an answer, as it does on a phone; a prompt beyond it is an error
                made.append(int(self._after(tokens + made).argmax()))
                if made[-1] in self.model.ends:
                    break
                text = self.tokenizer.decode(made, skip_special_tokens=True)
            found.append(text[: min((text.index(stop) for stop in stops if stop in text), default=None)])
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise EvalError(
            "an exported file gives the logits of the last token alone: no task here asks for a whole text's"
        )
