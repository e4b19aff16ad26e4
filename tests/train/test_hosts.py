"""A run on two processes is the run on one: losses, resumption, stopping, errors."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from jaxllm.spec.model import sub
from jaxllm.spec.ops import Attention
from jaxllm.train.loop import train
from jaxllm.zoo.load import open_checkpoint
from tests.train.pairs import config_file, ended, members, started, train_command
from tests.train.runs import config_of, small
from tests.train.test_run import losses, rows

STEPS = {"steps": 10, "eval_every": 10, "checkpoint_every": 4, "keep": 4}
LIMIT_S = 400


def _four_heads():
    """The toy with heads for tensor=4."""
    spec = config_of().spec
    (block,) = spec.blocks
    attn = Attention(heads=4, kv_heads=1, head_dim=8)
    subs = (sub("attn", attn, norm_in=spec.final_norm), block.subs[1])
    return dataclasses.replace(spec, blocks=(dataclasses.replace(block, subs=subs),))


FOUR_HEADS = _four_heads()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The config of a run on one device."""
    config = small(tmp_path_factory.mktemp("alone"), spec=FOUR_HEADS, **STEPS)
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
    config = small(tmp_path, mesh="data=2,fsdp=2", spec=FOUR_HEADS, **STEPS)
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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "fsdp=4", "tensor=2,data=2", "tensor=4"])
def test_every_mesh_over_two_processes(alone, tmp_path, mesh):
    """With tensor=4 both processes make the same rows."""
    config = small(tmp_path, mesh=mesh, spec=FOUR_HEADS, **STEPS)
    for code, text in run_pair(tmp_path, config):
        assert code == 0, text
    assert close(losses(config.out), losses(alone.out))


@pytest.mark.slow
def test_one_process_and_then_two(alone, tmp_path):
    config = small(tmp_path, mesh="", spec=FOUR_HEADS, **STEPS)
    # Two steps of warm-up: the learning rate of later ones depends on the length of the run.
    train(dataclasses.replace(config, steps=2), quiet=True)
    for code, text in run_pair(tmp_path, dataclasses.replace(config, mesh="fsdp=2,tensor=2")):
        assert code == 0, text
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [2]
    assert close(losses(config.out), losses(alone.out))


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_stops_both(tmp_path, told):
    endless = {"steps": 10**6, "eval_every": 10**6, "checkpoint_every": 10**6}
    config = small(tmp_path, mesh="fsdp=4", **endless)
    command = train_command(config_file(tmp_path, config))
    with started([command] * 2, members(2)) as children:
        wait_for_steps(children, Path(config.out) / "metrics.jsonl", 5)
        children[told].send_signal(signal.SIGTERM)
        answers = ended(children, LIMIT_S)
    for code, text in answers:
        assert code == 0, text
    last = rows(config.out)[-1]["step"]
    saved = [p.name for p in (Path(config.out) / "checkpoints").iterdir() if p.name.isdecimal()]
    assert saved == [str(last)] and last > 5
    assert not (Path(config.out) / "model").exists()


def wait_for_steps(children, path, count):
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and all(child.poll() is None for child in children):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.2)
    pytest.fail(f"no {count} steps: {ended(children, 1)}")


@pytest.mark.slow
def test_configs_that_differ(tmp_path):
    config = small(tmp_path, mesh="data=4", spec=FOUR_HEADS, **STEPS)
    file = config_file(tmp_path, config)
    commands = [train_command(file), train_command(file, "--seed", "5", "--length", "8")]
    with started(commands, members(2)) as children:
        answers = ended(children, LIMIT_S)
    for code, text in answers:
        assert code == 2, text
        assert "process 1 and process 0 differ in --length, --seed" in text
        assert "Traceback" not in text
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_both(tmp_path):
    """A run directory that is not shared, and data that one of them cannot read."""
    config = small(tmp_path, mesh="data=4", data="text.txt", out="run", spec=FOUR_HEADS, **STEPS)
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
    shutil.copy(tmp_path / "text.txt", tmp_path / "0")
    command = ["-c", RUN_IN_FOLDER, str(config_file(tmp_path, config))]
    each = [extra | {"RUN_IN": str(tmp_path / str(i))} for i, extra in enumerate(members(2))]
    with started([command] * 2, each) as children:
        answers = ended(children, LIMIT_S)
    assert [code for code, _ in answers] == [2, 2], answers
    assert "opening the data or the run directory failed in process 1" in answers[0][1]
    assert "--data text.txt: there is no such file" in answers[1][1]

    shutil.copy(tmp_path / "text.txt", tmp_path / "1")
    each = [extra | members(2)[0] | {"RUN_IN": extra["RUN_IN"]} for extra in each]
    each[1]["JAXLLM_PROCESS_ID"] = "1"
    each[1]["JAXLLM_COORDINATOR"] = each[0]["JAXLLM_COORDINATOR"]
    with started([command] * 2, each) as children:
        answers = ended(children, LIMIT_S)
    for code, text in answers:
        assert code == 2, text
        assert "is another folder for process 1 than for process 0" in text


RUN_IN_FOLDER = """
import os, sys
os.chdir(os.environ["RUN_IN"])
from jaxllm.train import hosts
hosts._SHARED_WAIT_S = 1.0
from jaxllm.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""


def slurm_members():
    """What srun sets for two tasks of one node; jax takes the port from the job's number."""
    each = {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": str(os.getpid() % 2**12),
        "JAXLLM_CONNECT_SECONDS": "120",
    }
    return [each | {"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01"]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [lambda: members(2), slurm_members], ids=["own", "slurm"])
def test_a_mesh_that_leaves_devices_out(tmp_path, cluster):
    config = small(tmp_path, mesh="data=2", spec=FOUR_HEADS, **STEPS)
    command = train_command(config_file(tmp_path, config))
    with started([command] * 2, cluster()) as children:
        answers = ended(children, LIMIT_S)
    for code, text in answers:
        assert code == 2, text
        assert "takes 2 devices of 4 on 2 processes" in text and "fsdp=4" in text


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_nobody_joins(tmp_path, who):
    config = small(tmp_path, mesh="data=4", spec=FOUR_HEADS, **STEPS)
    extra = members(2)[who] | {"JAXLLM_CONNECT_SECONDS": "2"}
    with started([train_command(config_file(tmp_path, config))], [extra]) as children:
        ((code, text),) = ended(children, LIMIT_S)
    assert code == 2, text
    assert "all 2 processes (environment) did not meet within 2 s" in text
    assert extra["JAXLLM_COORDINATOR"] in text and f"process {who}" in text


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """Process 1 dies in the middle of the steps; process 0 does not wait for ever."""
    config = small(tmp_path, mesh="data=4", **STEPS | {"steps": 10**6})
    command = ["-c", DIE_AT_STEP_5, str(config_file(tmp_path, config))]
    with started([command] * 2, members(2)) as children:
        answers = ended(children, LIMIT_S)
    assert answers[1][0] == 2 and "process 1: no more" in answers[1][1], answers
    assert answers[0][0] not in (0, -9), answers


DIE_AT_STEP_5 = """
import os, sys
from jaxllm.errors import CapacityError
from jaxllm.train import hosts
real = hosts.place
def place(own, rows, *, program, calls=[]):
    calls.append(0)
    if os.environ["JAXLLM_PROCESS_ID"] == "1" and len(calls) == 7:
        raise CapacityError("no more")
    return real(own, rows, program=program)
hosts.place = place
from jaxllm.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""
