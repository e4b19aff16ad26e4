"""The process's surroundings: cache folders, environment variables, the cluster it belongs to.

Nothing else in jaxllm reads the environment, so this page is the whole list of what it obeys.
Importing it costs nothing: no jax.
"""

import dataclasses
import os
import re
import stat
from pathlib import Path
from typing import Literal

from jaxllm.errors import CapacityError, ConfigError

__all__ = [
    "Cluster",
    "cache_dir",
    "cluster",
    "compile_for_tpu",
    "data_dir",
    "hf_endpoint",
    "hf_offline",
    "models_dir",
    "programs_dir",
    "weights_dir",
    "xla_flags",
]


def cache_dir() -> Path:
    """The user's cache folder, made (mode 0700) if absent.

    `JAXLLM_CACHE`, else `$XDG_CACHE_HOME/jaxllm`, else `~/.cache/jaxllm`.

    Raises:
        CapacityError: the folder cannot be made or written to.
    """
    if own := os.environ.get("JAXLLM_CACHE"):
        return _writable(Path(own).expanduser().absolute())
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _writable(Path(base).expanduser().absolute() / "jaxllm")


def models_dir() -> Path:
    """Where pulled models are kept, one folder a catalogue name."""
    return _writable(cache_dir() / "models")


def weights_dir() -> Path:
    """Where weights in run layout are kept, keyed by the SHA-256 of their source."""
    return _writable(cache_dir() / "weights")


def data_dir() -> Path:
    """Where pulled data and tokenised shards are kept."""
    return _writable(cache_dir() / "data")


def programs_dir() -> Path:
    """Where compiled executables are kept. An executable is code: only its owner may write here.

    Raises:
        CapacityError: the folder belongs to somebody else, or cannot be made or written to.
    """
    path = _writable(cache_dir() / "programs")
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise CapacityError(
            f"{path} belongs to user {status.st_uid}, and stored programs are run as code; "
            "set JAXLLM_CACHE to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
    return path


def hf_endpoint() -> str | None:
    """The address of the Hugging Face hub if `HF_ENDPOINT` moves it, else None."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def hf_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids asking the hub."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def xla_flags() -> str:
    """`XLA_FLAGS`, one space between words (order counts: the last of two equals wins)."""
    return " ".join(os.environ.get("XLA_FLAGS", "").split())


def compile_for_tpu(accelerator: str) -> None:
    """Let libtpu compile in this process without a TPU; what is set already stays.

    Args:
        accelerator: a type of the generation, such as `v5p-8`.
    """
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # two processes at once abort on its lock file
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", accelerator),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)


_OWN = ("JAXLLM_COORDINATOR", "JAXLLM_NUM_PROCESSES", "JAXLLM_PROCESS_ID")
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
_KINDS = ("auto", "off", "slurm", "kubernetes", "tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that this one works with.

    Attributes:
      kind: `alone`, or who says which processes there are.
      coordinator: host:port of process 0; None where jax finds it, like the two numbers.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      local_devices: indices of the GPUs that this process takes; empty for all that it sees.
      wait_s: seconds until all must have come together.
    """

    kind: Literal["alone", "environment", "slurm", "kubernetes", "tpu"]
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] = ()
    wait_s: int = 300


def cluster() -> Cluster:
    """Which processes this one belongs to, from the environment.

    `JAXLLM_COORDINATOR` (host:port), `JAXLLM_NUM_PROCESSES` and `JAXLLM_PROCESS_ID`; else what
    Slurm, an Indexed Job of Kubernetes or the TPU hosts of GKE set. `JAXLLM_CLUSTER` (`off`,
    `slurm`, `kubernetes`, `tpu`) overrules what is found, `JAXLLM_CONNECT_SECONDS` the wait.

    Raises:
        ConfigError: settings that are incomplete or contradict each other.
    """
    asked = os.environ.get("JAXLLM_CLUSTER") or "auto"
    if asked not in _KINDS:
        raise ConfigError(f"JAXLLM_CLUSTER={asked}: allowed: {', '.join(_KINDS)}")
    wait_s = _number("JAXLLM_CONNECT_SECONDS", 300, least=1)
    given = [name for name in _OWN if os.environ.get(name)]
    if given and asked != "auto":
        raise ConfigError(f"JAXLLM_CLUSTER={asked} contradicts {given[0]}; unset one of them")
    if given:
        return _own_cluster(given, wait_s)
    if asked == "tpu" or (asked == "auto" and "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")):
        return Cluster(kind="tpu", wait_s=wait_s)
    if _has(_SLURM, asked, "slurm") and (tasks := _number("SLURM_NTASKS", 1, least=1)) > 1:
        return Cluster(
            kind="slurm",
            num_processes=tasks,
            process_id=_number("SLURM_PROCID", 0),
            local_devices=_slurm_devices(tasks),
            wait_s=wait_s,
        )
    if _has(_KUBERNETES, asked, "kubernetes"):
        return Cluster(kind="kubernetes", wait_s=wait_s)
    return Cluster(kind="alone")


def _own_cluster(given: list[str], wait_s: int) -> Cluster:
    count = _number("JAXLLM_NUM_PROCESSES", 0)
    if given == ["JAXLLM_NUM_PROCESSES"] and count == 1:
        return Cluster(kind="alone")
    missing = [name for name in _OWN if name not in given]
    if missing:
        raise ConfigError(
            f"{' and '.join(given)} set, {' and '.join(missing)} not: several processes need all "
            "three; for one process unset them"
        )
    address, number = os.environ["JAXLLM_COORDINATOR"], _number("JAXLLM_PROCESS_ID", 0)
    if not re.fullmatch(r".+:[0-9]{1,5}", address):
        raise ConfigError(f"JAXLLM_COORDINATOR={address}: write host:port of process 0")
    if number >= count:
        raise ConfigError(
            f"JAXLLM_PROCESS_ID={number}: with JAXLLM_NUM_PROCESSES={count} it is below {count}, "
            "counted from 0"
        )
    return Cluster(
        kind="environment",
        coordinator=address,
        num_processes=count,
        process_id=number,
        wait_s=wait_s,
    )


def _has(names: tuple[str, ...], asked: str, kind: str) -> bool:
    """Whether a kind is chosen: all its variables are there, and nothing else was asked for."""
    missing = [name for name in names if name not in os.environ]
    if asked == kind and missing:
        way = {"slurm": "start the processes by srun", "kubernetes": "use an Indexed Job"}[kind]
        raise ConfigError(f"JAXLLM_CLUSTER={kind}, but {', '.join(missing)} not set: {way}")
    return asked in ("auto", kind) and not missing


def _slurm_devices(tasks: int) -> tuple[int, ...]:
    """The GPUs of a Slurm task: all it sees, unless tasks of one node see the same several.

    jax by itself takes GPU number SLURM_LOCALID: one task a node would leave all but one idle, and
    tasks that Slurm binds to one GPU each would look for GPUs that they do not see.
    """
    alone_on_node = _number("SLURM_STEP_NUM_NODES", 1) == tasks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if alone_on_node or (visible and "," not in visible):
        return ()
    return (_number("SLURM_LOCALID", 0),)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text}: must be a whole number from {least} on")
    return int(text)


def _writable(path: Path) -> Path:
    try:
        # 0700 for every folder made on the way: mkdir's own `parents` ignores the mode.
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CapacityError(
            f"the cache folder {path} cannot be made ({error.strerror}); "
            "set JAXLLM_CACHE to a folder that can be written to"
        ) from error
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise CapacityError(
            f"the cache folder {path} cannot be written to; "
            "set JAXLLM_CACHE to a folder that can be written to"
        )
    return path
