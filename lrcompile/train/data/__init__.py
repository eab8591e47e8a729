"""Training data: files tokenised once to memory-mapped shards, and batches that depend on (seed, step) alone.

    prepare(["books/"], "data", "bpe:4096", validation=0.05)      once; `lrcompile data` on the command line
    sampler = Sampler(Shards.open("data/train"), length=1024, batch=64, seed=0)
    for batch in Prefetch(sampler.rows(step, 0, 64) for step in range(1000)): ...

tokens       what turns text into tokens, and how a changed one is noticed
sources      text, JSONL, parquet and datasets as rows; packages: texts that packages carry, rdata: R's among them
questions    training rows of `lrcompile eval`'s tasks
documents    a row's prompt, completion and text; which part is held out
prepare      rows to shards, in many processes, resumable; write: how a shard reaches the disk
shards       prepared data, mapped
permute      shuffles computed from a key
pack         which documents share a row
sample       batches; prefetch: ahead of time
command      `lrcompile data`
"""

from lrcompile.train.data.prefetch import Prefetch as Prefetch
from lrcompile.train.data.prepare import Progress as Progress
from lrcompile.train.data.prepare import prepare as prepare
from lrcompile.train.data.sample import Batch as Batch
from lrcompile.train.data.sample import Sampler as Sampler
from lrcompile.train.data.shards import Shards as Shards
from lrcompile.train.data.tokens import Tokenizer as Tokenizer
from lrcompile.train.data.tokens import load_tokenizer as load_tokenizer
