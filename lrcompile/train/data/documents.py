"""What of a row is trained on, and which part of it is held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lrcompile.errors import TrainError
from lrcompile.train.data.sources import Row

TEXT, PROMPTS = "text", "prompts"
_FIELDS = {TEXT: {"text": "text"}, PROMPTS: {"prompt": "prompt", "completion": "completion"}}
_NAME = re.compile(r"\{(\w+)\}")
# A document is tokenised in one piece, which takes some hundred bytes a token.
_LONGEST = 1 << 28
# The cut between training and held-out text moves back to a line or word break no further away than this.
_SEARCH = 200


@dataclass(frozen=True)
class Piece:
    """Text on its way to a shard.

    Attributes:
        held_out: whether it belongs to the validation part.
        text: the document, or the completion.
        prompt: what the completion answers; None for plain text.
    """

    held_out: bool
    text: str
    prompt: str | None = None

    def __len__(self) -> int:
        return len(self.text) + len(self.prompt or "")


@dataclass(frozen=True)
class Reading:
    """How rows become pieces.

    Attributes:
        kind: "text" or "prompts".
        fields: role ("text", or "prompt" and "completion") -> the row's field.
        template: the prompt as it is given to the model: {name} stands for a field, {prompt} for the prompt field.
        validation: share held out, in [0, 1).

    Raises:
        TrainError: an unknown kind or role, a share outside its range, or a template for plain text.
    """

    kind: str = TEXT
    fields: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    validation: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise TrainError(f"kind {self.kind!r} is unknown; known are {', '.join(_FIELDS)}")
        roles = _FIELDS[self.kind]
        if unknown := [role for role in self.fields if role not in roles]:
            raise TrainError(f"kind {self.kind!r} has no role {unknown[0]!r}; fields= may name {', '.join(roles)}")
        if not 0 <= self.validation < 1:
            raise TrainError(f"validation is the share held out, in [0, 1), got {self.validation}")
        if self.template is not None:
            if self.kind != PROMPTS:
                raise TrainError('a template belongs to kind="prompts"')
            if not _NAME.search(self.template):
                raise TrainError(f"the template {self.template!r} names no field; write one as {{prompt}}")
        object.__setattr__(self, "fields", {**roles, **self.fields})

    @property
    def needed(self) -> list[str]:
        """The fields that a row must have."""
        named = _NAME.findall(self.template) if self.template else []
        return list(dict.fromkeys([*self.fields.values(), *(n for n in named if n != "prompt")]))

    def pieces(self, row: Row) -> list[Piece]:
        """One or two pieces; none of a blank text.

        Of plain text the last `validation` of every document's characters is held out, cut at a line or word break. Of
        prompts whole rows are, as their source says, else by a hash of the prompt: equal prompts are always on the same side,
        whatever their number and order, so that none is trained on and then asked.

        Raises:
            TrainError: a field is no text, or is empty where it must not be.
        """
        if self.kind == TEXT:
            return self._text_pieces(self._text(row, self.fields["text"]), row.where)
        prompt = self._text(row, self.fields["prompt"])
        completion = self._text(row, self.fields["completion"])
        if self.template is not None:
            own = {"prompt": self.fields["prompt"]}
            prompt = _NAME.sub(lambda m: self._text(row, own.get(m[1], m[1])), self.template)
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not text:
                raise TrainError(f"{row.where}: the {name} is empty")
        held_out = row.held_out
        if held_out is None:
            digest = hashlib.sha256(prompt.encode()).digest()
            held_out = int.from_bytes(digest[:8], "big") < self.validation * 2**64
        return [Piece(held_out, completion, prompt)]

    def _text_pieces(self, text: str, where: str) -> list[Piece]:
        if len(text) > _LONGEST:
            raise TrainError(
                f"{where}: a document of {len(text):,} characters is too long to tokenise at once; give separator="
            )
        if not text.strip():
            return []
        cut = len(text) - round(self.validation * len(text))
        if cut < len(text):
            start = max(0, cut - _SEARCH)
            cut = next((p for p in (text.rfind(mark, start, cut) for mark in "\n ") if p > 0), cut)
        return [Piece(held, part) for held, part in ((False, text[:cut]), (True, text[cut:])) if part]

    def _text(self, row: Row, name: str) -> str:
        value = row.values[name]
        if not isinstance(value, str):
            found = "null" if value is None else type(value).__name__
            raise TrainError(f"{row.where}: the field {name!r} must be text, it is {found}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TrainError(
                f"{row.where}: the field {name!r} has half a surrogate pair at character {error.start}"
            ) from error
        return value
