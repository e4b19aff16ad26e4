"""Run in a process of its own: calls one kernel as a stored program and prints what came of it.

python -m tests.device.fresh KERNEL FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.aot import counter
from jaxllm.aot.program import Program
from jaxllm.aot.store import Store

__all__ = ["KERNELS"]


def _flash() -> tuple[Any, tuple[Any, ...]]:
    from pallas_kernels.flash_attention import flash_attention

    random = np.random.default_rng(0)
    shapes = [(2, 256, 8, 64), (2, 256, 2, 64), (2, 256, 2, 64)]
    args = tuple(jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes)
    return lambda *a: flash_attention(*a, causal=True, implementation="mosaic_gpu"), args


def _paged() -> tuple[Any, tuple[Any, ...]]:
    from pallas_kernels.paged_attention import paged_attention
    from tests.kernels.paged import CASES, arguments, options

    case = CASES["pages of 64"]
    more = options(case)
    args = arguments(case, jnp.dtype("bfloat16"))
    return lambda *a: paged_attention(*a, **more, implementation="mosaic_gpu"), args


def _quantized() -> tuple[Any, tuple[Any, ...]]:
    from pallas_kernels.quantized_matmul import quantized_matmul
    from tests.kernels.test_quantized_matmul import draw

    args = draw(8, 512, 1024)
    return lambda *a: quantized_matmul(*a, implementation="mosaic_gpu"), args


def _grouped() -> tuple[Any, tuple[Any, ...]]:
    from pallas_kernels.grouped_matmul import grouped_matmul

    random = np.random.default_rng(0)
    lhs = jnp.asarray(random.standard_normal((256, 128)), jnp.bfloat16)
    rhs = jnp.asarray(random.standard_normal((2, 128, 192)), jnp.bfloat16)
    args = (lhs, rhs, jnp.asarray([100, 156], jnp.int32))
    return lambda *a: grouped_matmul(*a, implementation="mosaic_gpu"), args


KERNELS = {"flash": _flash, "paged": _paged, "quantized": _quantized, "grouped": _grouped}


def main(name: str, folder: str) -> None:
    """Print whether the program was stored, what was compiled for it, and a hash of its result."""
    counter.start()
    call, args = KERNELS[name]()

    def build() -> Any:
        return call

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    program = Program(name=name, build=build, args=abstract, depends="fresh")
    jax.block_until_ready(args)
    before = counter.compilations()
    made = program.load(Store(Path(folder)))
    compiled = counter.compilations() - before
    first, again = (jax.device_get(jax.tree.leaves(made(*args))) for _ in range(2))
    hashes = [
        hashlib.sha256(b"".join(x.tobytes() for x in out)).hexdigest() for out in (first, again)
    ]
    print(
        json.dumps(
            {
                "stored": made.stored,
                "compiled": compiled,
                "finite": all(bool(np.isfinite(x.astype(np.float32)).all()) for x in first),
                "hashes": hashes,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
