"""What the command line accepts as a model: a Hugging Face directory or config.json, a GGUF file, or module:factory.

Local files only: nothing is fetched, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompile.errors import LrcompileError

KINDS = "a Hugging Face model directory, a config.json, a GGUF file, or module:factory"
LENGTH = 32  # tokens in example inputs


def load_source(source: str, *, device: str | None = "meta") -> tuple[nn.Module, Any]:
    """The model that a command-line argument means, and inputs to call it with.

    Args:
        source: a directory or GGUF file of transformers (real weights), a transformers config.json (the model is built
            on the `meta` device: shapes alone), or "module:factory", a callable that returns (model, example_inputs).
        device: that a model of a config.json is built on; None: as the caller's context has it.

    Raises:
        LrcompileError: no such file, nothing that can be read as a model, transformers is missing, or the factory failed.
    """
    path = Path(source)
    if path.is_dir():
        return _from_directory(path)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_file() and path.suffix == ".json":
        return _from_config(path, device)
    if path.exists():
        raise LrcompileError(f"{source} is no model that can be read; give {KINDS}")
    if ":" in source and os.sep not in source:
        return _from_factory(source)
    raise LrcompileError(f"no such file or directory: {source}; give {KINDS}")


def token_count(example_inputs: Any) -> int | None:
    """Tokens in the example inputs, where there are any: FLOPs are given for one."""
    tensors = example_inputs.values() if hasattr(example_inputs, "values") else example_inputs
    first = next((x for x in tensors if isinstance(x, torch.Tensor)), None)
    return first.numel() if first is not None and first.dim() == 2 and not first.is_floating_point() else None


# --- module:factory ---------------------------------------------------------------------------------------------------


def _from_factory(source: str) -> tuple[nn.Module, Any]:
    module_name, _, name = source.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise LrcompileError(f"can't import {source}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise LrcompileError(f"{source} is no callable; it must return (model, example_inputs)")
    try:
        made = found()
    except Exception as error:
        raise LrcompileError(f"{source}() failed: {type(error).__name__}: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise LrcompileError(f"{source}() must return (model, example_inputs), got {type(made).__name__}")
    return made


# --- transformers -----------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise LrcompileError(f'this needs transformers: pip install "lrcompile[hf]" ({error})') from error


def _from_directory(path: Path) -> tuple[nn.Module, Any]:
    if not (path / "config.json").is_file():
        raise LrcompileError(f"{path} has no config.json; a Hugging Face model directory has one")
    tf = _transformers()
    config = _config(tf, path)
    model = _try(path, lambda: _class(tf, config).from_pretrained(path, dtype="auto", **_LOCAL))
    return model, example_inputs(model)


def _from_gguf(path: Path) -> tuple[nn.Module, Any]:
    tf = _transformers()
    if importlib.util.find_spec("gguf") is None:
        raise LrcompileError('a GGUF file needs gguf: pip install "lrcompile[hf]"')
    where = {"gguf_file": path.name, **_LOCAL}
    model = _try(path, lambda: tf.AutoModelForCausalLM.from_pretrained(path.parent, **where))
    # Its weights are numbers now; transformers goes on calling the model quantised, and would refuse to save it.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    return model, example_inputs(model)


def _from_config(path: Path, device: str | None) -> tuple[nn.Module, Any]:
    tf = _transformers()
    config = _config(tf, path)

    def build() -> Any:
        kind = _class(tf, config)
        with torch.device(device) if device else nullcontext():
            return kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)

    model = _try(path, build)
    return model, example_inputs(model)


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def _config(tf: Any, path: Path) -> Any:
    return _try(path, lambda: tf.AutoConfig.from_pretrained(path, **_LOCAL))


def _class(tf: Any, config: Any) -> Any:
    """The architecture that the config names; else the causal language model or plain model of its type."""
    for name in config.architectures or []:
        if hasattr(tf, name):
            return getattr(tf, name)
    for auto in (tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM, tf.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise LrcompileError(f"transformers has no model for a config of type {config.model_type!r}")


def _try(path: Path, load: Any) -> Any:
    try:
        return load()
    except LrcompileError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LrcompileError(f"{path}: {lines[0] if lines else type(error).__name__}") from error


def example_inputs(model: Any) -> dict[str, Any]:
    """Keyword inputs for a transformers model, made from its config: LENGTH tokens, one image, or one stretch of sound.

    Token ids are int64 (1, LENGTH); images fp32 (1, channels, height, width); features fp32 as the model's front end gives.
    """
    config = model.config
    accepted = _parameters(model)
    inputs: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    both = hasattr(config, "text_config") and hasattr(config, "vision_config") and not hasattr(model, "generate")
    for name in (main, "pixel_values" if both else main):
        inputs[name] = _INPUTS.get(name, _tokens)(config)
    if both and "input_ids" in accepted:
        inputs["input_ids"] = _tokens(config)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(config)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _parameters(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _get(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that the config, or a part of it, has."""
    parts = [
        config,
        *(getattr(config, p, None) for p in ("text_config", "vision_config", "audio_config", "encoder", "decoder")),
    ]
    for name in names:
        for part in parts:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return default


def _tokens(config: Any) -> torch.Tensor:
    limits = ("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length")
    length = min(LENGTH, _get(config, *limits, default=LENGTH))
    ids = torch.arange(1, length + 1) % max(2, _get(config, "vocab_size", default=2))
    # Some models pool at the end-of-text token, and look for it.
    end = _get(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < _get(config, "vocab_size", default=0):
        ids[-1] = end
    return ids[None]


def _image(config: Any) -> torch.Tensor:
    extent = _get(config, "image_size", "input_size", default=224)
    if isinstance(extent, dict):
        extent = (extent["height"], extent["width"])
    height, width = extent if isinstance(extent, (tuple, list)) else (extent, extent)
    return torch.zeros(1, _get(config, "num_channels", "in_channels", default=3), height, width)


def _mels(config: Any) -> torch.Tensor:
    bins = _get(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=80)
    frames = 2 * _get(config, "max_source_positions", default=750)
    by_channel = hasattr(config, "max_source_positions") and config.model_type == "whisper"
    return torch.zeros(1, bins, frames) if by_channel else torch.zeros(1, min(frames, 512), bins)


def _sound(config: Any) -> torch.Tensor:
    if getattr(config, "model_type", "") == "audio-spectrogram-transformer":
        return torch.zeros(1, config.max_length, config.num_mel_bins)
    return torch.zeros(1, 16000)


_INPUTS = {"input_ids": _tokens, "pixel_values": _image, "input_features": _mels, "input_values": _sound}
