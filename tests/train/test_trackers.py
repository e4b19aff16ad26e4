"""TensorBoard's files as TensorBoard reads them; Weights & Biases by a stand-in."""

import sys
import types
from pathlib import Path

import pytest

from jaxllm.errors import UnsupportedError
from jaxllm.train.loop import train
from jaxllm.train.trackers import Trackers, scalars
from tests.train.runs import small


def events(folder: Path):
    """Events of a log directory in the order of its files: records are framed by lengths and CRCs.

    A START of a session strikes out what was written for its step and later ones.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = [e for e in found if e[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_names_and_numbers_of_a_row():
    row = {"step": 3, "loss": 2.0, "grad_norm": float("inf"), "mfu": None, "val_loss": 1.5}
    assert scalars(row | {"tokens_per_s": 9, "skipped": 0}) == {
        "train/loss": 2.0,
        "validation/loss": 1.5,
        "speed/tokens_per_s": 9.0,
        "train/skipped": 0.0,
    }


def test_a_resume_strikes_out_the_steps_after_it(tmp_path):
    config = small(tmp_path)
    first = Trackers(config, tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.add({"step": step, "loss": float(step)})
    first.close()
    second = Trackers(config, tmp_path, 2)
    for step in (3, 4, 5):
        second.add({"step": step, "loss": 10.0 * step})
    second.close()
    found = events(tmp_path / "tensorboard")
    assert found == [
        (s, "train/loss", v) for s, v in [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    ]


class Board:
    """A stand-in for the wandb package."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def module(self):
        wandb = types.ModuleType("wandb")
        wandb.init = self.init
        return wandb

    def init(self, **options):
        self.begun.append(options)
        return self

    @property
    def id(self):
        return "abc123"

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board.module())
    config = small(tmp_path, wandb="toys", tensorboard=False)
    train(config, quiet=True)
    begun = board.begun[0]
    assert (begun["project"], begun["name"], begun["id"]) == ("toys", "run", None)
    assert begun["resume"] == "allow" and begun["config"]["steps"] == 12
    assert [step for step, _ in board.logged] == list(range(1, 13))
    assert "validation/loss" in board.logged[-1][1] and board.finished == 1
    assert not (Path(config.out) / "tensorboard").exists()
    Trackers(config, Path(config.out), 12).close()
    assert board.begun[1]["id"] == "abc123"


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small(tmp_path, wandb="toys")
    with pytest.raises(UnsupportedError, match="package `wandb` is not installed"):
        train(config, quiet=True)
    assert not Path(config.out).exists()
