"""TPUs that are not here, to compile for."""

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.target import targeting

TPUS = {"v5e:2x2x1": "v5litepod-4", "v5p:2x2x1": "v5p-8", "v6e:2x2x1": "v6e-4"}


def described(tpu: str, monkeypatch):
    """One chip of a topology; needs no TPU."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", TPUS[tpu]),
    ):
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc(tpu, platform="tpu").devices[0]


def chip_mesh(topology: str) -> Mesh:
    """One chip of a topology as a mesh; what describes it stands in the environment already."""
    return Mesh(np.array([topologies.get_topology_desc(topology, "tpu").devices[0]]), ("x",))


def num_kernels(function, arguments, mesh: Mesh) -> int:
    """How many kernels a function holds that is compiled for a mesh.

    Args:
      arguments: of `shape` and `dtype`, or None; whole on every device.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    with targeting("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*jax.tree.map(placed, arguments))
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text is not None
    return text.count('custom_call_target="tpu_custom_call"')
