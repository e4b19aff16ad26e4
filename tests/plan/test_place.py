"""Places: what is known, and errors that say what to write."""

import importlib.util

import pytest

from jaxllm.errors import CapacityError, ConfigError, UnsupportedError
from jaxllm.plan.place import find_place
from jaxllm.train.devices import limits, peak_flops

KNOWN = "a100, a100-40gb, b200, cpu, gh200, h100, h200, l4, l40s, tpu7x, v5e, v5p, v6e"


def test_an_unknown_device_lists_the_known():
    with pytest.raises(
        ConfigError, match=f"unknown device 'v5x'; did you mean 'v5.'. allowed: {KNOWN}"
    ):
        find_place("v5x:2x2")


@pytest.mark.parametrize("text", ["v5e", "h100", "cpu:", "v5e:0x4", "v5e:4x", "h100:x"])
def test_a_shape_is_needed(text):
    with pytest.raises(ConfigError, match="write a shape of chips after the name, such as"):
        find_place(text)


def test_gpus_have_a_number():
    with pytest.raises(ConfigError, match="write a number of devices, h100:8"):
        find_place("h100:2x4")


def test_too_many_cpus():
    with pytest.raises(ConfigError, match="at most 1024"):
        find_place("h100:2048")
    with pytest.raises(CapacityError, match="this process has 8 CPU devices already"):
        find_place("cpu:16")


def test_libtpu_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"libtpu, which is missing; install jaxllm\[plan\]"):
        find_place("v5e:4x4")


def test_stand_ins():
    place = find_place("a100:4")
    assert (len(place.devices), place.platform, place.estimated) == (4, "gpu", True)
    assert place.limits is not None
    assert place.limits.memory_bytes == 80e9
    assert place.peak("bfloat16") == 312e12
    here = find_place("cpu:2")
    assert (here.kind, here.estimated, here.peak("bfloat16")) == ("cpu", False, None)


def test_every_device_with_memory_has_a_peak():
    from jaxllm.train import devices

    for kind in devices._MEMORY_AND_LINKS:
        assert peak_flops(kind, "bfloat16"), kind
        assert limits(kind), kind
    assert limits("TPU v1") is None
