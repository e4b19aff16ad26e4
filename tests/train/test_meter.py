"""Where the time goes, by a clock that the test turns."""

import pytest

from jaxllm.train import meter as module
from jaxllm.train.meter import Meter
from tests.train.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(100.0)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_start_up_steps_and_the_rest(clock):
    """100: begun; programs 3 s; first step 1 s; two steps of 2 s with 4 s of validation between."""
    meter = Meter(100.0)
    meter.peak = 1000.0
    clock.now = 103.0
    meter.started("programs")
    clock.now = 104.0
    first = meter.step(10, 400.0, skipped=False)
    assert first == {"tokens_per_s": 10.0, "mfu": 0.4, "step_ms": 1000.0}
    clock.now = 106.0
    assert meter.step(10, 400.0, skipped=False)["tokens_per_s"] == 5.0
    with meter.apart("validation"):
        clock.now = 110.0
    clock.now = 112.0
    last = meter.step(10, 400.0, skipped=False)
    assert last == {"tokens_per_s": 5.0, "mfu": 0.2, "step_ms": 2000.0}
    found = meter.summary()
    assert found["seconds"] == 12.0
    assert found["startup_seconds"] == 4.0
    assert found["startup"] == {"programs": 3.0, "first_step": 1.0}
    assert found["apart"] == {"validation": 4.0}
    assert found["goodput"] == pytest.approx(4 / 12)
    assert found["tokens_per_s"] == 5.0 and found["mfu"] == pytest.approx(0.2)


def test_a_skipped_step_is_not_productive(clock):
    meter = Meter(100.0)
    for skipped in (False, False, True, False):
        clock.now += 1.0
        meter.step(10, None, skipped=skipped)
    found = meter.summary()
    assert found["apart"] == {"skipped": 1.0}
    assert found["goodput"] == pytest.approx(2 / 4)
    assert found["tokens_per_s"] == 10.0 and found["mfu"] is None


def test_no_peak_or_no_step_is_no_number(clock):
    meter = Meter(100.0)
    clock.now = 101.0
    assert meter.summary()["tokens_per_s"] is None and meter.summary()["startup_seconds"] is None
    assert meter.step(10, 400.0, skipped=False)["mfu"] is None
    assert meter.summary()["goodput"] == 0.0
