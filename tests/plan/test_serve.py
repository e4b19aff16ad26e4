"""Planned prefill and decoding: bytes by hand, room for tokens, meshes that do not fit."""

import functools

import pytest

from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.plan.place import find_place
from jaxllm.plan.serve import ServeOptions, default_mesh, padding_waste, plan_serving
from jaxllm.plan.source import spec_of
from jaxllm.spec.cost import flops, kv_bytes_per_token, num_params
from tests.cli.toy import toy_spec
from tests.plan.models import write

SMALL = {"batch": 8, "prompt": 32, "context": 256, "dtype": "float32"}


@functools.cache
def plan(devices="cpu:8", **changes):
    options = ServeOptions(**(SMALL | changes))
    return plan_serving(toy_spec(64), find_place(devices), options, source="toy")


def test_heads_and_sequences_are_split():
    found = plan(mesh="data=4,tensor=2")
    assert found.mesh == {"data": 4, "tensor": 2}
    assert [program.name for program in found.programs] == ["prefill", "decode"]


def test_the_default_mesh_copies_no_keys(tmp_path):
    place = find_place("h100:8")
    large = spec_of(str(write(tmp_path, "llama-3.1-405b")))
    assert default_mesh(large, place, 8 * 30 * 2**30) == {"data": 1, "tensor": 8}
    assert default_mesh(toy_spec(64), place, 1000) == {"data": 8, "tensor": 1}  # one key head
    assert default_mesh(toy_spec(64), place, 90 * 10**9) == {"fsdp": 8, "tensor": 1}


def test_bytes_by_hand():
    found = plan("cpu:1")
    spec = toy_spec(64)
    prefill, decode = found.programs
    assert prefill.memory.parameters == decode.memory.parameters == 4 * num_params(spec)
    assert found.serving.kv_bytes_per_token == kv_bytes_per_token(spec, 4)
    assert decode.memory.state == 8 * 256 * kv_bytes_per_token(spec, 4)
    assert decode.memory.outputs < 1024  # the state is donated


def test_room_for_tokens():
    found = plan("cpu:1")
    each = [p.memory.total - p.memory.state for p in found.programs]
    left = found.programs[0].memory.limit - max(each)
    assert found.serving.kv_capacity_tokens == int(left / found.serving.kv_bytes_per_token)


def test_needed_flops():
    spec = toy_spec(64)
    prefill, decode = plan("cpu:1").programs
    assert prefill.needed_flops == 8 * flops(spec, 32, logits=1)["total"]
    assert decode.needed_flops == 8 * 8 * flops(spec, 1, past=255)["total"]
    # No query sees less than all slots here: `reference` masks, it leaves nothing out.
    assert decode.counts.flops == pytest.approx(decode.needed_flops, rel=0.02)


def test_padding_by_bucket():
    assert padding_waste(64) == ((16, 1 - 8.5 / 16), (32, 1 - 24.5 / 32), (64, 1 - 48.5 / 64))
    assert padding_waste(40)[-1] == (64, 1 - 36.5 / 64)


def test_errors_name_what_works():
    with pytest.raises(ConfigError, match=r"tensor=8; the nearest that works is tensor=2"):
        plan(mesh="tensor=8")
    with pytest.raises(ConfigError, match=r"cpu:8 has 8; the nearest is 'data=4,tensor=2'"):
        plan(mesh="data=3,tensor=2")
    with pytest.raises(ConfigError, match=r"3 sequences .* 8 devices .*take --batch 8"):
        plan(batch=3)
    with pytest.raises(ConfigError, match="longer than the context"):
        plan(prompt=512)


def test_a_model_without_weights(tmp_path):
    assert num_params(spec_of(str(write(tmp_path, "llama-3.1-8b")))) == 8_030_261_248
    assert num_params(spec_of(str(write(tmp_path, "llama-2-70b")))) == 68_976_648_192
    path = write(tmp_path, "llama-3.1-405b") / "config.json"
    assert num_params(spec_of(str(path))) == 405_853_388_800
    assert spec_of("random:llama-3.2-1b").num_layers == 16


def test_bad_sources(tmp_path):
    with pytest.raises(ConfigError, match=r"random:nothing: unknown preset; .*llama-3\.2-1b"):
        spec_of("random:nothing")
    with pytest.raises(WeightsError, match=r"config\.json: is missing"):
        spec_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(UnsupportedError, match="unknown architecture 'lama'; did you mean 'llama'"):
        spec_of(str(tmp_path))


def test_quantized_matrices_are_planned_as_they_would_be_held():
    """int8: a byte a value of the layers' matrices and a float32 scale an output of each."""
    plain, packed = (plan("cpu:1", quantize=name).programs[1].memory for name in (None, "int8"))
    values = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24  # q, k and v, o, gate, up, down
    outputs = 16 + 8 + 8 + 16 + 24 + 24 + 16
    assert plain.parameters - packed.parameters == 3 * values - 4 * outputs
    assert packed.state == plain.state
    with pytest.raises(ConfigError, match="format 'int3' is unknown"):
        plan("cpu:1", quantize="int3")
