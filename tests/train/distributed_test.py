import pytest

from mtl_jax import train
from mtl_jax.train import distributed

pytestmark = pytest.mark.fast


def test_nothing_happens_on_one_machine(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert train.initialize() is False
    assert train.is_main()


def test_one_process_needs_no_coordinator():
    assert train.initialize("localhost:1", 1, 0) is False


def test_arguments_and_environment_reach_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    monkeypatch.setenv("MTL_JAX_COORDINATOR", "host:9")
    monkeypatch.setenv("MTL_JAX_NUM_PROCESSES", "4")
    train.initialize(process_id=2, initialization_timeout=5)
    assert calls == [(("host:9", 4, 2), {"initialization_timeout": 5})]


@pytest.mark.parametrize(
    ("hosts", "tasks", "expected"),
    [("localhost", "1", False), ("a,b", "1", True), ("", "8", True), ("", "x", False)],
)
def test_pods_are_recognised(monkeypatch, hosts, tasks, expected):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert distributed._is_pod() is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:9",), "num_processes is missing, wanted all of"),
        (("host:9", 2, 2), "process_id wants 0 to 1, found 2"),
    ],
)
def test_incomplete_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.initialize(*arguments)


def test_environment_must_be_numbers(monkeypatch):
    monkeypatch.setenv("MTL_JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="MTL_JAX_PROCESS_ID wants a whole number"):
        train.initialize("host:9", 2)
