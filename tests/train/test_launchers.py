"""The launchers: what they start, and that the environment they make is the one that is read."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from jaxllm.core import runtime
from jaxllm.errors import ConfigError
from jaxllm.train import hosts
from tests.house.tree import ROOT

SLURM = ROOT / "scripts/launch_slurm.sh"
TPU = ROOT / "scripts/tpu_vm.sh"
JOBSET = ROOT / "scripts/k8s/jobset.yaml"
# What srun sets for the second of two tasks, one a node.
TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
NAMES = ("SLURM_", "JAXLLM_", "KUBERNETES_", "TPU_", "CUDA_VISIBLE", "JOB_COMPLETION")


@pytest.fixture
def bare(monkeypatch):
    """An environment without any cluster; gives the monkeypatch."""
    for name in list(os.environ):
        if name.startswith(NAMES):
            monkeypatch.delenv(name)
    return monkeypatch


def put(bare, **values):
    for name, value in values.items():
        bare.setenv(name, value)


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", [SLURM, TPU])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.stat().st_mode & 0o111 == 0o111
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script]).returncode == 0


def slurm(tmp_path, *arguments, srun="", **extra):
    """Run the script between stubs; what was called, and how it ended."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    stub(tools, "srun", f'printf "%s\\n" srun "$@" >>{calls}; {srun}')
    stub(tools, "scontrol", f'printf "%s\\n" scontrol "$@" >>{calls}')
    job = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(tmp_path)}
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SLURM, *arguments], env=os.environ | job | path | extra, capture_output=True
    )
    return (calls.read_text().split("\n") if calls.exists() else []), done


def test_slurm_starts_one_command(tmp_path):
    srun = 'mkdir -p "$7/model"; touch "$7/model/config.json"'
    calls, done = slurm(tmp_path, "c.py", "runs/a b", "--mesh", "fsdp=16", srun=srun)
    assert done.returncode == 0, done.stderr
    command = ["jaxllm", "train", "c.py", "--out", "runs/a b", "--mesh", "fsdp=16"]
    assert calls == ["srun", "--kill-on-bad-exit=1", "--wait=60", *command, ""]


def test_slurm_queues_again_what_was_told_to_stop(tmp_path):
    calls, done = slurm(tmp_path, "c.py", "run", srun="mkdir -p run/checkpoints/40")
    assert done.returncode == 0
    assert calls[-4:] == ["scontrol", "requeue", "4711", ""]


@pytest.mark.parametrize("srun", ["mkdir -p run/checkpoints/40; exit 2", "true"])
def test_slurm_does_not_repeat_errors(tmp_path, srun):
    calls, done = slurm(tmp_path, "c.py", "run", srun=srun)
    assert done.returncode == (2 if "exit" in srun else 0)
    assert "scontrol" not in calls


def test_slurm_needs_its_arguments(tmp_path):
    calls, done = slurm(tmp_path, "c.py")
    assert (calls, done.returncode) == ([], 2)
    assert b"usage" in done.stderr


def test_slurm_environment_is_read(bare):
    put(bare, **TASK)
    found = runtime.cluster()
    assert found == runtime.Cluster(kind="slurm", num_processes=2, process_id=1)
    # And jax, which finds the coordinator, reads the same.
    from jax._src.clusters import SlurmCluster

    assert SlurmCluster.is_env_present()
    address = SlurmCluster.get_coordinator_address(None, None)
    assert re.fullmatch(r"node003:\d+", address)
    assert SlurmCluster.get_process_count() == 2 and SlurmCluster.get_process_id() == 1


@pytest.mark.parametrize(
    ("visible", "nodes", "wanted"),
    [("", "2", ()), ("0,1,2,3", "2", ()), ("0,1,2,3", "1", (1,)), ("3", "1", ()), ("", "1", (1,))],
)
def test_gpus_of_a_slurm_task(bare, visible, nodes, wanted):
    put(bare, **TASK | {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": nodes})
    bare.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert runtime.cluster().local_devices == wanted


def test_one_slurm_task_is_alone(bare):
    put(bare, **TASK | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert runtime.cluster().kind == "alone"


def test_nothing_is_set(bare):
    assert runtime.cluster().kind == "alone"
    # A notebook in a pod, and one TPU host, are one process.
    put(bare, KUBERNETES_SERVICE_HOST="10.0.0.1", TPU_WORKER_HOSTNAMES="localhost")
    assert runtime.cluster().kind == "alone"


def test_other_clusters(bare):
    put(bare, KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    assert runtime.cluster().kind == "kubernetes"
    put(bare, TPU_WORKER_HOSTNAMES="a,b")
    assert runtime.cluster().kind == "tpu"
    put(bare, JAXLLM_CLUSTER="off")
    assert runtime.cluster().kind == "alone"


OWN = {
    "JAXLLM_COORDINATOR": "a:1",
    "JAXLLM_NUM_PROCESSES": "2",
    "JAXLLM_PROCESS_ID": "1",
}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"JAXLLM_COORDINATOR": "a:1"}, "NUM_PROCESSES and JAXLLM_PROCESS_ID not"),
        ({"JAXLLM_NUM_PROCESSES": "2"}, "JAXLLM_COORDINATOR and JAXLLM_PROCESS_ID not"),
        (OWN | {"JAXLLM_COORDINATOR": "a"}, "host:port"),
        (OWN | {"JAXLLM_PROCESS_ID": "2"}, "below 2"),
        (OWN | {"JAXLLM_PROCESS_ID": "x"}, "whole number"),
        (OWN | {"JAXLLM_CLUSTER": "off"}, "contradicts JAXLLM_COORDINATOR"),
        ({"JAXLLM_CLUSTER": "pbs"}, "allowed: auto, off, slurm"),
        ({"JAXLLM_CLUSTER": "slurm"}, "SLURM_JOB_ID.* not set: start the processes by srun"),
        ({"JAXLLM_CLUSTER": "kubernetes"}, "JOB_COMPLETION_INDEX not set"),
        ({"JAXLLM_CONNECT_SECONDS": "0"}, "from 1 on"),
    ],
)
def test_settings_that_cannot_be(bare, values, named):
    put(bare, **values)
    with pytest.raises(ConfigError, match=named):
        runtime.cluster()


def test_our_own_variables_win(bare):
    put(bare, **TASK, **OWN)
    found = runtime.cluster()
    assert (found.kind, found.coordinator) == ("environment", "a:1")
    assert (found.num_processes, found.process_id) == (2, 1)


def test_a_pod_that_cannot_ask_its_cluster(bare):
    put(bare, KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    bare.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"JAXLLM_COORDINATOR.*JAXLLM_CLUSTER=off"):
        hosts.start()


def test_jax_was_used_before(bare):
    jax.devices()
    put(bare, **OWN)
    with pytest.raises(ConfigError, match=r"cannot meet: .*must be called before"):
        hosts.start()


def jobset():
    content = yaml.safe_load(JOBSET.read_text())
    (job,) = content["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    return content, job, pod


def test_the_jobset_is_consistent(bare):
    content, job, pod = jobset()
    assert content["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and content["kind"] == "JobSet"
    spec, (container,) = job["template"]["spec"], pod["containers"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] == 2
    values = {e["name"]: e.get("value") for e in container["env"]}
    name = content["metadata"]["name"]
    assert values["JAXLLM_NUM_PROCESSES"] == str(spec["parallelism"])
    assert values["JAXLLM_COORDINATOR"].startswith(f"{name}-{job['name']}-0-0.{name}:")
    port = int(values["JAXLLM_COORDINATOR"].rpartition(":")[2])
    assert {"containerPort": port} in container["ports"]
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["volumes"]}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * spec["parallelism"]
    assert values["MESH"] == f"fsdp={gpus}"
    ours = {k: v or "1" for k, v in values.items() if k.startswith("JAXLLM_")}
    put(bare, KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1", **ours)
    found = runtime.cluster()
    assert (found.kind, found.num_processes, found.process_id) == ("environment", 2, 1)
    assert found.wait_s == 900


@pytest.mark.parametrize(
    ("jaxllm", "told", "wanted"),
    [
        ('mkdir -p "$OUT/model"; touch "$OUT/model/config.json"', False, 0),
        ("exit 2", False, 2),
        ("trap 'echo saved; exit 0' TERM; touch ready; while true; do sleep 0.1; done", True, 75),
    ],
)
def test_the_pods_shell(tmp_path, jaxllm, told, wanted):
    """It ends well for a finished run only, and hands SIGTERM on."""
    (container,) = jobset()[2]["containers"]
    stub(tmp_path, "jaxllm", jaxllm)
    stub(tmp_path, "sleep", '/bin/sleep "$(awk "BEGIN{print $1/30}")"')
    variables = {"CONFIG": "c.py", "DATA": "d", "OUT": str(tmp_path / "out"), "MESH": "fsdp=2"}
    child = subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 30
        while told and not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.05)
        if told:
            child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    assert child.returncode == wanted, said
    assert ("saved" in said) == told


@pytest.mark.parametrize("there", [True, False])
def test_the_tpu_script(tmp_path, there):
    """The calls of gcloud, in order; a slice is made only if it is not there."""
    calls = tmp_path / "calls"
    answer = "true" if there else '[ "$4" != describe ]'
    stub(tmp_path, "gcloud", f'printf "%s " "$@" >>{calls}; echo >>{calls}; {answer}')
    stub(tmp_path, "git", "true")
    environment = {"ZONE": "z1", "TYPE": "v5litepod-16", "SPOT": "1", "SHARE": "10.0.0.2:/runs"}
    done = subprocess.run(
        ["bash", TPU, "one", "configs/shakespeare_char.py", "--mesh", "fsdp=16", "--data", "a b"],
        env=os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = calls.read_text()
    verbs = re.findall(r"^compute tpus tpu-vm (\w+)", text, re.MULTILINE)
    assert verbs == ["describe", *([] if there else ["create"]), "scp", "ssh", "ssh"]
    assert text.count("--worker=all") == 3 and text.count("--zone=z1") == len(verbs)
    assert ("--spot" in text) == (not there)
    run = "exec env JAXLLM_CLUSTER=tpu .venv/bin/jaxllm train configs/shakespeare_char.py"
    assert f"{run} --out /mnt/shared/one --mesh fsdp=16 --data a\\ b" in text
