"""A run on eight virtual devices is the run on one."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxllm.errors import CapacityError, ConfigError
from jaxllm.train.loop import train
from tests.train.runs import small
from tests.train.test_run import losses, rows

STEPS = {"steps": 20, "batch": 8, "eval_every": 20, "checkpoint_every": 8}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses by step on one device."""
    config = small(tmp_path_factory.mktemp("alone"), **STEPS)
    train(config, quiet=True)
    return losses(config.out)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_every_mesh_gives_the_losses_of_one_device(alone, tmp_path, mesh):
    config = small(tmp_path, mesh=mesh, **STEPS)
    train(config, quiet=True)
    found = losses(config.out)
    assert max(abs(found[s] - alone[s]) for s in alone) < 1e-5 * max(alone.values())


def test_a_run_goes_on_with_another_mesh(alone, tmp_path):
    """From the checkpoint at step 16, the one at step 20 being gone."""
    config = small(tmp_path, mesh="fsdp=4,tensor=2", **STEPS)
    train(config, quiet=True)
    shutil.rmtree(Path(config.out) / "checkpoints" / "20")
    train(dataclasses.replace(config, mesh="data=2,tensor=2"), quiet=True)
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [16]
    found = losses(config.out)
    assert list(found) == list(range(1, 21))
    assert max(abs(found[s] - alone[s]) for s in alone) < 1e-5 * max(alone.values())


@pytest.mark.parametrize(
    ("mesh", "named"),
    [("data=3", "multiple of data x fsdp"), ("data", "data=2"), ("stage=2", "training takes")],
)
def test_meshes_that_cannot_be(tmp_path, mesh, named):
    with pytest.raises(ConfigError, match=named):
        small(tmp_path, mesh=mesh, **STEPS)


def test_more_devices_than_there_are(tmp_path):
    with pytest.raises(CapacityError, match="needs 16 devices; 8"):
        train(small(tmp_path, mesh="data=8,tensor=2", **STEPS), quiet=True)
