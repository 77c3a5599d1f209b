import io
import re

import pytest

from mtl_jax.report import Progress, format_duration

pytestmark = pytest.mark.fast


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    """Plain lines without their timestamps, whose form is checked."""
    found = []
    for line in stream.getvalue().splitlines():
        stamp = re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)
        assert stamp, line
        found.append(line[stamp.end() :])
    return found


def test_plain_lines_are_throttled_and_tell_the_rest():
    clock, stream = Clock(), io.StringIO()
    with (
        Progress(stream=stream, interval=10, clock=clock) as progress,
        progress.task("fit", total=100) as task,
    ):
        for step in range(1, 101):
            clock.now += 1
            task(step, 100, {"loss": 1 / step})
    found = lines(stream)
    assert found[0] == "fit: start"
    assert found[1] == "fit 1/100 1%  1:39 left  loss 1"
    assert found[2] == "fit 11/100 11%  1:29 left  loss 0.09091"
    assert found[-2] == "fit 100/100 100%  loss 0.01"
    assert found[-1] == "fit: done after 1:40"
    assert len(found) == 13


def test_nested_tasks_are_indented():
    stream = io.StringIO()
    with (
        Progress("study", stream=stream) as progress,
        progress.task("experts", total=2) as experts,
    ):
        for name in ("trec", "sst2"):
            with progress.task(name, total=1) as inner:
                inner.advance()
            experts.advance()
    found = lines(stream)
    assert found[0] == "study" and found[-1].startswith("study: done in")
    assert "  trec 1/1 100%" in found and "experts 2/2 100%" in found


def test_resumed_steps_do_not_count_as_speed():
    clock = Clock()
    with (
        Progress(stream=io.StringIO(), clock=clock) as progress,
        progress.task("fit", total=100) as task,
    ):
        clock.now = 5.0
        task(50, 100, {})
        assert task.seconds_left is None
        clock.now = 15.0
        task(60, 100, {})
        assert task.seconds_left == pytest.approx(40.0)


def test_is_itself_a_callback():
    stream = io.StringIO()
    with Progress(stream=stream, interval=0) as progress:
        progress(1, 2, {"loss": 0.5})
        progress(2, 2, None)
    assert lines(stream)[-1].startswith("train: done")
    stream = io.StringIO()
    with Progress(stream=stream, interval=0) as progress, progress.task("outer"):
        progress(1, 2, {"name": "text"})
    assert "outer 1/2 50%" in stream.getvalue() and "name text" in stream.getvalue()


def test_failure_is_said_and_raised():
    stream = io.StringIO()
    with (
        pytest.raises(RuntimeError),
        Progress("w", stream=stream) as progress,
        progress.task("fit", total=1),
    ):
        raise RuntimeError
    assert lines(stream)[-1].startswith("fit: stopped")


def test_terminal_draws_bars_and_no_markup():
    stream = Terminal()
    with (
        Progress("[b]study[/b]", stream=stream) as progress,
        progress.task("[red]fit", total=2) as task,
    ):
        with progress.task("inner") as inner:
            inner.advance()
        task.update(2, loss=0.25)
    text = stream.getvalue()
    assert "[red]fit" in text and "[b]study[/b]" in text
    assert "2/2" in text and "loss 0.25" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
