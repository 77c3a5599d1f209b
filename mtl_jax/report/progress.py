"""Progress of long work: bars on a terminal, timestamped lines everywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

__all__ = ["Progress", "Task", "format_duration"]


def format_duration(seconds: float) -> str:
    """A duration for people.

    >>> format_duration(75), format_duration(3.2), format_duration(7260)
    ('1:15', '3s', '2:01:00')
    """
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _metrics_text(metrics: Mapping[str, Any]) -> str:
    parts = []
    for name, value in metrics.items():
        try:
            parts.append(f"{name} {float(value):.4g}")
        except (TypeError, ValueError):
            parts.append(f"{name} {value}")
    return "  ".join(parts)


class Task:
    """One piece of work with a known number of steps.

    Calling it as `task(step, steps, metrics)` makes it the `progress` callback of
    a trainer.
    """

    def __init__(self, owner: "Progress", name: str, total: int | None, depth: int):
        """Made by `Progress.task`."""
        self.name = name
        self.total = total
        self.step = 0
        self._owner = owner
        self._depth = depth
        self._started = owner._clock()
        self._first = 0
        self._printed = -float("inf")
        self._handle: Any = None

    def __call__(
        self, step: int, steps: int | None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Reports that `step` of `steps` is done."""
        if steps is not None:
            self.total = int(steps)
        self.update(int(step), **dict(metrics or {}))

    def update(self, step: int, **metrics: Any) -> None:
        """Sets the number of steps done, with metrics to show beside it."""
        if self.step == 0 and step > 1:
            # A resumed run: what was done before does not count towards the speed.
            self._first = step
            self._started = self._owner._clock()
        self.step = step
        self._owner._show(self, metrics)

    def advance(self, count: int = 1, **metrics: Any) -> None:
        """Adds to the number of steps done."""
        self.step += count
        self._owner._show(self, metrics)

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the end; None until a step has been timed."""
        done = self.step - self._first
        if self.total is None or done <= 0:
            return None
        elapsed = self._owner._clock() - self._started
        return elapsed / done * max(self.total - self.step, 0)


class Progress:
    """Shows nested tasks, each with the time it still needs.

    On a terminal these are bars; otherwise one line at the start and the end of a
    task and at most one per `interval` seconds in between. The object is itself a
    `progress(step, steps, metrics)` callback, for the innermost task.

    >>> import io
    >>> log = io.StringIO()
    >>> with Progress("demo", stream=log) as progress:
    ...     with progress.task("fine-tune", total=2) as task:
    ...         for step in range(2):
    ...             task.advance(loss=0.5)
    >>> "fine-tune 2/2" in log.getvalue()
    True
    """

    def __init__(
        self,
        title: str = "",
        *,
        stream: IO[str] | None = None,
        interval: float = 10.0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts nothing yet; enter it as a context manager.

        Args:
          title: what the whole work is called.
          stream: where to write; standard error by default.
          interval: seconds between plain lines of one task.
          terminal: whether to draw bars; None asks the stream.
          clock: monotonic seconds.
        """
        self.title = title
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._clock = clock
        self._stack: list[Task] = []
        self._bars: Any = None
        self._implicit: contextlib.AbstractContextManager[Task] | None = None
        self._began = clock()

    def __enter__(self) -> "Progress":
        self._began = self._clock()
        if self._terminal:
            self._bars = _make_bars(self._stream)
            self._bars.start()
        if self.title:
            self.log(self.title)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._implicit is not None:
            self._implicit.__exit__(*exception)
            self._implicit = None
        if self.title and exception[0] is None:
            self.log(f"{self.title}: done in {self._since(self._began)}")
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(
        self, step: int, steps: int | None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Reports a step of the innermost task, or of one made for the purpose."""
        if not self._stack:
            self._implicit = self.task("train", total=steps)
            self._implicit.__enter__()
        self._stack[-1](step, steps, metrics)

    @contextlib.contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[Task]:
        """A task, nested in the one that is open.

        Args:
          name: what it does.
          total: number of steps; None if not known yet.
        """
        task = Task(self, name, total, len(self._stack))
        self._stack.append(task)
        if self._bars is not None:
            task._handle = self._bars.add_task(
                "  " * task._depth + name, total=total, metrics=""
            )
        else:
            self._line(f"{self._indent(task)}{name}: start")
        try:
            yield task
        except BaseException:
            self._close(task, "stopped")
            raise
        self._close(task, "done")

    def log(self, message: str) -> None:
        """Prints one line above the bars, or with a timestamp."""
        if self._bars is not None:
            self._bars.console.print(message, markup=False, highlight=False)
        else:
            self._line(message)

    def _since(self, moment: float) -> str:
        return format_duration(self._clock() - moment)

    @staticmethod
    def _indent(task: Task) -> str:
        return "  " * task._depth

    def _line(self, message: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stream.write(f"{stamp} {message}\n")
        self._stream.flush()

    def _show(self, task: Task, metrics: Mapping[str, Any]) -> None:
        if self._bars is not None:
            fields = {"metrics": _metrics_text(metrics)} if metrics else {}
            self._bars.update(
                task._handle, completed=task.step, total=task.total, **fields
            )
            return
        now = self._clock()
        if now - task._printed < self._interval and task.step != task.total:
            return
        task._printed = now
        of = f"/{task.total} {task.step / task.total:.0%}" if task.total else ""
        left = task.seconds_left
        eta = f"  {format_duration(left)} left" if left else ""
        shown = f"  {_metrics_text(metrics)}" if metrics else ""
        self._line(f"{self._indent(task)}{task.name} {task.step}{of}{eta}{shown}")

    def _close(self, task: Task, word: str) -> None:
        self._stack.remove(task)
        if self._bars is None:
            spent = self._since(task._started)
            self._line(f"{self._indent(task)}{task.name}: {word} after {spent}")
        elif task._depth:
            self._bars.remove_task(task._handle)
        else:
            self._bars.stop_task(task._handle)


def _make_bars(stream: IO[str]) -> Any:
    """The rich display; rich is imported only where there is a terminal."""
    import rich.console
    import rich.progress as rp

    return rp.Progress(
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(bar_width=28),
        rp.MofNCompleteColumn(),
        rp.TimeElapsedColumn(),
        rp.TextColumn("<"),
        rp.TimeRemainingColumn(compact=True),
        rp.TextColumn("{task.fields[metrics]}", markup=False),
        console=rich.console.Console(file=stream, force_terminal=True),
        refresh_per_second=4,
    )
