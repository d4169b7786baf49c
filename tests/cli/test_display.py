"""What the terminal shows while something runs: how far it is, the time left, and the candidates of a search."""

from __future__ import annotations

import io

import pytest

from qgraph import cli_display
from qgraph.report.ladder import Rung
from qgraph.report.terminal import left_text, progress_text, rung_text, seconds_left


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(cli_display, "time", made)
    return made


def test_a_long_step_tells_every_ten_seconds_how_long_it_will_take(clock: Clock, capsys: pytest.CaptureFixture[str]):
    display = cli_display.Display()
    for done in range(9):
        display.progress("gptq", done, 8)
        clock.now += 4
    display.step("gptq", "8 weights")
    assert capsys.readouterr().err.splitlines() == [
        "gptq             3/8   38 %   12.0 s, about 20 s left",
        "gptq             6/8   75 %   24.0 s, about 8 s left",
        "gptq             8 weights",
    ]


def test_a_short_step_leaves_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]):
    display = cli_display.Display()
    for done in (1, 2):
        clock.now += 0.5
        display.progress("calibrate", done, 2)
    display.progress("verify", 1, 1)
    display.close()
    assert capsys.readouterr().err == "calibrate        2/2   500 ms\n"


def test_a_step_that_begins_again_is_timed_anew(clock: Clock, capsys: pytest.CaptureFixture[str]):
    display = cli_display.Display()
    display.progress("calibrate", 5, 5)
    clock.now += 60
    display.progress("calibrate", 1, 5)
    clock.now += 10
    display.progress("calibrate", 2, 5)
    assert capsys.readouterr().err == "calibrate        2/5   40 %   10.0 s, about 15 s left\n"


def test_quiet_is_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]):
    display = cli_display.Quiet()
    display.progress("gptq", 1, 8)
    clock.now += 60
    display.progress("gptq", 2, 8)
    display.rung(Rung("the default", "qdq"))
    assert capsys.readouterr().err == ""


def test_time_left():
    assert seconds_left(10.0, 1, 5) == 40.0
    assert seconds_left(10.0, 5, 5) == 0.0
    assert seconds_left(10.0, 0, 5) is None
    assert seconds_left(10.0, 6, 5) is None
    assert left_text(0.2) == "1 s left"
    assert left_text(99) == "99 s left"
    assert left_text(125) == "2 min 5 s left"
    assert progress_text(3.0, 0, 0) == "0/0   3.00 s"


RUNGS = (
    Rung("the default", "qdq", {"top1": 0.021}, 3_850_000, 0.0032, 2.6),
    Rung("bias correction", "qdq,bias-correction", {"top1": 0.0051}, 3_850_000, 0.0032, 2.61, remark="no gain"),
    Rung("learned rounding", "adaround,qdq", remark="died"),
    Rung("smoothing", "smooth-quant,qdq", bytes=3_850_000, remark="+0.0 dB"),
    Rung("2 layers in float", "mixed-precision,qdq", {"top1": 0.004}, 4_100_000, 0.0035, 2.4, met=True, chosen=True),
)


def test_candidates_of_a_search_stand_below_one_another(capsys: pytest.CaptureFixture[str]):
    display = cli_display.Display()
    for rung in RUNGS:
        display.rung(rung)
    assert capsys.readouterr().err.splitlines() == [
        "search 1         the default                      top-1 loss   2.10 %    3.85 MB    2.6x   not met",
        "search 2         bias correction                  top-1 loss   0.51 %    3.85 MB    2.6x   not met   no gain",
        "search 3         learned rounding                                                          failed   died",
        "search 4         smoothing                                               3.85 MB           tried   +0.0 dB",
        "search 5         2 layers in float                top-1 loss   0.40 %    4.10 MB    2.4x   chosen",
    ]


def test_names_of_candidates_are_not_trusted_with_the_terminal(capsys: pytest.CaptureFixture[str]):
    cli_display.Display().rung(Rung("evil\x1b[2J\n", "qdq", remark="\x07"))
    assert "\x1b" not in capsys.readouterr().err
    assert rung_text(RUNGS[0]).startswith("the default")


def test_the_live_bar_counts_down(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    live = cli_display.Live()
    stream = io.StringIO()
    live._console = Console(file=stream, force_terminal=True, width=120, highlight=False)
    live.progress("gptq", 0, 4)
    assert live._bars is not None
    (task,) = live._bars.tasks
    column = live._bars.columns[-1]
    assert column.render(task).plain == ""  # nothing tells yet
    task._get_time = lambda: task.start_time + 10.0
    live.progress("gptq", 1, 4)
    assert column.render(task).plain == "30 s left"
    task._get_time = lambda: task.start_time + 25.0
    assert column.render(task).plain == "15 s left"
    task._get_time = lambda: task.start_time + 300.0
    assert column.render(task).plain == ""  # what was to be expected is over
    live.rung(RUNGS[4])
    live.close()
    assert "gptq" in stream.getvalue()
    assert "2 layers in float" in stream.getvalue()
