"""The progress display shows a panel on a terminal and plain lines elsewhere, at little cost."""

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.progress import BARS, Progress, count, duration, load_bars

ROW = {
    "kind": "train",
    "loss": 2.5,
    "bits_per_byte": 1.25,
    "learning_rate": 3e-4,
    "grad_norm": 0.5,
    "tokens_per_second": 8123.0,
    "mfu": 0.415,
    "expert_load": [[0.5, 0.25, 0.25, 0.0]] * 2,
    "max_violation": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_appear_first_periodically_and_last():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, title="name", mfu_convention="half causal", stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.11
            progress.update(step, ROW)
        progress.update(100, {"kind": "eval", "set": "docs", "bits_per_byte": 1.5})
        progress.message("saved [bold]")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "name  0/100 steps  MFU: half causal"
    assert [line.split()[1] for line in lines if "loss" in line] == ["1/100", "47/100", "93/100", "100/100"]
    assert "loss 2.5000  bits/byte 1.2500  lr 3.00e-04  grad norm 0.5  tokens/s 8.12k  MFU 41.5%" in lines[1]
    assert "held-out docs: 1.5000 bits per byte" in stream.getvalue() and "saved [bold]" in lines
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_shows_a_complete_panel(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with Progress(10, title="name", stream=stream) as progress:
        progress.message("before [x]")
        progress.update(4, ROW)
        progress.update(4, {"kind": "eval", "set": "docs", "bits_per_byte": 1.5})
    text = stream.getvalue()
    for word in ("before [x]", "4/10", "40.0%", "2.5000", "1.2500", "8.12k", "41.5%", "max violation 1.00", "1.5000"):
        assert word in text
    assert "\x1b" in text


def test_a_disabled_display_is_silent_and_ascii_streams_work():
    stream = io.StringIO()
    with Progress(10, stream=stream, enabled=False) as progress:
        progress.update(1, ROW)
        progress.message("x")
    assert stream.getvalue() == ""
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(10, stream=ascii_only) as progress:
        progress.update(1, ROW)  # its bars have no ASCII form
    assert b"loss 2.5000" in ascii_only.buffer.getvalue()


def test_the_rate_excludes_compilation_and_is_a_moving_average():
    clock = Clock()
    with Progress(1000, start_step=50, stream=io.StringIO(), clock=clock) as progress:
        clock.now = 25.0  # the first step compiles
        progress.update(51, ROW)
        assert progress.rate is None
        for step in range(52, 152):
            clock.now += 0.5
            progress.update(step, ROW)
        assert progress.rate == pytest.approx(2.0)
        for step in range(152, 252):
            clock.now += 1.0
            progress.update(step, ROW)
        assert progress.rate == pytest.approx(1.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_update_costs_less_than_a_millisecond(monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")
    with Progress(3000, stream=Terminal() if terminal else io.StringIO()) as progress:
        costs = []
        for step in range(2000):
            began = time.process_time()
            progress.update(step, ROW)
            costs.append(time.process_time() - began)
    assert sorted(costs)[len(costs) * 9 // 10] < 1e-3


@given(st.integers(1, 6), st.integers(1, 64), st.randoms())
def test_bars_have_one_mark_per_expert_and_grow_with_load(layers, experts, random):
    load = [[0.01 + random.random() for _ in range(experts)] for _ in range(layers)]
    load = [[x / sum(layer) for x in layer] for layer in load]
    bars = load_bars(load)
    mean = [sum(layer[e] for layer in load) for e in range(experts)]
    assert len(bars) == experts
    heights = [BARS.index(bar) for bar in bars]
    assert all(heights[a] <= heights[b] for a in range(experts) for b in range(experts) if mean[a] < mean[b])


def test_balanced_experts_have_bars_of_half_height():
    assert load_bars([[0.25] * 4]) == BARS[4] * 4
    assert load_bars([[1.0, 0.0]]) == BARS[-1] + BARS[0]


def test_durations_and_counts_are_short():
    assert [duration(s) for s in (0, 59.4, 59.6, 187, 7500, 273600)] == [
        "0s",
        "59s",
        "1m00s",
        "3m07s",
        "2h05m",
        "3d04h",
    ]
    assert [count(n) for n in (7, 999.6, 8123, 3.6e6, 1.2e10, 5e12)] == ["7", "1k", "8.12k", "3.6M", "12G", "5T"]
