"""python -m tests.kernels.compile_ssd_tpu v5e:2x2: compiles every timed case, no TPU needed.

Scan and gradients in one program; a line a case. Needs the package libtpu, and the environment of
`tests.kernels.compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.shapes import CASES, Shaped
from pallas_kernels.target import targeting


def kernels(case: Shaped, mesh: Mesh) -> int:
    """How many kernels the compiled program holds."""
    whole = NamedSharding(mesh, PartitionSpec())

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

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
    with targeting("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    for name, case in CASES.items():
        print(f"{name}: {kernels(case, mesh)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
