"""What a trace says of collectives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxllm.errors import ConfigError
from jaxllm.train.profile import communication, exposed


def test_exposed_is_what_nothing_covers():
    covers = [(1.0, 3.0), (2.0, 5.0), (11.0, 20.0)]
    total, alone = exposed([(0.0, 4.0), (2.0, 6.0), (10.0, 12.0)], covers)
    assert total == 8  # (0, 6) and (10, 12)
    assert alone == 3  # (0, 1), (5, 6), (10, 11)


def test_nothing_covers_or_all_does():
    assert exposed([(0.0, 2.0)], []) == (2, 2)
    assert exposed([(1.0, 2.0)], [(0.0, 3.0)]) == (1, 0)
    assert exposed([], [(0.0, 3.0)]) == (0, 0)


def event(name: str, start: float, stop: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, start_ns=start * 1e6, duration_ns=(stop - start) * 1e6)


def test_the_first_device_of_a_trace(tmp_path, monkeypatch):
    import jax.profiler

    work = SimpleNamespace(name="Stream #1", events=[event("fusion", 0, 5), event("gemm", 6, 8)])
    comm = SimpleNamespace(name="Stream #2", events=[event("ncclDevKernel_AllGather", 4, 7)])
    other = SimpleNamespace(name="XLA Ops", events=[event("all-reduce", 0, 100)])
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[work]),
        SimpleNamespace(name="/device:GPU:1", lines=[other]),
        SimpleNamespace(name="/device:GPU:0", lines=[work, comm, other]),
    ]
    (tmp_path / "a.xplane.pb").write_bytes(b"")
    data = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", data)
    found = communication(tmp_path)
    assert found == {
        "busy_ms": 8,
        "collective_ms": 3,
        "exposed_ms": 1,
        "ncclDevKernel_AllGather": 3,
    }


def test_a_cpu_has_no_streams(tmp_path):
    import jax
    import numpy as np

    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.device_put(np.ones(3)) + 1)
    assert communication(tmp_path) is None


def test_no_trace_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no trace in"):
        communication(tmp_path)
