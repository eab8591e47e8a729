"""Rows in the forms that the sets come in, written for the tests, and a tiny language model with its tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

WORDS = ("Sales", "a loss", "XYZ", "quarter", "it grew", "Nokia Oyj", "EUR 7")
MOODS = ("negative", "neutral", "positive")


def jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"context": context, "target": target}) for context, target in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def adapters(path: Path, rows: list[tuple[str, str]]) -> None:
    """LLM-Adapters' JSON."""
    items = [
        {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        for asked, answer in rows
    ]
    path.write_text(json.dumps(items, indent=4), encoding="utf-8")


def write_sets(folder: Path) -> None:
    """Every task's files, in a few rows, some of them a folder below."""
    (folder / "fpb").mkdir()
    lines = [f"{WORDS[n % 7]} of {WORDS[n % 5]} {WORDS[n % 4]} {n} .@{MOODS[n % 3]}" for n in range(60)]
    (folder / "fpb" / "Sentences_50Agree.txt").write_text("\n".join(lines), encoding="latin-1")
    body = "".join(f'"$A{n} up, ""so"" they say https://t.co/{n}",{n % 3}\n' for n in range(9))
    (folder / "tfns_valid.csv").write_text("text,label\n" + body, encoding="utf-8")
    (folder / "tfns_train.csv").write_text("text,label\n" + body + "Another tweet,2\n", encoding="utf-8")
    for kind in ("headline", "post"):
        scores = ("-0.3", "0.05", "0.1") if kind == "headline" else ("-0.1", "0.9")
        entries = {
            str(n): {"sentence": f"{kind} {n}", "info": [{"target": "X", "sentiment_score": s, "aspects": "[]"}]}
            for n, s in enumerate(scores)
        }
        entries["0"]["info"].append({"target": "Y", "sentiment_score": "0.5"})
        (folder / f"task1_{kind}_ABSA_test.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
    seven = "strong negative/moderately negative/mildly negative/neutral/mildly positive/moderately positive/strong positive"
    ask = "Instruction: What is the sentiment of this news? Please choose an answer from {%s}.\nInput: %s\nAnswer: "
    nwgi = [
        (ask % (seven, "It fell."), "moderately negative"),
        (ask % ("negative/neutral/positive", "It rose."), "positive"),
    ]
    jsonl(folder / "nwgi_test.jsonl", nwgi)
    ask = "Instruction: Does the news headline talk about price? Please choose an answer from {Yes/No}.\nInput: %s\nAnswer: "
    jsonl(
        folder / "headline_test.jsonl", [(ask % "Gold up", "Yes"), (ask % "Gold futures", "No"), (ask % "Gold", "yes")]
    )
    ask = (
        "Instruction: What is the entity type of '%s' in the input sentence.\nOptions: person, location, organization\n"
        "Input: %s signed .\nAnswer: "
    )
    jsonl(folder / "ner-test.jsonl", [(ask % ("Bank", "Bank"), "organization"), (ask % ("Ann", "Ann"), "person")])
    ask = "Explain this XBRL term briefly in one sentence: %s. Answer:"
    jsonl(
        folder / "xbrl_term_test.jsonl",
        [(ask % "Repayments of Debt", "The cash outflow."), (ask % "Taxes", "An amount.")],
    )
    (folder / "boolq").mkdir()
    ask = "Please answer the following question with true or false, question: %s?\n\nAnswer format: true/false"
    adapters(folder / "boolq" / "test.json", [(ask % "is it wet", "true"), (ask % "is it dry", "false")])
    ask = "Please choose the correct solution to the question: %s\n\nSolution1: %s\n\nSolution2: %s\n\nAnswer format: "
    rows = [("To cut", "use a knife", "use a spoon"), ("To eat", "use a hat \n", "use a fork")]
    adapters(
        folder / "piqa_test.json",
        [(ask % row + "solution1/solution2", f"solution{n}") for n, row in enumerate(rows, 1)],
    )
    ask = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: %s\n\n"
        "Option1: %s Option2: %s Answer format: option1/option2"
    )
    rows = [("Ann met Eve and _ smiled.", "Ann", "Eve"), ("The cup fit the box as the _ was big.", "cup", "box")]
    adapters(folder / "winogrande_test.json", [(ask % row, f"option{n}") for n, row in enumerate(rows, 1)])
    ask = "Please choose the correct answer to the question: %s\n\n%s\n\nAnswer format: %s"
    four, three = ["one", "two", "three parts", "four"], ["a", "b", "c"]
    for name in ("ARC-Easy", "openbookqa"):
        told = [
            ask % (f"{name} {len(w)}?", " ".join(f"Answer{n}: {x}" for n, x in enumerate(w, 1)), "/".join(_names(w)))
            for w in (four, three)
        ]
        adapters(folder / f"{name}_test.json", [(told[0], "answer3"), (told[1], "answer1")])


def _names(texts: list[str]) -> list[str]:
    return [f"answer{n}" for n in range(1, len(texts) + 1)]


def tiny_tokenizer() -> Any:
    """A token for every printable character, and for every mood after a space, so that labels are as long; others are <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", "<unk>", *string.printable[:95], "\n", *(f" {mood}" for mood in MOODS)]
    inner = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    pattern = Regex(f" ({'|'.join(MOODS)})|[\\s\\S]")
    inner.pre_tokenizer = pre_tokenizers.Split(pattern=pattern, behavior="isolated")
    inner.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)


def tiny_model() -> Any:
    """A random two-layer Llama over tiny_tokenizer's tokens, sharp enough that its labels differ from prompt to prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(vocab_size=102, max_position_embeddings=512, tie_word_embeddings=True, **sizes, **ids)
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.24)
    return model
