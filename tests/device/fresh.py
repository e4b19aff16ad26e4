"""Run in a process of its own: our kernels as stored programs, and what came of each as JSON.

python -m tests.device.fresh FOLDER
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.aot import counter
from jaxllm.aot.program import Program
from jaxllm.aot.store import Store

__all__ = ["KERNELS", "alone"]

Call = tuple[Any, tuple[Any, ...]]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is called on a GPU that others use too, one process at a time."""
    with open(os.environ.get("GPU_LOCK", os.devnull), "w") as file:
        if file.name != os.devnull:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flash() -> Call:
    from pallas_kernels.flash_attention import flash_attention

    random = np.random.default_rng(0)
    shapes = [(2, 256, 8, 64), (2, 256, 2, 64), (2, 256, 2, 64)]
    args = tuple(random.standard_normal(s).astype(jnp.bfloat16) for s in shapes)
    return lambda *a: flash_attention(*a, causal=True, implementation="mosaic_gpu"), args


def _paged() -> Call:
    from pallas_kernels.paged_attention import paged_attention
    from tests.kernels.paged import CASES, arguments, options

    case = CASES["pages of 64"]
    more = options(case)
    args = arguments(case, jnp.dtype("bfloat16"))
    return lambda *a: paged_attention(*a, **more, implementation="mosaic_gpu"), args


def _quantized() -> Call:
    from pallas_kernels.quantized_matmul import quantized_matmul
    from tests.kernels.test_quantized_matmul import draw

    args = draw(8, 512, 1024)
    return lambda *a: quantized_matmul(*a, implementation="mosaic_gpu"), args


def _grouped() -> Call:
    from pallas_kernels.grouped_matmul import grouped_matmul

    random = np.random.default_rng(0)
    lhs = random.standard_normal((256, 128)).astype(jnp.bfloat16)
    rhs = random.standard_normal((2, 128, 192)).astype(jnp.bfloat16)
    args = (lhs, rhs, np.asarray([100, 156], np.int32))
    return lambda *a: grouped_matmul(*a, implementation="mosaic_gpu"), args


KERNELS = {"flash": _flash, "paged": _paged, "quantized": _quantized, "grouped": _grouped}


def host(args: Any) -> Any:
    """Arguments as arrays of the host, so that making them ready compiles nothing later."""
    return jax.tree.map(np.asarray, args)


def loaded(name: str, call: Any, args: Any, folder: str) -> Any:
    """The program of a kernel, stored or compiled."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    program = Program(name=name, build=lambda: call, args=abstract, depends="fresh")
    return program.load(Store(Path(folder)))


def called(program: Any, args: Any) -> dict[str, Any]:
    """Call a program twice."""
    outs = [jax.device_get(jax.tree.leaves(program(*args))) for _ in range(2)]
    hashes = [hashlib.sha256(b"".join(x.tobytes() for x in out)).hexdigest() for out in outs]
    fine = all(bool(np.isfinite(x.astype(np.float32)).all()) for x in outs[0])
    return {"stored": program.stored, "finite": fine, "hashes": hashes}


def main(folder: str) -> None:
    """Print what came of every kernel, and how much was compiled for them."""
    counter.start()
    with alone():  # some draw their arguments with jax
        cases = {name: make() for name, make in KERNELS.items()}
        cases = {name: (call, host(args)) for name, (call, args) in cases.items()}
    before = counter.compilations()
    programs = {name: loaded(name, *case, folder) for name, case in cases.items()}
    compiled = counter.compilations() - before
    with alone():
        found = {name: called(programs[name], cases[name][1]) for name in KERNELS}
    print(json.dumps({"compiled": compiled, "kernels": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
