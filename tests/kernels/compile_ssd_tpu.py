"""python -m tests.kernels.compile_ssd_tpu v5e:2x2: compiles every timed case, no TPU needed.

Scan and gradients in one program; a line a case. Needs the package libtpu, and the environment of
`tests.kernels.compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.shapes import CASES, Shaped
from tests.kernels.tpus import chip_mesh, num_kernels


def kernels(case: Shaped, mesh: Mesh) -> int:
    """How many kernels the compiled program holds."""

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def both(x, dt, a, b, c, ids, dy):
        def run(*inputs):
            return ssd(*inputs, segment_ids=ids, implementation="mosaic_tpu")[0]

        y, back = jax.vjp(run, x, dt, a, b, c)
        return y, *back(dy)

    tokens = (case.batch, case.length)
    x = of(*tokens, case.heads, case.width)
    shared = of(*tokens, case.groups, case.state)
    dt, a = of(*tokens, case.heads, dtype=jnp.float32), of(case.heads, dtype=jnp.float32)
    arguments = (x, dt, a, shared, shared, of(*tokens, dtype=jnp.int32), x)
    return num_kernels(both, arguments, mesh)


def main(topology: str) -> None:
    mesh = chip_mesh(topology)
    for name, case in CASES.items():
        print(f"{name}: {kernels(case, mesh)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
