"""Metrics on disk: one JSON line per record, and TensorBoard events where possible."""

import importlib.util
import json
import time
from types import TracebackType
from typing import Any

import jax
from etils import epath

Record = dict[str, Any]


class MetricLog:
    """Keeps the records of a run, in memory and, given a folder, on disk.

    `metrics.jsonl` gets one line per record, with the wall-clock time in `time`;
    TensorBoard events are written too when `tensorboardX` is installed and the folder
    is local. Only the first process writes.

    Args:
      workdir: folder of the run, or None to keep records in memory only.
      step: records after this step, left by a run that went further than its last
        checkpoint, are dropped: they are about to be made again.
    """

    def __init__(self, workdir: Any = None, *, step: int = 0):
        self.records: list[Record] = []
        self._path = None
        self._events = None
        if workdir is None:
            return
        path = epath.Path(workdir) / "metrics.jsonl"
        lines = _read(path, step)
        self.records = [
            {k: v for k, v in json.loads(line).items() if k != "time"} for line in lines
        ]
        if jax.process_index() != 0:
            return
        self._path = path
        self._lines = lines
        path.write_text("".join(line + "\n" for line in lines))
        if importlib.util.find_spec("tensorboardX") and "://" not in str(workdir):
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                str(workdir), purge_step=step + 1 if step else None
            )

    def write(self, step: int, metrics: dict[str, float]) -> Record:
        """Adds one record."""
        record = {"step": step, **metrics}
        self.records.append(record)
        if self._path is not None:
            line = json.dumps(record | {"time": round(time.time(), 3)})
            self._append(line)
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        return record

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: str) -> None:
        assert self._path is not None
        self._lines.append(line)
        if "://" in str(self._path):  # Object stores have no append.
            self._path.write_text("".join(each + "\n" for each in self._lines))
        else:
            with self._path.open("a") as file:
                file.write(line + "\n")


def _read(path: epath.Path, step: int) -> list[str]:
    """Whole lines up to `step`; a last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record.get("step", 0) > step:
            break
        kept.append(line)
    return kept
