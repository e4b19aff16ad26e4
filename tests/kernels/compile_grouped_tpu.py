"""python -m tests.kernels.compile_grouped_tpu v5e:2x2: compiles every timed case, no TPU needed.

Product and gradients in one program; a line a case. Needs the package libtpu, and `ENVIRONMENT`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.grouped_matmul import grouped_matmul, unfit
from pallas_kernels.grouped_matmul.shapes import CASES, Shaped
from pallas_kernels.target import targeting

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}
TYPES = {"v5e:2x2": "v5litepod-4", "v5p:2x2x1": "v5p-8", "v6e:2x2": "v6e-4"}  # TPU_ACCELERATOR_TYPE


def kernels(case: Shaped, mesh: Mesh) -> int:
    """How many kernels the compiled program holds."""
    whole = NamedSharding(mesh, PartitionSpec())

    def of(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def both(lhs, rhs, sizes, pull):
        def run(lhs, rhs):
            return grouped_matmul(lhs, rhs, sizes, implementation="mosaic_tpu")

        out, back = jax.vjp(run, lhs, rhs)
        return out, *back(pull)

    arguments = (
        of((case.rows, case.inputs)),
        of((case.groups, case.inputs, case.outputs)),
        of((case.groups,), jnp.int32),
        of((case.rows, case.outputs)),
    )
    with targeting("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both).trace(*arguments)
        return (
            traced.lower(lowering_platforms=("tpu",)).compile().as_text().count("tpu_custom_call")
        )


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    for name, case in CASES.items():
        sides = (case.inputs, case.outputs)
        obstacle = unfit("mosaic_tpu", dtype="bfloat16", sides=sides, platform="tpu")
        print(f"{name}: {obstacle or f'{kernels(case, mesh)} kernels'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
