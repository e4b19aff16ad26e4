"""Remat `auto`: the first policy that fits is taken, and what none fits is said."""

import dataclasses

import jax
import pytest

from jaxllm.aot.program import Executable
from jaxllm.aot.report import Report
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.train.memory import fit_remat, memory_limit, remat_order
from jaxllm.train.programs import make_programs, plan_programs
from tests.train.runs import config_of

GIB = 2**30


def loader(tried, needs):
    """Pretends to compile: each policy needs so many GiB."""

    def load(config):
        tried.append(config.remat)
        report = Report(temporary_bytes=needs[config.remat] * GIB)
        return Executable(
            name="step", compiled=None, report=report, stored=False, seconds=0.0, fingerprint=""
        )

    return load


NEEDS = {"none": 8, "save_dots": 4, "save_attention": 3, "full": 2}


@pytest.mark.parametrize(
    ("room", "wanted"), [(9, "none"), (8, "none"), (5, "save_dots"), (3, "save_attention")]
)
def test_the_first_that_fits(room, wanted):
    tried = []
    config = config_of(remat="auto", memory_gib=float(room))
    found, step = fit_remat(config, loader(tried, NEEDS), jax.devices()[0])
    assert (
        found
        == dataclasses.replace(config, remat=wanted)
        == dataclasses.replace(config, remat=tried[-1])
    )
    assert step.report.peak_bytes == NEEDS[wanted] * GIB


def test_none_fits():
    config = config_of(remat="auto", memory_gib=1.0)
    with pytest.raises(CapacityError, match=r"full 2\.00.*accumulate"):
        fit_remat(config, loader([], NEEDS), jax.devices()[0])


def test_scanned_layers_on_an_accelerator_start_with_save_dots():
    assert remat_order(config_of(), "gpu")[0] == "save_dots"
    assert remat_order(config_of(layout="unrolled"), "gpu")[0] == "none"
    assert remat_order(config_of(), "cpu")[0] == "none"


def test_a_run_resolves_auto_by_what_its_compiled_steps_need(tmp_path):
    from jaxllm.aot.store import Store

    config = config_of(length=32, batch=64)
    need = {
        remat: plan_programs(dataclasses.replace(config, remat=remat), None).step.compile().report
        for remat in ("none", "full")
    }
    assert need["full"].peak_bytes < need["none"].peak_bytes
    room = (need["none"].peak_bytes - 1) / GIB
    programs = make_programs(
        dataclasses.replace(config, remat="auto", memory_gib=room), Store(tmp_path), None
    )
    assert programs.step.report.peak_bytes < need["none"].peak_bytes


def test_the_host_has_a_limit():
    limit = memory_limit(jax.devices()[0])
    assert limit is not None
    assert limit > GIB / 8


def test_a_program_of_auto_is_refused():
    with pytest.raises(ConfigError, match="resolved"):
        plan_programs(config_of(remat="auto"), None)
