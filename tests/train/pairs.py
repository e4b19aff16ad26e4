"""Several `jaxllm train` processes on this machine; none outlives its test."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxllm.train.config import RunConfig
from tests.house.tree import ROOT


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config_file(folder: Path, config: RunConfig, name: str = "config") -> Path:
    """A config file that gives exactly this config."""
    kept = folder / f"{name}.pickle"
    kept.write_bytes(pickle.dumps(config))
    path = folder / f"{name}.py"
    path.write_text(
        "import pathlib, pickle\n"
        f"def config():\n    return pickle.loads(pathlib.Path({str(kept)!r}).read_bytes())\n"
    )
    return path


def environment(**extra: str) -> dict[str, str]:
    """Of a child: two CPU devices, nothing of a cluster that this test may itself run on."""
    cluster = ("SLURM_", "JAXLLM_CO", "JAXLLM_NUM", "JAXLLM_PRO", "JAXLLM_CL", "KUBERNETES_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(cluster)}
    mine = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    return kept | mine | extra


def members(count: int) -> list[dict[str, str]]:
    """The environment of each process of a cluster of `count`."""
    address = f"127.0.0.1:{free_port()}"
    return [
        {
            "JAXLLM_COORDINATOR": address,
            "JAXLLM_NUM_PROCESSES": str(count),
            "JAXLLM_PROCESS_ID": str(i),
            "JAXLLM_CONNECT_SECONDS": "120",
        }
        for i in range(count)
    ]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]], each: Sequence[dict[str, str]]
) -> Iterator[list[subprocess.Popen]]:
    """One process a command (arguments of python), with what its environment adds."""
    children: list[subprocess.Popen] = []
    try:
        for command, extra in zip(commands, each, strict=True):
            children.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment(**extra),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def ended(children: Sequence[subprocess.Popen], timeout_s: float) -> list[tuple[int, str]]:
    """Exit code and output of each; a child that is still there at the end is killed (-9)."""
    until = time.monotonic() + timeout_s
    out = []
    for child in children:
        try:
            text = child.communicate(timeout=max(until - time.monotonic(), 1))[0]
        except subprocess.TimeoutExpired:
            for other in children:
                other.kill()
            text = child.communicate()[0]
        out.append((child.returncode, text))
    return out


def train_command(config: Path, *options: str) -> list[str]:
    """Arguments of python for `jaxllm train`."""
    return ["-m", "jaxllm.cli.main", "train", str(config), *options]
