import json

import pytest

from mtl_jax.train.writers import MetricLog

pytestmark = pytest.mark.fast


def test_records_are_kept_in_memory_without_a_folder():
    with MetricLog() as log:
        log.write(3, {"loss": 0.5})
    assert log.records == [{"step": 3, "loss": 0.5}]


def test_lines_hold_the_records_and_the_time(tmp_path):
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 0.1})
        log.write(2, {"loss": 1 / 3})
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line.pop("time") > 0 for line in lines] == [True, True]
    assert (
        lines == log.records == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1 / 3}]
    )


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (9, [1, 2])]
)
def test_reopened_logs_keep_what_the_checkpoint_knows(tmp_path, step, kept):
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 0.1})
        log.write(2, {"loss": 0.2})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    with MetricLog(tmp_path, step=step) as log:
        assert [record["step"] for record in log.records] == kept
        log.write(7, {"loss": 0.7})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [*kept, 7]


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricLog(tmp_path) as log:
        log.write(1, {"loss": 0.1})
    events = list(tmp_path.glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"loss" in events[0].read_bytes()
