"""python -m tests.kernels.compile_quantized_tpu v5e:2x2: compiles timed cases, no TPU needed.

A line a case. Needs the package libtpu, and `ENVIRONMENT` of `compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.shapes import CASES, Shaped
from pallas_kernels.target import targeting

HELD = {
    name: case
    for name, case in CASES.items()
    if case.kind in ("int4", "int8") and case.group >= 128 and case.rows in (1, 64, 512)
}


def kernels(case: Shaped, mesh: Mesh) -> int:
    """How many kernels the compiled program holds."""
    whole = NamedSharding(mesh, PartitionSpec())

    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    arguments = (
        of((case.rows, case.inputs), jnp.bfloat16),
        of((case.outputs, case.inputs), case.kind),
        of((case.outputs, case.inputs // case.group), jnp.float32),
    )

    def run(*arrays):
        return quantized_matmul(*arrays, implementation="mosaic_tpu", out_dtype="bfloat16")

    with targeting("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(run).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return str(compiled.as_text()).count("tpu_custom_call")


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    for name, case in HELD.items():
        print(f"{name}: {kernels(case, mesh)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
