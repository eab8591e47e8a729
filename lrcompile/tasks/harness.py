"""Tasks as lm-eval's own task objects, run by its evaluator on a model in memory. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrcompile.errors import EvalError, MissingLibraryError
from lrcompile.tasks.metrics import first_named, macro_f1, macro_f1_error, token_f1, words
from lrcompile.tasks.rows import Row
from lrcompile.tasks.table import TASKS, counted, read_rows


@dataclass(frozen=True)
class Score:
    """A task's figures, in [0, 1]; standard errors beside them (None for a single row).

    Attributes:
        macro_f1: None where the answer is a free text, which has no classes; then `accuracy` is of exact matches (case,
            punctuation and articles aside) and `more` has the F1 of the words.
        commonest: the accuracy of giving the class that is right most often every time: the floor to look at figures from.
        more: further figures by name: "accuracy_per_character" of answers that are texts (lm-eval's acc_norm), "contains" of
            written labels (the right one stands anywhere in the answer: FinLoRA's accuracy), "token_f1".
    """

    task: str
    group: str
    rows: int
    accuracy: float
    accuracy_stderr: float | None
    macro_f1: float | None
    macro_f1_stderr: float | None
    commonest: float | None
    more: dict[str, float | None] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_tasks(tasks: Sequence[str], data: Path) -> dict[str, tuple[list[Row], list[Path]]]:
    """Test rows and their files of every task ("NAME:N": the first N rows); raises EvalError before anything heavy is done."""
    found = {}
    for name, limit in counted(tasks).items():
        rows, paths = read_rows(name, data)
        found[name] = rows[:limit], paths
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, tuple[list[Row], list[Path]]],
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[Score]:
    """Score a causal language model on tasks, through lm-eval.

    Args:
        model: of transformers, adopted or not, on its device; evaluated in its own dtype, log-probabilities in float32. Or
            what lrcompile.export.runtime has: the program of a file, the eager model of one.
        tokenizer: of transformers.
        tasks: as `read_tasks` gives them.
        limit: of each task the first so many rows, which are a fair sample.

    Raises:
        MissingLibraryError: lm-eval or datasets is not installed.
        EvalError: the tokenizer isn't the model's.
    """
    _check_tokenizer(model, tokenizer)
    with offline(), _quiet():
        try:
            from lm_eval.api.task import ConfigurableTask
            from lm_eval.evaluator import evaluate as run
        except ImportError as error:
            raise MissingLibraryError(f'this needs lm-eval: pip install "lrcompile[eval]" ({error})') from error
        # The evaluator's own entry and not simple_evaluate: that one asks the hub and runs pip and git to tell of the machine.
        made = {name: ConfigurableTask(config=task_config(name, rows)) for name, (rows, _) in tasks.items()}
        for task in made.values():
            task.set_fewshot_seed(0)
        was_training = getattr(model, "training", False)
        try:
            lm = wrap(model, tokenizer, batch_size)
            # bootstrap_iters: 0 would be no errors at all; of ours none is drawn by lm-eval.
            found = run(lm, {"tasks": made}, limit=limit, bootstrap_iters=1, log_samples=False)
        finally:
            if was_training:
                model.train()
    assert found is not None
    return [
        _score(name, rows[: limit or len(rows)], found["results"][name], tuple(str(path) for path in paths))
        for name, (rows, paths) in tasks.items()
    ]


def wrap(given: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's view of a model in memory, or of a file for a phone."""
    if not isinstance(given, torch.nn.Module):
        from lrcompile.export.score import PhoneLM

        return PhoneLM(given, tokenizer)
    model: Any = given.eval()
    from lm_eval.models.huggingface import HFLM

    # It ties weights anew, which the model has had since it was made: an adopted one must be left as it is.
    model.tie_weights = lambda *args, **kwargs: None
    try:
        lm = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    finally:
        del model.tie_weights
    return lm


def mean_of(scores: Sequence[Score], group: str) -> dict[str, Any] | None:
    """The plain mean over a group's tasks that have classes, errors of independent figures; None where there are none."""
    taken = [score for score in scores if score.group == group and score.macro_f1 is not None]
    if not taken:
        return None

    def error(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.sqrt(sum(v * v for v in known)) / len(known) if len(known) == len(values) else None

    return {
        "tasks": [score.task for score in taken],
        "accuracy": sum(score.accuracy for score in taken) / len(taken),
        "accuracy_stderr": error([score.accuracy_stderr for score in taken]),
        "macro_f1": sum(score.macro_f1 or 0.0 for score in taken) / len(taken),
        "macro_f1_stderr": error([score.macro_f1_stderr for score in taken]),
        "commonest": sum(score.commonest or 0.0 for score in taken) / len(taken),
    }


# --- a task of lm-eval's ----------------------------------------------------------------------------------------------


def task_config(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The config of lm-eval's ConfigurableTask over these rows."""
    how, length = TASKS[name].how, TASKS[name].length
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: _dataset(rows),
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": " ",
        "metric_list": [_metric(metric) for metric in _METRICS[how]],
    }
    if how in ("named", "written"):
        return config | {
            "output_type": "generate_until",
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_target": lambda doc: doc["choices"][doc["answer"]],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": length, "do_sample": False},
            "process_results": _named if how == "named" else _written,
        }
    config |= {"output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["choices"]}
    if how == "contexts":  # lm-eval's way to tell that the choices come before the text that is scored
        config |= {"doc_to_text": lambda doc: doc["answer"], "doc_to_target": lambda doc: doc["ending"]}
    else:
        config |= {"doc_to_text": lambda doc: doc["prompt"], "doc_to_target": lambda doc: doc["answer"]}
    return config | {"process_results": {"labels": _labels, "texts": _texts, "contexts": _contexts}[how]}


def _dataset(rows: Sequence[Row]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError(f'this needs datasets: pip install "lrcompile[eval]" ({error})') from error
    docs = [{"prompt": r.prompt, "choices": list(r.choices), "answer": r.answer, "ending": r.ending} for r in rows]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(docs))


_CLASSES = ("acc", "macro_f1", "macro_f1_error")
_METRICS = {
    "labels": _CLASSES,
    "texts": (*_CLASSES, "accuracy_per_character"),
    "contexts": _CLASSES,
    "named": (*_CLASSES, "contains"),
    "written": ("acc", "token_f1"),
}


def _metric(name: str) -> dict[str, Any]:
    # lm-eval gives the mean its closed-form error; what it doesn't know gets none, so that ours is a figure of its own.
    ours: dict[str, Callable[..., float]] = {"macro_f1": macro_f1, "macro_f1_error": macro_f1_error}
    return {"metric": name, "aggregation": ours.get(name, "mean"), "higher_is_better": name != "macro_f1_error"}


def _classes(right: str, chosen: str) -> dict[str, Any]:
    pair = (right, chosen)
    return {"acc": float(right == chosen), "macro_f1": pair, "macro_f1_error": pair}


def _best(results: Sequence[tuple[float, bool]], weights: Sequence[float] | None = None) -> int:
    """The first of the largest log-likelihoods; `weights` divide them."""
    scores = [result[0] / (weights[n] if weights else 1) for n, result in enumerate(results)]
    return max(range(len(scores)), key=scores.__getitem__)


def _labels(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    return _classes(doc["choices"][doc["answer"]], doc["choices"][_best(results)])


def _contexts(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    return _classes(str(doc["answer"]), str(_best(results)))  # the class is the place: the texts differ from row to row


def _texts(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    shortened = _best(results, [len(choice) for choice in doc["choices"]])
    return _contexts(doc, results) | {"accuracy_per_character": float(shortened == doc["answer"])}


def _named(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The label named first counts. FinLoRA asks that the right one stands anywhere, which listing them all would meet."""
    right = doc["choices"][doc["answer"]]
    contains = float(right.lower() in results[0].lower())
    return _classes(right, first_named(results[0], doc["choices"])) | {"contains": contains}


def _written(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """FinLoRA takes BERTScore here, which needs a model from the hub; this compares words, as SQuAD does (1606.05250)."""
    wanted = doc["choices"][doc["answer"]]
    return {"acc": float(words(results[0]) == words(wanted)), "token_f1": token_f1(results[0], wanted)}


def _score(name: str, rows: Sequence[Row], found: dict[str, Any], files: tuple[str, ...]) -> Score:
    """From lm-eval's "metric,filter" keys."""
    values = {key.split(",")[0]: value for key, value in found.items() if "," in key}

    def figure(metric: str) -> float | None:
        value = values.get(metric)
        return float(value) if isinstance(value, int | float) else None

    task, more = TASKS[name], dict[str, float | None]()
    for metric in _METRICS[task.how]:
        if metric not in _CLASSES:
            more |= {metric: figure(metric), f"{metric}_stderr": figure(f"{metric}_stderr")}
    accuracy, f1 = figure("acc"), figure("macro_f1")
    assert accuracy is not None
    named = task.how in ("labels", "named")
    right = Counter(row.choices[row.answer] if named else str(row.answer) for row in rows)
    return Score(
        task=name,
        group=task.group,
        rows=len(rows),
        accuracy=accuracy,
        accuracy_stderr=figure("acc_stderr"),
        macro_f1=f1,
        macro_f1_stderr=figure("macro_f1_error") if len(rows) > 1 else None,
        commonest=None if f1 is None else max(right.values()) / len(rows),
        more=more,
        files=files,
    )


# --- around the run ---------------------------------------------------------------------------------------------------


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    size = getattr(model, "vocabulary", None) or model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise EvalError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {size}: it is another model's; give --tokenizer"
        )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No library of Hugging Face's asks its hub, whether it was imported before or will be inside."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    places = [
        (module, name)
        for module in map(sys.modules.get, ("huggingface_hub.constants", "datasets.config", "evaluate.config"))
        for name in names
        if hasattr(module, name)
    ]
    values = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, values, strict=True):
            setattr(module, name, value)
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval warns of at every run of this kind; what else it has to say is let through."""
    known = ("Custom kwargs can be passed", "`pretrained` model kwarg is not", "Passed an already-initialized model")
    loggers = [logging.getLogger(f"lm_eval.{name}") for name in ("api.task", "models.huggingface")]

    def wanted(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in known)

    for logger in loggers:
        logger.addFilter(wanted)
    try:
        with torch.no_grad():
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
