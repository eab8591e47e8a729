"""lm-eval's view of what gives the logits of the last token alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lrcompile.errors import EvalError, ExportError

pytest.importorskip("transformers", reason="what is scored is transformers'")
pytest.importorskip("lm_eval", reason="the evaluation is lm-eval's")
from lrcompile.export.runtime import Eager  # noqa: E402
from lrcompile.export.score import PhoneLM  # noqa: E402

from ..tasks.helpers import tiny_tokenizer  # noqa: E402

ROOM = 12


def eager(ends: Any = None) -> Any:
    """What says token + 1; room for 12 tokens."""
    config = SimpleNamespace(vocab_size=128, eos_token_id=3)
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=ends))

    class Cached:
        max_length = ROOM

        def __call__(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 128, 128).float()

    cached: Any = Cached()
    cached.model = model
    return Eager(cached)


def view(*, end: str | None, first: str | None = None, ends: Any = None) -> PhoneLM:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.bos_token = end, first
    return PhoneLM(eager(ends), tokenizer)


def test_the_end_token() -> None:
    letter = tiny_tokenizer().convert_tokens_to_ids("a")
    assert view(end="a").eot_token_id == view(end="a").prefix_token_id == letter
    assert view(end="b", first="a").prefix_token_id == letter
    assert view(end=None, ends=[7, 8]).eot_token_id == 7
    model = view(end=None)
    assert model.eot_token_id == 3  # the config's
    model.model.ends = []
    with pytest.raises(EvalError, match="neither the tokenizer nor the model has an end token.*eos_token"):
        _ = model.eot_token_id


def test_the_ends_are_the_generation_configs() -> None:
    assert (eager([5, 6]).ends, eager(4).ends, eager().ends) == ([5, 6], [4], [3])


def test_an_answer_ends_with_the_cache_and_a_longer_prompt_is_an_error() -> None:
    model = view(end=None)

    def said(length: int) -> str:
        how = {"until": ["\n"], "max_gen_toks": 40}
        return model.generate_until([SimpleNamespace(args=("a" * length, how))])[0]

    assert len(model.tok_encode("a" * 10)) == 10
    assert len(model.tok_encode(said(10))) == 3 and len(model.tok_encode(said(ROOM))) == 1
    with pytest.raises(ExportError, match="13 tokens don't fit into the 12 .*without --quantise"):
        said(13)


def test_tokens_that_are_none() -> None:
    model = eager()
    for tokens, told in [([1, -2], "token -2 is none"), ([128], "token 128 is none"), ([], "no tokens")]:
        with pytest.raises(ExportError, match=told):
            model.logits(tokens, 0)
