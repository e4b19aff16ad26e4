"""TPUs that are not here, to compile for."""

from jax.experimental import topologies

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
