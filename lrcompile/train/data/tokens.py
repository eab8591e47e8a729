"""Tokenizers: bytes, or whatever a tokenizer.json says; the fingerprint by which a changed one is noticed.

A tokenizer read from elsewhere (a GGUF file, an older Hugging Face directory) is turned into its tokenizer.json as well,
so that what lies beside the shards is always enough to decode them. Local files only, and no code that comes with them is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.files import commit

KINDS = '"bytes", a tokenizer.json or a directory that holds one, a Hugging Face directory, a GGUF file, or "bpe:SIZE"'
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
BPE_END = "<|end|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        end: id of the token that ends a document.
        vocab_size: ids lie in [0, vocab_size).
        fingerprint: sha256 of the serialised tokenizer and its end token.
    """

    end: int
    vocab_size: int
    fingerprint: str

    @abstractmethod
    def encode(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Token ids of each text, one integer array a text, with nothing added before or after.

        Args:
            texts: each is tokenised by itself.
            special: read the names of special tokens in a text as these tokens (chat markers in a prompt); else they
                are ordinary text, so that a document can't end another one.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text; special tokens leave nothing."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs. Nothing for bytes, which the index names."""

    def describe(self) -> dict[str, Any]:
        """What an index says of it."""
        kind = "bytes" if isinstance(self, Bytes) else "json"
        return {"kind": kind, "fingerprint": self.fingerprint, "end": self.end, "vocab_size": self.vocab_size}


class Bytes(Tokenizer):
    """UTF-8 bytes, and 256 as the end."""

    end, vocab_size = 256, 257
    fingerprint = hashlib.sha256(b"bytes, 256 ends").hexdigest()

    def encode(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        pass


class Json(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, library_tokenizer: Any, end_token: str) -> None:
        inner = library_tokenizer
        # Sentence encoders ship with both switched on: every document would be cut or padded to 128 tokens.
        inner.no_padding()
        inner.no_truncation()
        end = inner.token_to_id(end_token)
        if end is None:
            raise TrainError(
                f"the tokenizer has no token {end_token!r}; end_token must name one it has{_specials(inner)}"
            )
        self._inner, self._end_token = inner, end_token
        self.end = int(end)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self._text = inner.to_str()
        self.fingerprint = _fingerprint(self._text, end_token)

    def encode(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        self._inner.encode_special_tokens = not special
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int64) for e in found]

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._inner.decode([int(t) for t in tokens], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_token}
        for name, text in ((SETTINGS, json.dumps(settings, indent=1)), (FILE, self._text)):
            commit(folder / name, text.encode())


def load_tokenizer(source: str | os.PathLike[str], end_token: str | None = None) -> Tokenizer:
    """The tokenizer that an argument means.

    Args:
        source: "bytes"; a tokenizer.json, or a directory that holds one; a directory that transformers reads; a GGUF
            file, or a directory that holds one; a directory of prepared shards.
        end_token: name of the token that ends a document, where the files don't say (their eos_token), or to overrule them.

    Raises:
        TrainError: nothing there that can be read as a tokenizer, or it has no end token.
        MissingLibraryError: tokenizers, transformers or gguf is missing.
    """
    if str(source) == "bytes":
        if end_token is not None:
            raise TrainError('the tokenizer "bytes" has an end of its own (256); leave end_token out')
        return Bytes()
    path = Path(source)
    if path.is_dir():
        if _names_bytes(path):
            return Bytes()
        if (path / FILE).is_file():
            path = path / FILE
    if path.is_file() and path.suffix == ".json":
        try:
            inner = _library("tokenizers").Tokenizer.from_file(str(path))
        except MissingLibraryError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TrainError(f"{path} is no tokenizer.json: {error}") from error
        return Json(inner, end_token or _declared_end(path.parent) or _no_end(path, inner))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return _from_transformers(path, end_token)
    raise TrainError(f"{source} is no tokenizer; give {KINDS}")


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens, the last of them the end; the same for the same texts in the same order.

    Raises:
        TrainError: fewer than 257 tokens asked for: every byte needs one, and the end.
    """
    if size < 257:
        raise TrainError(f"bpe:{size} is too small: 256 bytes and the end need 257 tokens")
    lib = _library("tokenizers")
    inner = lib.Tokenizer(lib.models.BPE())
    inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = lib.decoders.ByteLevel()
    alphabet = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
    trainer = lib.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([BPE_END])
    return Json(inner, BPE_END)


def saved_tokenizer(folder: Path, told: dict[str, Any]) -> Tokenizer:
    """The tokenizer that lies beside shards, the one that their index tells of.

    Raises:
        TrainError: it is gone or is another one.
    """
    if told["kind"] == "bytes":
        return Bytes()
    check_saved(folder, told)
    return load_tokenizer(folder / FILE)


def check_saved(folder: Path, told: dict[str, Any]) -> None:
    """Raise TrainError unless the tokenizer beside shards is byte for byte the one that their index tells of."""
    if told["kind"] == "bytes":
        return
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{folder / FILE} can't be read ({error}); prepare the data again") from error
    if _fingerprint(text, _declared_end(folder) or "") != told["fingerprint"]:
        raise TrainError(
            f"the tokenizer in {folder} is not the one its shards were made with (fingerprint "
            f"{told['fingerprint'][:12]}); put {FILE} and {SETTINGS} back, or prepare the data again"
        )


def _fingerprint(text: str, end_token: str) -> str:
    return hashlib.sha256(f"{end_token}\0{text}".encode()).hexdigest()


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f'this tokenizer needs {name}: pip install "lrcompile[train]" ({error})') from error


def _from_transformers(path: Path, end_token: str | None) -> Tokenizer:
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = path
    if path.is_file():
        folder, where["gguf_file"] = path.parent, path.name
    elif not (path / "config.json").is_file() and not (path / SETTINGS).is_file():
        files = sorted(p.name for p in path.glob("*.gguf"))
        if len(files) != 1:
            found = f"{len(files)} GGUF files: name one" if files else "no tokenizer"
            raise TrainError(f"{path} holds {found}; give {KINDS}")
        where["gguf_file"] = files[0]
    if "gguf_file" in where:
        _library("gguf")
    try:
        outer = _library("transformers").AutoTokenizer.from_pretrained(folder, **where)
    except MissingLibraryError:
        raise
    except Exception as error:  # whatever a checkpoint's files make transformers raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise TrainError(f"{path}: {lines[0] if lines else type(error).__name__}; give {KINDS}") from error
    inner = getattr(outer, "backend_tokenizer", None)
    if inner is None:
        raise TrainError(f"{path}: a {type(outer).__name__} has no tokenizer.json form; give a tokenizer that has one")
    return Json(inner, end_token or outer.eos_token or _no_end(path, inner))


def _names_bytes(folder: Path) -> bool:
    """Whether this is a directory of shards whose tokenizer is bytes."""
    try:
        return bool(json.loads((folder / "index.json").read_text(encoding="utf-8"))["tokenizer"]["kind"] == "bytes")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _declared_end(folder: Path) -> str | None:
    """The eos_token that the files beside a tokenizer.json name.

    Raises:
        TrainError: one of them is there and can't be read: it may name another.
    """
    for file in (folder / SETTINGS, folder / "special_tokens_map.json"):
        if not file.exists():
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise TrainError(f"{file} can't be read ({error}), which may name the end token; copy it again") from error
        if isinstance(told, dict):
            told = told.get("content")
        if isinstance(told, str):
            return told
    return None


def _no_end(path: Path, inner: Any) -> str:
    raise TrainError(
        f"{path} doesn't say which token ends a document (no eos_token beside it); name one by end_token= "
        f"(--end-token){_specials(inner)}"
    )


def _specials(inner: Any) -> str:
    names = [t.content for _, t in sorted(inner.get_added_tokens_decoder().items()) if t.special]
    return f": its special tokens are {', '.join(names[:12])}" + (" …" if len(names) > 12 else "") if names else ""
