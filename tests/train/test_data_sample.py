"""What a step's batch holds: everything once an epoch, no document's tokens in another's loss, the same for any world size."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.errors import TrainError
from lrcompile.train.data import Batch, Sampler, Shards
from lrcompile.train.data.pack import first_fit
from tests.train.helpers_data import shards_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, of these prompt) of examples: a prompt of one token at least, a completion, an end."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=30))
    return [p + c + 1 for p, c in pairs], [p for p, _ in pairs]


def check_rows(shards: Shards, batch: Batch, prompt: Sequence[int] | None = None) -> None:
    """Every place of a batch is what its document says, or padding."""
    lengths, length = shards.lengths, batch.tokens.shape[1]
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    place_in = np.concatenate([np.arange(n) for n in lengths])
    end = shards.tokenizer["end"]
    for tokens, targets, positions, documents in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.positions.tolist(), batch.documents, strict=True
    ):
        used = [t for t in tokens if t != end]
        assert tokens == used + [end] * (length - len(used))
        assert list(dict.fromkeys(document_of[used].tolist())) == documents
        for i, token in enumerate(used):
            own = document_of[token]
            inside = place_in[token] + 1 < lengths[own]
            asked = inside and (prompt is None or place_in[token] + 1 >= prompt[own])
            assert targets[i] == (token + 1 if asked else -100)
            goes_on = i > 0 and used[i - 1] == token - 1 and document_of[token - 1] == own
            assert positions[i] == (positions[i - 1] + 1 if goes_on else 0)
        assert targets[len(used) :] == [-100] * (length - len(used))
        assert positions[len(used) :] == list(range(length - len(used)))


@SETTINGS
@given(LENGTHS, st.integers(1, 16), st.integers(0, 2**40), st.integers(1, 3))
def test_an_epoch_of_text_has_every_token_once_but_for_the_tail(
    lengths: list[int], length: int, seed: int, epochs: int
) -> None:
    shards = shards_of(lengths)
    rows = sum(lengths) // length
    if not rows:
        with pytest.raises(TrainError, match="less than one row"):
            Sampler(shards, length=length, batch=1, seed=seed).rows(0, 0, 1)
        return
    sampler = Sampler(shards, length=length, batch=rows, seed=seed, epochs=epochs)
    assert sampler.steps == epochs
    for step in range(epochs):
        batch = sampler.rows(step, 0, rows)
        check_rows(shards, batch)
        seen = batch.tokens.flatten().tolist()
        assert len(seen) == len(set(seen)) == rows * length  # the end token can't be among them: it would be twice
        assert sum(lengths) - len(seen) < length
    with pytest.raises(TrainError, match="past the end"):
        sampler.rows(epochs, 0, 1)


@SETTINGS
@given(prompts(), st.integers(0, 2**40))
def test_an_epoch_of_prompts_has_every_example_whole_and_once(found: tuple[list[int], list[int]], seed: int) -> None:
    lengths, prompt = found
    shards = shards_of(lengths, prompt)
    sampler = Sampler(shards, length=20, batch=1, seed=seed, epochs=2)
    assert sampler.steps is not None
    seen: list[list[int]] = []
    asked: list[int] = []
    for step in range(sampler.steps):
        batch = sampler.rows(step, 0, 1)
        check_rows(shards, batch, prompt)
        seen += batch.documents
        asked += [t for t in batch.targets.flatten().tolist() if t != -100]
    everything = list(range(len(lengths)))
    firsts = np.cumsum(lengths) - lengths
    wanted = [t for d in everything for t in range(firsts[d] + prompt[d], firsts[d] + lengths[d])]
    assert sorted(d for row in seen for d in row) == sorted(2 * everything)
    assert sorted(asked) == sorted(2 * wanted)


@SETTINGS
@given(LENGTHS, st.integers(1, 8), st.integers(1, 9), st.data())
def test_how_rows_are_divided_over_ranks_and_calls_changes_nothing(
    lengths: list[int], length: int, batch: int, data: st.DataObject
) -> None:
    lengths = [*lengths, length]
    step = data.draw(st.integers(0, 50))
    cuts = sorted({0, batch, *data.draw(st.lists(st.integers(0, batch), max_size=4))})
    for prompt in (None, [0] * len(lengths)):
        shards = shards_of([min(n, length + 1) for n in lengths], prompt)

        def sampler(
            shards: Shards = shards,
        ) -> Sampler:  # one a rank; none knows what the others, or earlier steps, did
            return Sampler(shards, length=length, batch=batch, seed=7)

        whole = sampler().rows(step, 0, batch)
        shares = [sampler().rows(step, a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
        for name in ("tokens", "targets", "positions"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name))
        assert [d for s in shares for d in s.documents] == whole.documents


@SETTINGS
@given(LENGTHS, st.integers(1, 16), st.integers(1, 5))
def test_a_held_out_set_is_read_whole_and_always_alike(lengths: list[int], length: int, rows: int) -> None:
    shards = shards_of(lengths)
    sampler = Sampler(shards, length=length, batch=1, seed=0)
    batches = list(sampler.sequential(None, rows))
    for batch in batches:
        assert batch.tokens.shape == (rows, length)
        check_rows(shards, batch)
    asked = [t for b in batches for t in b.targets.flatten().tolist() if t != -100]
    firsts = set((np.cumsum(lengths) - lengths).tolist())
    assert sorted(asked) == [t for t in range(sum(lengths)) if t not in firsts]
    for first in range(rows):  # a rank's share
        for batch, own in zip(batches, sampler.sequential(None, rows, first=first, count=1), strict=True):
            assert torch.equal(own.targets, batch.targets[first : first + 1])
            assert own.documents == batch.documents[first : first + 1]


def test_a_part_of_a_held_out_set_is_spread_over_all_of_it() -> None:
    sampler = Sampler(shards_of([9] * 100), length=8, batch=1, seed=0)
    batches = list(sampler.sequential(2, 5))
    assert [d for b in batches for (d,) in b.documents] == list(range(0, 100, 10))


def test_neighbouring_windows_of_a_long_document_do_not_share_a_batch() -> None:
    sampler = Sampler(shards_of([100_000]), length=10, batch=16, seed=0)
    firsts = [sampler.rows(step, 0, 16).tokens[:, 0].sort().values for step in range(50)]
    near = sum(int((f.diff() == 10).sum()) for f in firsts)
    assert near < 5  # 50 steps have 1.2 such pairs by chance


def test_epochs_and_seeds_differ_and_a_batch_may_span_two_epochs() -> None:
    shards = shards_of([5] * 20)
    epochs = [Sampler(shards, length=10, batch=10, seed=0).rows(epoch, 0, 10).tokens for epoch in range(3)]
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], Sampler(shards, length=10, batch=10, seed=1).rows(0, 0, 10).tokens)
    threes = Sampler(shards, length=10, batch=3, seed=0)
    rows = torch.cat([threes.rows(step, 0, 3).tokens for step in range(10)])
    assert torch.equal(rows, torch.cat(epochs))


def test_examples_that_do_not_fit_are_refused_or_lose_the_beginning_of_their_prompt() -> None:
    shards = shards_of([12, 6, 9], [9, 2, 7])
    with pytest.raises(TrainError, match=r"2 of 3 examples .* longer than 6 tokens .*number 0, 11.*too_long=\"cut\""):
        Sampler(shards, length=6, batch=1, seed=0)
    sampler = Sampler(shards, length=6, batch=3, seed=0, too_long="cut")
    batch = sampler.rows(0, 0, 3)
    by_document = dict(zip((d for (d,) in batch.documents), batch.tokens.tolist(), strict=True))
    assert by_document == {0: [5, 6, 7, 8, 9, 10], 1: [12, 13, 14, 15, 16, 27], 2: [20, 21, 22, 23, 24, 25]}
    asked = sorted(t for t in batch.targets.flatten().tolist() if t != -100)
    assert asked == [9, 10, 11, 14, 15, 16, 17, 25, 26]
    with pytest.raises(TrainError, match="1 of 3 examples .* a completion that is longer than 2 tokens .*number 1"):
        Sampler(shards_of([4, 6, 4], [2, 2, 2]), length=2, batch=1, seed=0, too_long="cut")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "must be at least 1"),
        ({"batch": 0}, "must be at least 1"),
        ({"epochs": 0}, "must be at least 1"),
        ({"too_long": "drop"}, '"refuse" or "cut"'),
    ],
)
def test_arguments_without_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        Sampler(shards_of([5, 5]), **{"length": 4, "batch": 1, "seed": 0, **options})


@pytest.mark.parametrize(("step", "first", "count"), [(-1, 0, 1), (0, -1, 1), (0, 3, 2), (0, 0, 5)])
def test_rows_that_are_not_there_are_refused(step: int, first: int, count: int) -> None:
    with pytest.raises(TrainError, match="rows 0 to 4"):
        Sampler(shards_of([50]), length=4, batch=4, seed=0).rows(step, first, count)


def test_the_state_is_small_and_a_changed_set_or_tokenizer_is_told() -> None:
    shards = shards_of([5, 5])
    sampler = Sampler(shards, length=4, batch=1, seed=3)
    state = sampler.state()
    assert len(repr(state)) < 300
    sampler.check(state)
    for name, value, words in (
        ("data", "0" * 64, "data in memory has changed .*000000, now ffffff"),
        ("tokenizer", "0" * 64, "tokenizer of memory has changed"),
        ("seed", 4, "has seed 4, this one 3"),
        ("length", 5, "has length 5, this one 4"),
        ("batch", 2, "has batch 2, this one 1"),
    ):
        with pytest.raises(TrainError, match=words):
            sampler.check({**state, name: value})


@SETTINGS
@given(st.lists(st.integers(1, 9), min_size=1, max_size=200))
def test_no_row_is_over_full_and_none_but_the_last_open_ones_could_have_taken_the_next(counts: list[int]) -> None:
    members, starts = first_fit(np.array(counts), 9)
    rows = [np.array(counts)[members[a:b]] for a, b in zip(starts, starts[1:], strict=False)]
    assert sorted(members.tolist()) == list(range(len(counts)))
    assert all(0 < len(row) and row.sum() <= 9 for row in rows)
    if len(rows) <= 32:  # all open at once: this is first fit, so any two of them together are over-full
        assert all(a.sum() + b.sum() > 9 for a, b in zip(rows, rows[1:], strict=False))
