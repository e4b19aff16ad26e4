"""A planned step is the step that the trainer runs: memory, bytes of parameters, FLOPs."""

import dataclasses
import functools
import json

import jax
import pytest

from jaxllm.core.mesh import make_mesh, parse_mesh
from jaxllm.errors import ConfigError
from jaxllm.plan.place import find_place
from jaxllm.plan.train import nearest_mesh, plan_training, settle
from jaxllm.spec.cost import flops, num_params
from jaxllm.spec.ops import Attention
from jaxllm.train.programs import plan_programs
from tests.train.runs import config_of

SHAPE = {"batch": 8, "length": 32}


@functools.cache
def plan(devices="cpu:8", mesh="data=2,fsdp=2,tensor=2", **changes):
    return plan_training(
        config_of(**(SHAPE | changes)), find_place(devices), source="toy", mesh=mesh
    )


@pytest.fixture(scope="module")
def sharded():
    before = len(jax.live_arrays())
    found = plan()
    assert len(jax.live_arrays()) == before  # nothing is allocated
    return found


def test_memory_is_that_of_the_step_that_the_trainer_runs(sharded):
    mesh = "data=2,fsdp=2,tensor=2"
    config = config_of(mesh=mesh, **SHAPE)
    step = plan_programs(config, make_mesh(parse_mesh(mesh))).step
    said = step.lower().compile().memory_analysis()
    memory = sharded.programs[0].memory
    given = memory.parameters + memory.optimizer + memory.state + memory.other_arguments
    assert given == said.argument_size_in_bytes
    assert memory.temporaries == said.temp_size_in_bytes
    assert memory.outputs == said.output_size_in_bytes - said.alias_size_in_bytes
    assert memory.code == said.generated_code_size_in_bytes
    assert not memory.estimated


def test_parameters_and_optimizer_are_counted():
    """One device: four bytes a parameter, eight for the two moments and a little for counters."""
    memory = plan("cpu:1", None).programs[0].memory
    count = num_params(config_of().spec)
    assert memory.parameters == 4 * count
    assert 8 * count <= memory.optimizer <= 8 * count + 64


def test_the_mesh_divides_parameters(sharded):
    whole = plan("cpu:1", None).programs[0].memory
    part = sharded.programs[0].memory
    # Over fsdp x tensor, but for what does not divide: norms by tensor, the one kv head.
    assert whole.parameters / 4 <= part.parameters < whole.parameters / 2.5


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_flops_are_the_analytic_count(remat):
    """Attention by `reference` multiplies every pair, masked or not; the rest is needed work.

    With remat `full` the forward pass of the layers runs twice but for the last product, which
    nobody needs again.
    """
    spec = config_of().spec
    changes = {} if remat == "none" else {"remat": remat}
    program = plan("cpu:1", None, **changes).programs[0]
    length, rows = SHAPE["length"], SHAPE["batch"]
    part = flops(spec, length)
    pairs = part["attention"] * length / ((length + 1) / 2)
    down = 2 * spec.num_layers * 16 * 24 * length
    again = 0 if remat == "none" else part["matmul"] + pairs - down
    wanted = rows * (3 * (part["matmul"] + pairs + part["head"]) + again)
    assert program.counts.flops == pytest.approx(wanted, rel=0.02)
    assert program.needed_flops == rows * 3 * part["total"]


def test_flops_are_shared_by_devices(sharded):
    one = plan("cpu:1", None).programs[0].counts.flops
    assert 8 * sharded.programs[0].counts.flops == pytest.approx(one, rel=0.25)


def test_collectives_name_their_axes(sharded):
    found = {(c.kind, c.axes) for c in sharded.programs[0].counts.collectives}
    assert ("all-gather", ("fsdp",)) in found
    assert any(axes == ("tensor",) for _, axes in found)


@pytest.mark.slow
def test_auto_takes_the_first_that_fits():
    found = plan("cpu:1", None, remat="auto")
    assert found.settings["remat"] == "none"
    assert [policy for policy, *_ in found.remat] == ["none"]


@pytest.mark.slow
def test_every_policy_has_its_cost():
    config = config_of(**SHAPE)
    found = plan_training(config, find_place("cpu:1"), source="toy", every=True)
    costs = {policy: ratio for policy, _, ratio, _ in found.remat}
    assert set(costs) == {"none", "save_dots", "save_attention", "full"}
    assert costs["none"] <= costs["save_dots"] <= costs["save_attention"] <= costs["full"]
    assert found.settings["remat"] == "none"


def test_a_gpu_that_is_not_here_is_estimated():
    found = plan("h100:8", "fsdp=8", dtype="bfloat16")
    program = found.programs[0]
    assert program.memory.estimated
    assert found.kind == "NVIDIA H100 80GB HBM3"
    assert program.time.compute_s == pytest.approx(
        max(program.counts.flops, program.needed_flops / 8) / 989.4e12
    )
    assert program.time.network_s == pytest.approx(
        sum(c.sent_bytes for c in program.counts.collectives) / 450e9
    )
    assert program.time.memory_s is None  # a CPU program's traffic says nothing of a GPU's
    assert "estimated" in found.notes[-1]


def test_attention_of_a_gpu_that_is_not_here_keeps_no_scores():
    spec = dataclasses.replace(config_of().spec, context=256)
    heads = next(op.heads for op in spec.ops if isinstance(op, Attention))
    scores = 4 * 8 * heads * 256 * 256  # rows, heads, queries, keys: float32, of one layer
    long = {"spec": spec, "length": 256, "dtype": "bfloat16"}
    described = plan("h100:1", "", **long).programs[0]
    written = plan("h100:1", "", attention="reference", **long).programs[0]
    assert written.memory.temporaries - described.memory.temporaries > scores
    assert not any(t.shape[-2:] == (256, 256) for t in described.counts.largest)
    assert described.needed_flops == written.needed_flops


def test_json_round_trip(sharded):
    said = json.loads(json.dumps(sharded.to_json()))
    assert said["fits"] is True
    assert said["programs"][0]["memory"]["total"] == sharded.programs[0].memory.total
    assert said["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_batch_that_does_not_divide_is_raised_and_said():
    config, notes = settle(config_of(batch=3, length=32), find_place("cpu:8"))
    assert (config.batch, config.mesh) == (8, "fsdp=8")
    assert "3 rows" in notes[0]


@pytest.mark.parametrize(
    ("mesh", "near"), [("data=3,tensor=2", "data=4,tensor=2"), ("fsdp=16", "fsdp=8")]
)
def test_a_mesh_of_another_size_names_the_nearest(mesh, near):
    with pytest.raises(ConfigError, match=f"cpu:8 has 8; the nearest is '{near}'"):
        plan(mesh=mesh)
    assert nearest_mesh(parse_mesh(mesh), 8) == near


def test_a_model_that_does_not_divide_names_what_works():
    with pytest.raises(ConfigError, match="tensor can be 1, 2"):
        plan(mesh="data=2,tensor=4")
