import signal

import pytest

from mtl_jax.train.signals import Interrupted, StopRequest

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_the_second_acts(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_disabled_catches_nothing():
    with StopRequest(enabled=False) as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.received is None


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")],
)
def test_exit_codes(number, code, name):
    error = Interrupted(number, 7)
    assert error.code == code
    assert str(error) == f"{name}: saved after step 7; the same command resumes"
