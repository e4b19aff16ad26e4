"""python -m tests.kernels.compile_selective_tpu v5e:2x2: compiles the selective scan and its
gradients at the size of Mamba-1 1.4B, no TPU needed.

Needs the package libtpu, and the environment of `tests.kernels.compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.selective_scan import selective_scan
from tests.kernels.tpus import chip_mesh, num_kernels


def kernels(mesh: Mesh, batch: int, length: int, channels: int, state: int) -> int:
    """How many kernels the compiled program holds."""

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def both(x, dt, a, b, c, ids, dy):
        def run(*inputs):
            return selective_scan(*inputs, segment_ids=ids, implementation="mosaic_tpu")[0]

        y, back = jax.vjp(run, x, dt, a, b, c)
        return y, *back(dy)

    x = of(batch, length, channels, dtype=jnp.bfloat16)
    by_state, ids = of(batch, length, state), of(batch, length, dtype=jnp.int32)
    dt, a = of(batch, length, channels), of(channels, state)
    return num_kernels(both, (x, dt, a, by_state, by_state, ids, x), mesh)


def main(topology: str) -> None:
    mesh = chip_mesh(topology)
    print(f"8 x 2048 x 4096, 16 states: {kernels(mesh, 8, 2048, 4096, 16)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
