"""What stands on the terminal: how many lines, of what; the live line; the table."""

import io
import sys

import pytest

from jaxllm.train import show as module
from jaxllm.train.show import Show, facts, line
from tests.train.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def row(step, **more):
    return {"step": step, "loss": 2.5, "grad_norm": 1.25, "lr": 1e-3, **more}


SUMMARY = {
    "folder": "runs/x",
    "step": 10,
    "steps": 10,
    "tokens": 12345,
    "seconds": 3723.0,
    "best_val_loss": 1.25,
    "best_val_step": 8,
    "val_loss": 1.5,
    "val_step": 10,
    "tokens_per_s": 1000.0,
    "mfu": 0.4321,
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 8,
    "startup": {"data": 0.01, "first_step": 2.0},
    "startup_seconds": 12.0,
    "apart": {"validation": 5.0, "samples": 0.01},
    "goodput": 0.9,
    "skipped": 2,
    "peak_bytes": 3 * 2**30,
    "predicted_bytes": 5 * 2**20,
}


def test_a_line_has_what_is_known():
    whole = row(3, tokens_per_s=12345.6, step_ms=62.12, mfu=0.4312, val_loss=1.5)
    assert line(whole, 20) == (
        "step 3/20  loss 2.5000  grad norm 1.250  lr 1.00e-03  12,346 tokens/s  62.1 ms"
        "  MFU 43.1 %  val 1.5000"
    )
    assert "MFU" not in line(whole | {"mfu": None}, 20)
    assert "nan" in line(whole | {"loss": float("nan")}, 20)


def shown(capsys):
    return [text.split("/")[0] for text in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("seconds", "log_every", "steps"),
    [
        (0.3, 0, [1, 5, 9, 13, 14]),
        (1.5, 0, list(range(1, 15))),
        (0.3, 6, [1, 6, 12, 14]),
        (1.5, 6, [1, 6, 12, 14]),
    ],
)
def test_plain_lines(clock, capsys, seconds, log_every, steps):
    with Show(14, log_every=log_every) as show:
        for step in range(1, 15):
            clock.now += seconds
            show.step(row(step))
    assert shown(capsys) == [f"step {s}" for s in steps]


def test_validations_always_have_a_line_and_quiet_has_none(clock, capsys):
    with Show(9) as show:
        for step in range(1, 10):
            show.step(row(step, **({"val_loss": 2.0} if step == 4 else {})))
    assert shown(capsys) == ["step 1", "step 4", "step 9"]
    with Show(9, quiet=True) as show:
        show.step(row(1))
        show.note("no")
        show.table(SUMMARY)
    assert shown(capsys) == []


def test_the_time_that_is_left(clock, capsys):
    with Show(100, log_every=50) as show:
        for step in range(1, 51):
            clock.now += 2.0
            show.step(row(step))
    assert capsys.readouterr().out.splitlines()[-1].endswith("  1 min 40 s left")


def test_the_table(capsys):
    Show(10).table(SUMMARY)
    found = dict(facts(SUMMARY))
    assert [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()] == list(found)
    assert found["steps"] == "10 of 10" and found["wall clock"] == "1 h 02 min"
    assert found["best validation loss"] == "1.2500 at step 8"
    assert found["MFU"] == "43.2 % of 8 x NVIDIA H100 80GB HBM3"
    assert found["start-up"] == "12.0 s (first step 2.0 s)"
    assert found["goodput"] == "90.0 % (apart validation 5.0 s)"
    assert found["device memory"] == "peak 3.00 GiB, step predicted 5.0 MiB"
    bare = SUMMARY | {"mfu": None, "val_loss": None, "best_val_loss": None, "peak_bytes": None}
    found = dict(facts(bare | {"skipped": 0, "tokens_per_s": None, "startup_seconds": None}))
    assert not {"MFU", "tokens/s", "steps skipped", "best validation loss", "start-up"} & set(found)
    assert found["device memory"] == "step predicted 5.0 MiB"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_live_line_with_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    show = Show(9)
    with show:
        for step in range(5, 9):
            show.step(row(step))
        show._live._live.refresh()
        show.note("sample [bold]: as it is")
        show.step(row(9, val_loss=1.75))
    show.table(SUMMARY)
    text = terminal.getvalue()
    assert "8/9" in text and "step 8/9  loss 2.5000" in text
    assert "sample [bold]: as it is" in text and "val 1.7500" in text
    assert "best validation loss" in text and "│" in text
