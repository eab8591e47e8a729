"""`lrcompile eval`: financial and general tasks on local files, through lm-eval.

rows.py       a row, its side by a hash of its text, files found and malformed lines refused
financial.py  loaders: Financial PhraseBank, FiQA, Twitter Financial News Sentiment, FinLoRA's jsonl
general.py    loaders: BoolQ, PIQA, WinoGrande, ARC-Easy, OpenBookQA in LLM-Adapters' JSON
table.py      the tasks: files, licences, how each is asked
metrics.py    macro-F1 and its bootstrap error, words shared by two texts
harness.py    lm-eval: its task objects, its evaluator, offline
model.py      the model and its tokenizer: a directory, a GGUF file, what lrcompile.save wrote, an adapter
command.py    the command, its table and JSON
"""

from lrcompile.tasks.rows import Row
from lrcompile.tasks.table import TASKS, read_rows

__all__ = ["TASKS", "Row", "read_rows"]
