"""A run on two processes is the run on one: losses, resumption, stopping, errors."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxllm.train.loop import train
from jaxllm.zoo.load import open_checkpoint
from tests.train.pairs import config_file, ended, members, started, train_command
from tests.train.runs import small
from tests.train.test_run import losses, rows

STEPS = {"steps": 10, "eval_every": 10, "checkpoint_every": 4, "keep": 4}
LIMIT_S = 240


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The config of a run on one device."""
    config = small(tmp_path_factory.mktemp("alone"), **STEPS)
    train(config, quiet=True)
    return config


def run_pair(folder, config, *options):
    """Train on two processes; exit codes and outputs."""
    command = train_command(config_file(folder, config), *options)
    with started([command] * 2, members(2)) as children:
        return ended(children, LIMIT_S)


def close(found, wanted):
    assert list(found) == list(wanted)
    return max(abs(found[s] - wanted[s]) for s in wanted) < 1e-5 * max(wanted.values())


def weights(folder):
    reader = open_checkpoint(Path(folder) / "model").reader
    return {name: reader.read(name) for name in reader.tensors}


def test_two_processes_and_then_one(alone, tmp_path):
    """The losses and the model of one process; one process goes on from the two's checkpoint."""
    config = small(tmp_path, mesh="data=2,fsdp=2", **STEPS)
    for code, text in (answers := run_pair(tmp_path, config)):
        assert code == 0, text
    assert "validation loss" in answers[0][1] and "validation loss" not in answers[1][1]
    found = rows(config.out)
    assert [r["step"] for r in found] == list(range(1, 11))
    assert close(losses(config.out), losses(alone.out))
    assert found[-1]["val_loss"] == pytest.approx(rows(alone.out)[-1]["val_loss"], rel=1e-5)
    wanted = weights(alone.out)
    for name, array in weights(config.out).items():
        assert abs(array - wanted[name]).max() < 1e-4
    assert not list(Path(config.out).glob(".hosts-*"))

    shutil.rmtree(Path(config.out) / "checkpoints" / "10")
    train(dataclasses.replace(config, mesh=""), quiet=True)
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [8]
    assert close(losses(config.out), losses(alone.out))
