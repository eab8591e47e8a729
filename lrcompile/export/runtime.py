"""ExecuTorch's CPU runtime: an exported file is loaded, asked what it is, and generates greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lrcompile.errors import ExportError
from lrcompile.export.lower import end_tokens, quietly, require


class Program:
    """A file that `lrcompile export --to executorch` wrote, loaded.

    Attributes:
        vocabulary, max_length: of the model, and of prompt and answer together.
        ends: tokens that end an answer.
        form: of its numbers.

    Raises:
        ExportError: no such file, damaged, or written by something else.
        MissingLibraryError: executorch is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        require()
        with quietly():
            from executorch.runtime import Runtime

        path = Path(path)
        if not path.is_file():
            raise ExportError(f"no such file: {path}")
        with open(path, "rb") as file:
            if (head := file.read(6)) and head[4:] != b"ET":  # the runtime would end the process
                raise ExportError(f"{path} is no ExecuTorch program that can be read: it begins with other bytes")
        with quietly() as last_line:
            try:
                self._program = Runtime.get().load_program(path)
                methods = set(self._program.method_names)
            except Exception as error:
                raise ExportError(
                    f"{path} is no ExecuTorch program that can be read: {last_line() or error}"
                ) from error
            if not {"forward", "lrcompile_format", "get_max_seq_len", "get_vocab_size", "get_eos_ids"} <= methods:
                raise ExportError(f"{path} was not written by lrcompile export: it has {', '.join(sorted(methods))}")
            sizes = [int(self._ask(f"get_{what}")[0]) for what in ("vocab_size", "max_seq_len")]
            self.vocabulary, self.max_length = sizes
            self.ends = [int(end) for end in self._ask("get_eos_ids")]
            self.form = str(self._ask("lrcompile_format")[0])
            try:
                self._forward = self._program.load_method("forward")
            except Exception as error:
                raise ExportError(f"this runtime can't load the model in {path}: {last_line() or error}") from error

    def _ask(self, method: str) -> Sequence[Any]:
        return self._program.load_method(method).execute([])

    def logits(self, tokens: Sequence[int], position: int) -> torch.Tensor:
        """Logits (vocabulary,) fp32 after these tokens, the first of which stands at `position`.

        Raises:
            ExportError: there is no place left for them, or they are no tokens of this model.
        """
        _check(
            self,
            tokens,
            position,
            "that the file has room for: shorten the prompt, or export with a larger --max-length",
        )
        given = [torch.tensor([list(tokens)]), torch.tensor([position])]
        return self._forward.execute(given)[0][0].clone()

    def generate(self, prompt: Sequence[int], limit: int | None = None, *, position: int = 0) -> Iterator[int]:
        """The likeliest next tokens, one by one, until an end token (which is given too), `limit` or the cache's end."""
        tokens = list(prompt)
        made = 0
        while limit is None or made < limit:
            token = int(self.logits(tokens, position).argmax())
            position += len(tokens)
            tokens, made = [token], made + 1
            yield token
            if token in self.ends or position >= self.max_length:
                return


def _check(model: Program | Eager, tokens: Sequence[int], position: int, room: str) -> None:
    if not tokens:
        raise ExportError("the prompt has no tokens; write something")
    if position + len(tokens) > model.max_length:
        raise ExportError(f"{position + len(tokens)} tokens don't fit into the {model.max_length} {room}")
    if (wrong := next((t for t in tokens if not 0 <= t < model.vocabulary), None)) is not None:
        raise ExportError(
            f"token {wrong} is none of the model's {model.vocabulary}: this is the tokenizer of another model"
        )


class Eager:
    """The eager model of a file (`lower.as_exported`), asked as a `Program` is."""

    def __init__(self, cached: Any) -> None:
        self.vocabulary = cached.model.config.get_text_config().vocab_size
        self._cached, self.max_length, self.ends = cached, cached.max_length, end_tokens(cached.model)

    def logits(self, tokens: Sequence[int], position: int) -> torch.Tensor:
        """As `Program.logits`."""
        room = "that a quantised model is evaluated with: shorten the prompt, or evaluate it without --quantise"
        _check(self, tokens, position, room)
        with torch.no_grad(), quietly():
            return self._cached(torch.tensor([list(tokens)]), torch.tensor([position]))[0]
