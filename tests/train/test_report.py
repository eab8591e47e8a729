"""Runs read back, compared and drawn."""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompile.errors import MissingLibraryError, TrainError
from lrcompile.train.history import compare, read, read_all, smooth
from lrcompile.train.log import RunLog
from lrcompile.train.report import report
from tests.helpers_cli import command

TOKENS = 100


def make(dir: Path, *, steps: int = 40, seconds: float = 0.5, gap: float = 0.0, **facts: Any) -> Path:
    """A run whose held-out loss is 4 - step / 100 + gap, evaluated every 10 steps; its first two steps compiled."""
    with RunLog(dir, live=False, tensorboard=False, rank=0, steps=steps, every=0) as log:
        log.event("start", **facts)
        log.evaluation(0, loss=4.0 + gap)
        for i in range(1, steps + 1):
            took = 30.0 if i <= 2 else seconds
            timing = {"seconds": took, "tokens_per_s": TOKENS / took, "tokens": i * TOKENS, "cold": i <= 2}
            log.step(i, loss=5 - i / 100 + gap, lr=1e-3, grad_norm=1.0, memory=1000 * i, mfu=None, **timing)
            if i % 10 == 0:
                log.evaluation(i, loss=4 - i / 100 + gap)
        log.sample(steps, "<b>The", "state & \x1b[0m more")
    return dir


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_a_run_told(tmp_path: Path) -> None:
    run = read(make(tmp_path / "run", parameters=123))
    assert run.name == "run" and run.facts["parameters"] == 123
    assert run.step.tolist() == list(range(1, 41)) and run.cold.sum() == 2
    assert run.tokens[-1] == 4000
    assert run.seconds[-1] == 20.0  # a step that compiled counts as one of median length
    assert run.median("tokens_per_s") == 200.0 and math.isnan(run.median("mfu"))
    assert run.final_loss == pytest.approx(5 - np.arange(21, 41).mean() / 100)
    assert run.held_out[:, 0].tolist() == [0, 10, 20, 30, 40]
    assert run.at(run.held_out[:, 0], "tokens").tolist() == [0, 1000, 2000, 3000, 4000]
    assert run.held_out_at(1500, "tokens") == pytest.approx(3.85)
    assert run.held_out_at(7.5, "seconds") == pytest.approx(3.85)
    assert math.isnan(run.held_out_at(4001, "tokens"))  # nothing is made up beyond the last evaluation


def test_a_run_that_tells_little(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", live=False, tensorboard=False, rank=0, steps=3, every=0) as log:
        for i in range(1, 4):
            log.step(i, loss=1.0)
    run = read(tmp_path / "run")
    assert np.isnan(run.seconds).all() and not len(run.held_out) and run.config is None
    assert compare([run]) == [("steps", ["3"]), ("training loss, last 20 steps", ["1.0000"])]
    assert size_of(report([tmp_path / "run"], tmp_path / "a.png").read_bytes()) > (1000, 500)


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", live=False, tensorboard=False, rank=0, steps=9, every=0) as log:
        for i in range(1, 10):
            log.step(i, loss=[2.0, math.nan, math.inf][i % 3], seconds=1.0, tokens=i)
        log.evaluation(9, loss=math.nan)
    run = read(tmp_path / "run")
    assert run.bad_steps.tolist() == [1, 2, 4, 5, 7, 8] and run.final_loss == 2.0 and not len(run.held_out)
    assert ("steps with a loss that isn't finite", ["6"]) in compare([run])
    report([tmp_path / "run"], tmp_path / "a.png")


def test_the_last_word_on_a_step_evaluated_twice(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with RunLog(tmp_path / "run", live=False, tensorboard=False, rank=0, steps=40, every=0, resume_step=40) as log:
        log.evaluation(40, loss=1.0)
    assert read(tmp_path / "run").held_out.tolist()[-1] == [40.0, 1.0]


def test_a_run_still_going_is_read_up_to_its_half_line(tmp_path: Path) -> None:
    path = make(tmp_path / "run") / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "st')
    assert read(tmp_path / "run").step[-1] == 40


def test_what_cant_be_reported_on(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such directory"):
        report([tmp_path / "none"])
    make(tmp_path / "runs" / "one", steps=2)
    with pytest.raises(TrainError, match="it has no metrics.jsonl; there are runs in it: one"):
        report([tmp_path / "runs"])
    with pytest.raises(TrainError, match="is given twice"):
        report([tmp_path / "runs" / "one"] * 2)
    with pytest.raises(TrainError, match="no run to report on"):
        report([])
    with pytest.raises(TrainError, match=r"ends in neither \.html nor \.png"):
        report([tmp_path / "runs" / "one"], "a.pdf")
    with pytest.raises(
        TrainError, match=r"can't write .*missing.a\.png: there is no directory .*missing; make it first"
    ):
        report([tmp_path / "runs" / "one"], tmp_path / "missing" / "a.png")
    RunLog(tmp_path / "new", live=False, tensorboard=False, rank=0, steps=2).close()
    with pytest.raises(TrainError, match="no steps yet"):
        report([tmp_path / "new"])
    path = tmp_path / "runs" / "one" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 1,', b'"step": 1', 1))
    with pytest.raises(TrainError, match=r"metrics\.jsonl, line \d: not JSON"):
        report([tmp_path / "runs" / "one"])


def test_matplotlib_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "run", steps=3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'lrcompile\[train\]'"):
        report([tmp_path / "run"])


# --- comparing --------------------------------------------------------------------------------------------------------


def test_runs_side_by_side(tmp_path: Path) -> None:
    make(tmp_path / "dense", parameters=2_000)
    make(tmp_path / "pair", steps=30, seconds=0.25, gap=0.125, parameters=1_000)
    rows = dict(compare(read_all([tmp_path / "dense", tmp_path / "pair"])))
    assert rows["steps"] == ["40", "30"] and rows["parameters"] == ["2,000", "1,000"]
    assert rows["seconds of training"] == ["20.0", "7.5"]
    assert rows["held-out loss, last"] == ["3.6000", "3.8250 (+0.2250)"]
    assert rows["held-out loss at 3k tokens"] == ["3.7000", "3.8250 (+0.1250)"]
    assert rows["held-out loss at 8 s"] == ["3.8500", "3.8250 (-0.0250)"]  # 7.5 s: step 15 of one, 30 of the other
    assert rows["tokens/s, median"] == ["200", "400"] and rows["peak memory"] == ["40 kB", "30 kB"]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [make(tmp_path / a / "run", steps=2) for a in ("x", "y")]
    assert [run.name for run in read_all(paths)] == ["x/run", "y/run"]


def test_smooth() -> None:
    falling = np.linspace(10, 0, 1000)
    np.testing.assert_allclose(smooth(falling)[:900], falling[:900], atol=1e-9)  # no lag
    noisy = np.random.default_rng(0).standard_normal(1000)
    assert smooth(noisy)[50:].std() < 0.25  # the mean of 21: 0.218 expected, 0.202 seen
    noisy[500] = math.nan
    smoothed = smooth(noisy)
    assert np.isnan(smoothed[500]) and np.isfinite(np.delete(smoothed, 500)).all()
    assert smooth(np.zeros(0)).size == 0


# --- drawing ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags and text of a page; every tag that is opened is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_everything(tmp_path: Path) -> None:
    one = make(tmp_path / "a<i>&$x_1$", device="<script>alert(1)</script>")
    two = make(tmp_path / "_b", gap=0.1)
    (one / "config.json").write_text('{"source": "<gpt2>"}\n')
    (two / "config.json").write_text('{"b": 1}\n')
    out = report([one, two], tmp_path / "page.html")
    assert out == tmp_path / "page.html" and sorted(p.name for p in tmp_path.glob("*.*")) == ["page.html"]
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert {"script", "b", "i", "link"} & {tag for tag, _ in page.tags} <= {"b", "i"}
    assert len(re.findall("<b>", html)) == 2  # the prompts' own, one for each run's sample
    for text in (
        "<b>The",
        "state & ",
        '"source": "<gpt2>"',
        '{"b": 1}',
        "a<i>&$x_1$",
        "device=<script>alert(1)</script>",
    ):
        assert text in page.text
    (source,) = (attrs["src"] or "" for tag, attrs in page.tags if tag == "img")
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64" and size_of(base64.b64decode(data)) > (1000, 500)
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_picture_and_page_beside_the_run(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    assert report([path]) == path / "report.html"
    assert size_of((path / "report.png").read_bytes()) > (1000, 500)


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    make(tmp_path / "one")
    make(tmp_path / "two", seconds=0.25, gap=0.5)
    report([tmp_path / "one", tmp_path / "two"], tmp_path / "a.png")
    (figure,) = figures
    titles = ["loss by steps", "loss by tokens", "loss by seconds", "gradient norm", "learning rate", "tokens/s"]
    assert [axes.get_title("left") for axes in figure.axes] == titles
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one", "two", "training, smoothed", "held-out"]
    ends = [[line.get_xdata()[-1] for line in axes.lines[::4]] for axes in figure.axes[:3]]
    assert ends == [[40, 40], [4000, 4000], [20.0, 10.0]]
    held_out = figure.axes[0].lines[2]
    np.testing.assert_allclose(held_out.get_ydata(), [4.0, 3.9, 3.8, 3.7, 3.6])
    raw = figure.axes[0].lines[0]
    np.testing.assert_allclose(raw.get_ydata(), 5 - np.arange(1, 41) / 100)


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    from lrcompile.train.figure import _thin

    x, y = _thin(np.arange(10_001), np.arange(10_001) * 2)
    assert len(x) <= 4000 and x[-1] == 10_000 and (y == 2 * x).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(make(tmp_path / name)) for name in ("one", "two")]
    assert command("report", *paths, "--out", tmp_path / "a.html") == 0
    out = capsys.readouterr().out
    assert "held-out loss, last" in out and "3.6000 (+0.0000)" in out and f"wrote {tmp_path / 'a.html'}" in out
    assert (tmp_path / "a.html").is_file()
