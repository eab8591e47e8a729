"""A model as an ExecuTorch program for XNNPACK: torch.export, lowered, checked against the runtime's operators, written."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lrcompile.errors import ExportError, MissingLibraryError
from lrcompile.export.budget import too_large, weigh
from lrcompile.export.quantise import FORMATS, GROUP, quantise, refuse_widths
from lrcompile.export.rewrite import rewrite
from lrcompile.export.tie import share_tied
from lrcompile.export.unfold import Pair, unfold

EXTRA = "pip install 'lrcompile[executorch]'"


class Exported(NamedTuple):
    """What was written: the file, its bytes, how many pairs are in it, and the eager model that it computes like."""

    path: Path
    nbytes: int
    pairs: int
    eager: Any


def export_executorch(
    model: Any,
    path: str | os.PathLike[str],
    *,
    form: str = "8da4w",
    max_length: int = 512,
    max_bytes: int | None = None,
) -> Exported:
    """Write a causal language model of transformers as a file that ExecuTorch runs.

    The file has a method `forward(tokens (1, n) int64, position (1,) int64) -> logits (1, vocabulary) fp32`, of the last
    token, which keeps the keys and values of what it was given before; n may be anything up to `max_length`. Constant methods
    tell the rest by the names that ExecuTorch's own language model runner reads (get_vocab_size, get_max_seq_len, get_eos_ids,
    …), and lrcompile_format.

    Args:
        model: adopted or dense; it is changed into plain quantised modules in place. Low-rank pairs stay pairs.
        path: ends in .pte; appears whole, or not at all.
        form: "8da4w", "int8" or "none", see quantise.py.
        max_length: tokens of prompt and answer together.
        max_bytes: refuse a larger file.

    Raises:
        ExportError: too large (told before the work where it is clear), an operator that the runtime lacks, an attention or a
            shape that can't be exported.
        MissingLibraryError: executorch or torchao is not installed.
    """
    path = check_path(path)
    if form not in FORMATS:
        raise ExportError(f"no format {form!r}; there are {', '.join(FORMATS)}")
    exir = require()
    _refuse_other_kinds(model)
    meta = _metadata(model, form, max_length)
    with torch.no_grad(), quietly():
        cached = as_exported(model, form, max_length, max_bytes=max_bytes)
        pairs = sum(isinstance(module, Pair) for module in model.modules())
        data = _lower(exir, cached, meta)
    if max_bytes is not None and len(data) > max_bytes:
        raise ExportError(f"the file has {len(data)} bytes, {len(data) - max_bytes} over --max-bytes {max_bytes}")
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole.write_bytes(data)
        os.replace(whole, path)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise ExportError(f"can't write {path}: {error.strerror}") from error
    return Exported(path, len(data), pairs, cached)


def check_path(path: str | os.PathLike[str]) -> Path:
    """Where a file is to be written.

    Raises:
        ExportError: another kind of name, or no such folder.
    """
    path = Path(path)
    if path.suffix != ".pte" or not path.absolute().parent.is_dir():
        raise ExportError(f"can't write {path}: give a name that ends in .pte, in a folder that is there")
    return path


def as_exported(model: Any, form: str, max_length: int, *, max_bytes: int | None = None) -> Any:
    """The eager model that a file computes like (`cached.Cached`); arguments and errors are `export_executorch`'s."""
    require()
    _refuse_other_kinds(model)
    from lrcompile.export.cached import Cached

    with torch.no_grad(), quietly():
        unfold(nn.Module.float(model).eval(), multiple=GROUP if form == "8da4w" else 1)
        refuse_widths(model, form)  # before its bytes, which would be of another format
        expected = weigh(model, form).total
        if max_bytes is not None and expected > max_bytes:
            raise ExportError(f"the file would have {too_large(model, form, max_bytes, expected)}")
        cached = Cached(model, max_length)
        _check_cached(cached)
        quantise(model, form)
    return cached


def require() -> Any:
    """executorch.exir, with the operators of language models registered in torch.

    Raises:
        MissingLibraryError: naming the extra.
    """
    try:
        with quietly():
            import torchao.quantization  # noqa: F401
            from executorch import exir
            from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  # embedding_byte, _4bit
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            from executorch.kernels import quantized  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(f"exporting to ExecuTorch needs executorch and torchao: {EXTRA} ({error})") from error
    return exir


def _refuse_other_kinds(model: Any) -> None:
    """Encoders too: with one layer, the last token's logits are a causal model's, and the check of the cache is blind."""
    causal = all(getattr(module, "is_causal", None) is not False for module in model.modules())
    if not (causal and getattr(model, "can_generate", lambda: False)()):
        raise ExportError(
            f"{type(model).__name__} is no causal language model of transformers: nothing else can be exported"
        )


def _metadata(model: Any, form: str, max_length: int) -> dict[str, Any]:
    config = model.config.get_text_config()
    first = config.bos_token_id if isinstance(config.bos_token_id, int) else -1
    return {
        "get_vocab_size": config.vocab_size,
        "get_max_seq_len": max_length,
        "get_max_context_len": max_length,
        "get_bos_id": first,
        "get_eos_ids": end_tokens(model),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "lrcompile_format": form,
    }


def end_tokens(model: Any) -> list[int]:
    """What ends an answer of a model: its generation's tokens, or else its config's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = getattr(model.config.get_text_config(), "eos_token_id", None) if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _check_cached(cached: Any) -> None:
    """The model with its cache computes what the model alone does: a prompt in two parts."""
    model, length = cached.model, min(6, cached.max_length)
    ids = torch.arange(1, length + 1)[None] % model.config.get_text_config().vocab_size
    want = model(input_ids=ids, use_cache=False).logits[:, -1]
    try:
        cached(ids[:, :1], torch.tensor([0]))
        found = cached(ids[:, 1:], torch.tensor([1]))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{type(model).__name__} can't be run with keys in a cache: {_first_line(error)}") from error
    off = (found - want).abs().max() / want.abs().max().clamp_min(1e-6)
    if not off < 1e-3:
        raise ExportError(
            f"{type(model).__name__} computes something else with its keys in a cache (off by {off:.2g}); layers "
            "that are one module have one cache: give each a copy"
        )


def _lower(exir: Any, cached: Any, meta: dict[str, Any]) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    length = torch.export.Dim("length", min=1, max=cached.max_length)
    example = (torch.ones(1, min(3, cached.max_length), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    try:
        program = rewrite(torch.export.export(cached, example, dynamic_shapes=({1: length}, None), strict=False))
    except Exception as error:
        raise ExportError(f"torch.export can't trace the model: {_first_line(error)}") from error
    try:
        edge = exir.to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            # Its check wants core operators alone; which of those left the runtime has is checked below, with their sites.
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=meta,
        )
    except Exception as error:
        raise ExportError(f"ExecuTorch can't lower the model: {_first_line(error)}") from error
    del program
    _refuse_lacking(edge.exported_program().graph_module)
    config = exir.ExecutorchBackendConfig(sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass())
    try:
        return share_tied(bytes(edge.to_executorch(config).buffer))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"ExecuTorch can't write the program: {_first_line(error)}") from error


def _refuse_lacking(graph: torch.fx.GraphModule) -> None:
    """Refuse operators outside XNNPACK that the runtime has no kernel for, by the modules that they come from."""
    from executorch.extension.pybindings.portable_lib import _get_operator_names

    known = {name.partition(".")[0] for name in _get_operator_names()}
    lacking: dict[str, str] = {}
    for node in graph.graph.nodes:
        if type(node.target).__name__ != "EdgeOpOverload":  # an operator of ExecuTorch's dialect; others are primitives
            continue
        op = node.target._schema.name
        if op not in known:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            lacking.setdefault(op, stack[-1][0].removeprefix("model.") if stack else "the model itself")
    if lacking:
        told = ", ".join(f"{op} (in {site})" for op, site in lacking.items())
        raise ExportError(f"ExecuTorch's runtime has no kernel for {told}; write it in operators of ATen's core set")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quietly() -> Iterator[Callable[[], str]]:
    """What ExecuTorch, torchao and torch tell of themselves is no news to who exports a model; gives the last line of it.

    ExecuTorch's C++ writes to the file descriptor, so that is what is kept aside.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "executorch", "root")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(aside.fileno(), 2)

        def last_line() -> str:
            aside.seek(0)
            lines = aside.read().decode(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")

        try:
            yield last_line
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
