"""python -m tests.kernels.compile_selective_tpu v5e:2x2: compiles the selective scan and its
gradients at the size of Mamba-1 1.4B, no TPU needed.

Needs the package libtpu, and the environment of `tests.kernels.compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.target import targeting


def kernels(mesh: Mesh, batch: int, length: int, channels: int, state: int) -> int:
    """How many kernels the compiled program holds."""
    whole = NamedSharding(mesh, PartitionSpec())

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def both(x, dt, a, b, c, ids, dy):
        def run(*inputs):
            return selective_scan(*inputs, segment_ids=ids, implementation="mosaic_tpu")[0]

        y, back = jax.vjp(run, x, dt, a, b, c)
        return y, *back(dy)

    x = of(batch, length, channels, dtype=jnp.bfloat16)
    by_state, ids = of(batch, length, state), of(batch, length, dtype=jnp.int32)
    dt, a = of(batch, length, channels), of(channels, state)
    with targeting("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both).trace(x, dt, a, by_state, by_state, ids, x)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    print(f"8 x 2048 x 4096, 16 states: {kernels(mesh, 8, 2048, 4096, 16)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
