"""The model that is evaluated, and its tokenizer, from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lrcompile.errors import EvalError, MissingLibraryError
from lrcompile.sources import load_source
from lrcompile.weights.adapters import ADAPTER, load_adapter
from lrcompile.weights.peft_load import load_peft
from lrcompile.weights.state import MODEL, load

_SAVED = "a directory that lrcompile.save wrote"
_PEFT = "adapter_config.json"


def load_model(
    source: str,
    *,
    base: str | None = None,
    adapter: str | None = None,
    tokenizer: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """A causal language model, frozen and in evaluation mode, and its tokenizer.

    Args:
        source: a Hugging Face model directory or GGUF file with its tokenizer beside it, or what lrcompile.save wrote.
        base: for the last of them, the dense model that it belongs to, with its tokenizer: a directory, a GGUF file, or a
            config.json alone, since every value is saved.
        adapter: what peft saved, beside a dense model; or what lrcompile.save_adapter wrote, beside what lrcompile.save
            wrote before training: its bases must be the same to the bit.
        tokenizer: a directory with another tokenizer's files.
        device: where to.
        dtype: to compute in; None: the model's own. Quantised weights stay as they are stored.

    Raises:
        LrcompileError: there is no such model, or it can't be read.
        EvalError: one of the others is missing or is something else, or the model is no causal language model.
        StateError: what was saved is damaged or belongs to another model.
    """
    base = base or _own_base(source)
    model = load_weights(source, base=base, adapter=adapter, device=device)
    if dtype is not None:
        for p in model.parameters():  # not model.to: rotary frequencies are buffers, and wrong when rounded
            if p.is_floating_point():
                p.data = p.data.to(dtype)
    return model, load_tokenizer(tokenizer or base or source)


def load_weights(
    source: str, *, base: str | None = None, adapter: str | None = None, device: str | torch.device = "cpu"
) -> Any:
    """The model alone, as `load_model` gives it; also of a module:factory."""
    saved = is_adopted(source)
    base = base or _own_base(source)
    if saved and base is None:
        raise EvalError(f"{source} holds adopted weights alone: say with --base which dense model they belong to")
    if base is not None and not saved:
        raise EvalError(f"--base goes with {_SAVED}, and {source} is none")
    dense = source if base is None else base
    model, inputs = _dense(dense, bare=saved)
    if saved:
        load(source, model)
    if adapter is not None:
        if (Path(adapter) / ADAPTER.index).is_file():
            if not saved:
                raise EvalError(
                    f"{adapter} was saved by lrcompile.save_adapter and needs its bases: give as MODEL {_SAVED}, of the "
                    "adopted model before or after it was trained"
                )
            load_adapter(model, adapter)
        elif (Path(adapter) / _PEFT).is_file():
            if saved:
                raise EvalError(f"{adapter} is peft's and goes with a dense model; {source} is adopted already")
            load_peft(model, adapter, inputs)
        else:
            raise EvalError(
                f"{adapter} holds no adapter: neither {ADAPTER.index} (lrcompile.save_adapter) nor {_PEFT} (peft)"
            )
    return model.requires_grad_(False).eval().to(device)


def is_adopted(source: str) -> bool:
    """Whether lrcompile.save wrote it."""
    return (Path(source) / MODEL.index).is_file()


def _own_base(source: str) -> str | None:
    """The config that `lrcompile export --to hf --factored` writes beside the values."""
    config = Path(source) / "dense" / "config.json"
    return str(config) if is_adopted(source) and config.is_file() else None


def _dense(source: str, bare: bool) -> tuple[Any, Any]:
    """bare: values come later, a config.json is enough."""
    path = Path(source)
    if path.suffix == ".json" and path.is_file() and not bare:
        raise EvalError(f"{source} has no weights; give a Hugging Face model directory, a GGUF file or {_SAVED}")
    # Not on meta: buffers that no state dict holds, such as rotary frequencies, would stay there.
    model, inputs = load_source(source, device=None)
    if not getattr(model, "can_generate", lambda: False)():
        raise EvalError(f"{source} is no causal language model: it is a {type(model).__name__}")
    return model, inputs


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a directory or GGUF file, or beside a file.

    Raises:
        EvalError: there is none.
        MissingLibraryError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingLibraryError(f'this needs transformers: pip install "lrcompile[hf]" ({error})') from error

    path = Path(source)
    if not path.exists():  # its parent, where another tokenizer may lie, isn't what was meant
        raise EvalError(
            f"no tokenizer can be read from {source}: it doesn't exist; give its directory with --tokenizer"
        )
    gguf = path.name if path.suffix == ".gguf" else None
    folder = path if path.is_dir() else path.parent
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise EvalError(
            f"no tokenizer can be read from {source}: give its directory with --tokenizer ({error})"
        ) from error
