"""TPUs that are not here, by libtpu: a small step, and the shapes of published runs."""

import dataclasses
import importlib.util

import pytest

from jaxllm.core.mesh import make_mesh
from jaxllm.errors import ConfigError
from jaxllm.plan.place import find_place
from jaxllm.plan.search import candidates
from jaxllm.plan.source import run_of, spec_of
from jaxllm.plan.train import plan_training
from jaxllm.spec.cost import num_params
from tests.plan.models import write
from tests.train.runs import config_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [
        ("v5e:4x4", 16, "TPU v5 lite"),
        ("v5p:2x2x1", 4, "TPU v5"),
        ("v6e:1x1", 1, "TPU v6 lite"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
    ],
)
def test_topologies(name, devices, kind):
    place = find_place(name)
    assert (len(place.devices), place.kind, place.estimated) == (devices, kind, False)
    assert place.limits is not None
    assert place.peak("bfloat16") is not None


def test_topologies_that_are_not():
    with pytest.raises(ConfigError, match="first two sizes are even; the nearest is v5e:4x4"):
        find_place("v5e:3x4")
    with pytest.raises(ConfigError, match="v6e has 2 dims"):
        find_place("v6e:4x4x4")


def test_a_mesh_has_to_lie_on_the_torus():
    place = find_place("v5p:4x4x4")
    with pytest.raises(ConfigError, match="sides, 4 x 4 x 4, so one of 1, 4, 16, 64"):
        make_mesh({"data": 2, "fsdp": 32}, place.devices)
    meshes = {t.config.mesh for t in candidates(wide(), place, batch=64)}
    assert meshes == {"data=64", "fsdp=64", "data=4,fsdp=16", "data=16,fsdp=4"}


def wide():
    """A toy whose width 64 devices split; it has two heads, so tensor is at most 2."""
    config = config_of(dtype="bfloat16")
    spec = dataclasses.replace(config.spec, width=256)
    return dataclasses.replace(config, spec=spec, batch=64, length=32)


def test_a_small_step_on_a_v5e():
    found = plan_training(wide(), find_place("v5e:2x2"), source="toy", mesh="data=2,fsdp=2")
    (step,) = found.programs
    assert step.fits
    assert 4 * step.counts.flops == pytest.approx(step.needed_flops, rel=0.1)
    assert {axis for c in step.counts.collectives for axis in c.axes} == {"data", "fsdp"}
    assert step.counts.unknown_loops == 0
    assert not any("tile" in note for note in found.notes)


PUBLISHED = {
    # name: devices, mesh, tokens a row, rows a device, MFU that MaxText reports
    "llama-3.1-8b": ("v6e:16x16", "data=16,fsdp=16", 8192, 2, 0.455),
    "llama-2-70b": ("v5p:8x8x8", "data=8,fsdp=64", 4096, 2, 0.654),
}
"""Source: MaxText, docs/reference/models/tiering.md (2026-08); rows a device are our choice."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_fit_and_are_below_the_bound(name, tmp_path):
    devices, mesh, length, rows, mfu = PUBLISHED[name]
    place = find_place(devices)
    config = run_of(spec_of(str(write(tmp_path, name))))
    config = dataclasses.replace(
        config,
        length=length,
        batch=rows * len(place.devices),
        remat="full",
        attention="mosaic_tpu",
    )
    found = plan_training(config, place, source=name, mesh=mesh)
    (step,) = found.programs
    assert found.fits
    assert mfu < step.time.mfu_bound <= 1
    shards = found.mesh["fsdp"]
    assert step.memory.parameters == pytest.approx(4 * num_params(config.spec) / shards, rel=0.01)
