"""A causal language model with its keys and values in buffers: the program that a phone runs, prompt and tokens alike.

transformers has such a wrapper of its own (TorchExportableModuleWithStaticCache), but its attention over the whole of the
cache, spelled in plain operators, copies the cache at every token. Here the attention is ExecuTorch's own: `llama::
update_cache` writes the new keys and values in place, `llama::custom_sdpa` looks at no more than what is written. It comes
in by transformers' registry of attention functions, so that the model's code stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lrcompile.errors import ExportError

NAME = "lrcompile_executorch"
# What an attention may ask for that custom_sdpa has not.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window")


class Cached(nn.Module):
    """The model, with `max_length` places for keys and values.

    Args:
        model: of transformers, causal, in fp32, its attention by transformers' interface.
        max_length: tokens of prompt and answer together.

    Raises:
        ExportError: an attention that can't be exported (named).
    """

    def __init__(self, model: Any, max_length: int) -> None:
        super().__init__()
        config = model.config.get_text_config()
        _refuse(model, config, max_length)
        self.model, self.max_length = model, max_length
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = config.num_hidden_layers
        for i in range(self.layers):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{i}", torch.zeros(1, max_length, heads, width), persistent=False)

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """tokens (1, n) int64, position (1,) int64 of the first of them -> logits of the last, (1, vocabulary) fp32."""
        start: Any = position[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.max_length)
        layers = [_Layer(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), start) for i in range(self.layers)]
        places = torch.arange(tokens.shape[1])[None] + position
        with _attention(self.model):
            out = self.model(
                input_ids=tokens,
                position_ids=places,
                past_key_values=Cache(layers=layers),
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1]


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (1, max_length, heads, width), as ExecuTorch's operators have them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        super().__init__()
        self.keys, self.values, self.start = keys, values, start
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(1, heads, n, width) each -> what `_attend` takes: the caches, marked with where the new ones begin."""
        assert self.keys is not None and self.values is not None
        torch.ops.llama.update_cache(key_states.transpose(1, 2), self.keys, self.start)
        torch.ops.llama.update_cache(value_states.transpose(1, 2), self.values, self.start)
        return _Started(self.keys, self.start), self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[1]


class _Started:
    """The cached keys on their way through the model's code to the attention, which alone looks at them."""

    def __init__(self, keys: torch.Tensor, start: int) -> None:
        self.keys, self.start = keys, start


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    asked = [name for name in _UNKNOWN if more.get(name) is not None]
    if asked or not isinstance(key, _Started):
        what = f"wants {', '.join(asked)}" if asked else "changes its keys after they are cached"
        raise ExportError(f"the attention of {type(module).__name__} {what}: ExecuTorch's custom_sdpa can't do that")
    out = torch.ops.llama.custom_sdpa(query.transpose(1, 2), key.keys, value, key.start, None, 0.0, True, scaling)
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """custom_sdpa is causal by itself."""


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    registries: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (ALL_ATTENTION_FUNCTIONS, _attend),
        (ALL_MASK_ATTENTION_FUNCTIONS, _no_mask),
    )
    for registry, function in registries:
        registry.register(NAME, function)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, kind in before:
            config._attn_implementation_internal = kind


def _refuse(model: Any, config: Any, max_length: int) -> None:
    kind = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ExportError(
            f"the attention of {kind} is not by transformers' interface: its keys can't be cached in a file"
        )
    limit = getattr(config, "max_position_embeddings", None) or max_length
    if not 2 <= max_length <= limit:
        raise ExportError(f"--max-length {max_length}: {kind} has positions for 2 to {limit} tokens")
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and windowed and getattr(config, "use_sliding_window", True) and window < max_length:
        raise ExportError(f"{kind} attends in windows of {window} tokens; give --max-length {window} or less")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ExportError(f"{kind} has layers of {', '.join(sorted(others))}: only attention can be exported")
