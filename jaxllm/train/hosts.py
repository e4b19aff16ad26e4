"""Several processes as one run: they meet, check that they agree, feed rows, stop together.

Every function here is called by all processes, in the same order. With one process none of them
communicates or compiles anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.aot.fingerprint import digest, package_hash
from jaxllm.core import runtime
from jaxllm.core.config import require, to_dict
from jaxllm.core.logging import log
from jaxllm.data.batch import Batch
from jaxllm.errors import ConfigError, user_errors
from jaxllm.train.config import RunConfig

__all__ = [
    "Agreement",
    "check_same",
    "check_shared",
    "everywhere",
    "is_main",
    "leaving",
    "own_rows",
    "place",
    "place_whole",
    "several",
    "start",
    "together",
]

_SHARED_WAIT_S = 60.0
_LEAVE_WAIT_S = 10.0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes metrics, config and model."""
    return jax.process_index() == 0


def start() -> None:
    """Join the processes of the cluster that the environment describes; without one do nothing.

    Must come before anything asks jax for devices.

    Raises:
      ConfigError: incomplete settings, or jax has made its devices already.
    """
    cluster = runtime.cluster()
    if cluster.kind != "alone" and not jax.distributed.is_initialized():
        _connect(cluster)
    if several() and not jax.distributed.is_initialized():
        raise ConfigError(
            f"jax sees {jax.process_count()} processes that did not meet each other: set "
            "JAXLLM_CLUSTER=tpu on a TPU slice, or JAXLLM_COORDINATOR, JAXLLM_NUM_PROCESSES and "
            "JAXLLM_PROCESS_ID"
        )
    if several():
        log.info("%d processes, %d devices", jax.process_count(), jax.device_count())
        if not is_main():
            log.setLevel(logging.WARNING)


def _connect(cluster: runtime.Cluster) -> None:
    if cluster.kind == "kubernetes":
        import importlib.util

        require(
            importlib.util.find_spec("kubernetes") is not None,
            "this pod is one of an Indexed Job. Set JAXLLM_COORDINATOR, JAXLLM_NUM_PROCESSES and "
            "JAXLLM_PROCESS_ID as scripts/k8s/jobset.yaml does, or install the package "
            "'kubernetes'; JAXLLM_CLUSTER=off trains in each pod by itself",
        )
    # SIGTERM is ours: jax's own handler would be replaced by Python's and never heard again.
    jax.config.update("jax_enable_preemption_service", False)
    # jax aborts the process when it runs out of time: ours comes first and says why.
    watch = threading.Timer(cluster.wait_s, _give_up, (cluster,))
    watch.daemon = True
    watch.start()
    # None: jax tries what it knows; its Kubernetes and TPU kinds cannot be asked for by one name.
    method = {"slurm": "slurm", "environment": "deactivate"}
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            list(cluster.local_devices),
            cluster_detection_method=method.get(cluster.kind),
            initialization_timeout=cluster.wait_s + 60,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes ({cluster.kind}) cannot meet: {error}") from error
    finally:
        watch.cancel()


def _give_up(cluster: runtime.Cluster) -> None:
    """End the process from the timer's thread: the main one is deep inside jax."""
    where = f" at {cluster.coordinator}" if cluster.coordinator else ""
    who = "this one" if cluster.process_id is None else f"process {cluster.process_id}"
    count = "all" if cluster.num_processes is None else f"all {cluster.num_processes}"
    waits = "waits for the others" if cluster.process_id == 0 else "looks for process 0"
    print(
        f"jaxllm: {count} processes ({cluster.kind}) did not meet within {cluster.wait_s} s; {who} "
        f"{waits}{where}. Check that every process was started, that the address and port can be "
        "reached, and that the numbers are right; JAXLLM_CONNECT_SECONDS waits longer",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """On an error, end this process soon: by itself it would wait at its exit for the others.

    They may be waiting for this one inside a step. One process: nothing.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, user_errors):
            print(f"jaxllm: process {jax.process_index()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # If all stop for the same reason they meet here, and none takes another for dead.
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(_LEAVE_WAIT_S)
        os._exit(2 if isinstance(error, user_errors) else 1)


def _gather(row: Any) -> np.ndarray:
    """[processes, ...]: the row of every process."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Do something that may fail in some processes only: then it fails in all.

    Raises:
      ConfigError: it failed elsewhere.
    """
    failure = None
    try:
        yield
    except user_errors as error:
        failure = error
    failed = _gather(np.uint32(failure is not None)) if several() else np.zeros(1)
    if failure is not None:
        raise failure
    if failed.any():
        raise ConfigError(f"{what} failed in {_named(failed)}; its own message says why")


def _named(wrong: np.ndarray) -> str:
    numbers = [str(i) for i in np.flatnonzero(wrong)]
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def check_same(config: RunConfig) -> None:
    """Compare code, versions and the resolved config with those of process 0.

    Raises:
      ConfigError: names the processes that differ, and in what.
    """
    if not several():
        return
    counts = np.bincount([d.process_index for d in jax.devices()])
    require(
        bool((counts == counts[0]).all()),
        f"processes have {', '.join(map(str, counts))} devices; give each the same number",
    )
    import jaxlib.version

    versions = f"{jax.__version__}, {jaxlib.version.__version__}"
    _compare({"the code of jaxllm": package_hash(), "the version of jax": versions})
    fields = [field.name for field in dataclasses.fields(config)]
    _compare({f"--{name}": to_dict(getattr(config, name)) for name in fields})


def _compare(parts: dict[str, Any]) -> None:
    hashes = [bytes.fromhex(digest(part)) for part in parts.values()]
    found = _gather(np.frombuffer(b"".join(hashes), np.uint32).reshape(len(parts), 8))
    differs = (found != found[:1]).any(-1)
    if differs.any():
        names = [name for name, wrong in zip(parts, differs.any(0), strict=True) if wrong]
        raise ConfigError(
            f"{_named(differs.any(1))} and process 0 differ in {', '.join(names)}; start all with "
            "the same code, config and options"
        )


def check_shared(folder: Path) -> None:
    """Check that all processes see one run directory.

    Raises:
      ConfigError: names the processes that see another.
    """
    if not several():
        return
    from jax.experimental import multihost_utils

    nonce = np.frombuffer(os.urandom(4), np.uint32)
    mark = folder / f".hosts-{nonce[0]:08x}"
    if is_main():
        mark.touch()
    nonce = np.asarray(multihost_utils.broadcast_one_to_all(nonce))
    mark = folder / f".hosts-{nonce[0]:08x}"
    # A network file system may show a new file late.
    until = time.monotonic() + _SHARED_WAIT_S
    while not (seen := mark.exists()) and time.monotonic() < until:
        os.listdir(folder)
        time.sleep(0.2)
    missing = _gather(np.uint32(not seen))
    if is_main():
        mark.unlink()
    require(
        not missing.any(),
        f"--out {folder} is another folder for {_named(missing)} than for process 0: give a folder "
        "on a file system that all processes share",
    )


def _rows_sharding(program: Any) -> Any:
    """How a program takes its last argument, a batch."""
    return jax.tree.leaves(program.compiled.input_shardings[0][-1])[0]


def own_rows(rows: int, *, program: Any) -> slice:
    """Which rows of a batch this process has to make for a program.

    Args:
      rows: of the whole batch.
      program: the executable; the batch is its last argument.
    """
    if not several():
        return slice(0, rows)
    sharding = _rows_sharding(program)
    # Any length that the devices divide: only the rows matter here.
    parts = sharding.addressable_devices_indices_map((rows, sharding.num_devices)).values()
    ends = [index[0].indices(rows)[:2] for index in parts]
    return slice(min(a for a, _ in ends), max(b for _, b in ends))


def place(own: Batch, rows: int, *, program: Any) -> Batch:
    """A batch as a program takes it, from this process's own rows of it.

    Args:
      own: the rows that `own_rows` says.
      rows: of the whole batch.
      program: the executable.
    """
    if not several():
        return own
    sharding, first = _rows_sharding(program), own_rows(rows, program=program).start

    def whole(own: Any) -> jax.Array:
        own = np.asarray(own)

        def take(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(rows)
            return own[(slice(begin - first, end - first), *index[1:])]

        return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, take)

    return jax.tree.map(whole, own)


def place_whole(batch: Batch, *, program: Any) -> Batch:
    """A batch, all of which every process has, as a program takes it."""
    rows = batch.tokens.shape[0]
    part = own_rows(rows, program=program)
    return place(jax.tree.map(lambda x: x[part], batch), rows, program=program)


def everywhere(mesh: Any = None) -> NamedSharding:
    """Copied on all devices."""
    if mesh is None:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=auto)
    return NamedSharding(mesh, PartitionSpec())


class Agreement:
    """All processes leave the loop after the same step, when any of them wants to.

    The wishes of a step go round the devices as one number, and are read when the next step has
    been handed to them: nobody waits. One process agrees with itself at once.
    """

    def __init__(self) -> None:
        self._last: Any = None
        if not several():
            return
        copied = everywhere()
        split = NamedSharding(copied.mesh, PartitionSpec("all"))
        count = (jax.device_count(),)
        self._wishes = [
            jax.make_array_from_callback(count, split, lambda _, w=w: np.full(1, w, np.int32))
            for w in (0, 1)
        ]
        largest = jax.jit(lambda wishes: wishes.max(), out_shardings=copied)
        self._largest = largest.lower(self._wishes[0]).compile()

    def __call__(self, wish: bool) -> bool:
        """Whether to stop after this step; called once a step, with the wish to stop."""
        if not several():
            return wish
        before, self._last = self._last, self._largest(self._wishes[wish])
        return before is not None and bool(before)
