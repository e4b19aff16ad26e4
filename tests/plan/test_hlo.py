"""Reading programs: loops, products, collectives by axis, bytes; each against numbers by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.mesh import make_mesh
from jaxllm.plan import hlo
from jaxllm.plan.counts import count, product_flops
from jaxllm.plan.moved import moved_bytes
from jaxllm.plan.traffic import axes_of

MESH = {"data": 2, "fsdp": 2, "stage": 1, "expert": 1, "context": 1, "tensor": 2}


def compiled(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_turn():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = count(compiled(run, (32, 64), (7, 64, 64)), {})
    assert found.flops == 7 * 2 * 32 * 64 * 64
    assert found.unknown_loops == 0
    # Weights are sliced: each is read once, not the whole stack at every turn.
    stack = 7 * 64 * 64 * 4
    assert stack < found.moved_bytes < 6 * stack


def test_nested_loops():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

    def run(x, w):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    assert count(compiled(run, (8, 128), (5, 128, 128)), {}).flops == 15 * 2 * 8 * 128 * 128


def test_what_the_forward_pass_keeps():
    """Of seven layers tanh(x w): x and the tanh of each and the last one's; with remat the x."""

    def loss(w, x, wrap):
        layer = wrap(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

    one = 32 * 64 * 4
    for wrap, kept in ((lambda layer: layer, 15), (jax.checkpoint, 8)):

        def step(w, x, wrap=wrap):
            return jax.value_and_grad(loss)(w, x, wrap)

        assert count(compiled(step, (7, 64, 64), (32, 64)), {}).kept_bytes == kept * one
    assert (
        count(compiled(lambda w, x: loss(w, x, lambda f: f), (7, 64, 64), (32, 64)), {}).kept_bytes
        == 0
    )


def test_what_is_kept_is_found_without_the_loops_name():
    """On a TPU a loop with a kernel in it bears the kernel's name."""

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2)

    text = compiled(jax.value_and_grad(loss), (7, 64, 64), (32, 64))
    (line,) = [x for x in text.splitlines() if " while(" in x and "transpose(jvp(" not in x]
    assert "jvp(" in line
    blind = text.replace(line, re.sub('op_name="[^"]*"', 'op_name="pallas_call"', line))
    assert blind != text and count(blind, {}).kept_bytes == count(text, {}).kept_bytes


TPU_LOOP = """HloModule m, is_scheduled=true

%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p = (u32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0:T(256)S(1)} get-tuple-element(%p), index=1
  ROOT %t = (u32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%next, %x)
}

%cond (p.1: (u32[], f32[8])) -> pred[] {
  %n = u32[]{:T(128)} constant(16)
  %p.1 = (u32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(256)} parameter(0)
  %start = u32[]{:T(128)} constant(4)
  %init = (u32[]{:T(128)}, f32[8]{0:T(256)S(1)}) tuple(%start, %a)
  %loop = (u32[]{:T(128)}, f32[8]{0:T(256)S(1)}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8]{0:T(256)} get-tuple-element(%loop), index=1
}
"""


def test_a_tpu_loop_is_read_off_its_counter():
    module = hlo.parse(TPU_LOOP)
    entry = module.computations["main"]
    assert module.entry == "main"
    assert hlo.trips(module, entry.instructions["loop"], entry) == 6
    assert entry.instructions["loop"].arrays[1] == hlo.Array("f32", (8,), space=1)
    assert {v.times for v in hlo.visits(module) if v.owner == "body"} == {6}


DOT = (
    "dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    "rhs_contracting_dims={1}"
)
# A batched product as a TPU writes it: each place of the output meets one place of the kernel.
BATCHED = (
    "convolution(%l, %r), window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=01bf_01oi->01bf"
)
CUBLAS = (
    'custom-call(%l, %r), custom_call_target="__cublas$gemm", backend_config='
    '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]}}}'
)
SPLIT = (
    "convolution(%l, %r), window={size=1x8x2 pad=0_0x7_7x0_0 rhs_reversal=0x1x0}, "
    "dim_labels=0b2f1_1o2i0->0b1f2"
)


@pytest.mark.parametrize(
    ("line", "shapes", "wanted"),
    [
        (DOT, ("4,8,16", "4,16,32", "4,8,32"), 2 * 4 * 8 * 16 * 32),
        (CUBLAS, ("8,16", "16,32", "8,32"), 2 * 8 * 16 * 32),
        ("convolution(%l, %r), dim_labels=bf_io->bf", ("8,16", "16,32", "8,32"), 2 * 8 * 16 * 32),
        (BATCHED, ("2,8,64,16", "2,8,32,16", "2,8,64,32"), 2 * (2 * 8) * 64 * 16 * 32),
        (SPLIT, ("2,64,2,16,1", "8,32,2,16,1", "2,64,8,32,1"), 2 * 2 * 64 * 8 * 32 * 32),
    ],
)
def test_products_by_hand(line, shapes, wanted):
    left, right, out = shapes
    text = (
        f"ENTRY %m (l: f32[{left}], r: f32[{right}]) -> f32[{out}] {{\n"
        f"  %l = f32[{left}]{{0}} parameter(0)\n  %r = f32[{right}]{{0}} parameter(1)\n"
        f"  ROOT %x = f32[{out}]{{0}} {line}\n}}\n"
    )
    inside = hlo.parse(text).computations["m"]
    assert product_flops(inside.instructions["x"], inside) == wanted


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("mesh['data'=2,'fsdp'=2,'stage'=1,'tensor'=2] {'fsdp'}", ("fsdp",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
    ],
)
def test_axes_of_groups(groups, axes):
    text = (
        f"  %r = f32[8]{{0}} all-reduce(%x), channel_id=3, replica_groups={groups}, to_apply=%add"
    )
    one = hlo.parse("ENTRY %m (x: f32[8]) -> f32[8] {\n" + text + "\n}\n")
    found = axes_of(one.computations["m"].instructions["r"], MESH)[0]
    assert found == axes


def test_collectives_of_a_sharded_product():
    mesh = make_mesh({"data": 2, "tensor": 4})
    put = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=put("data", "tensor"))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=put("tensor", None))
    text = jax.jit(jnp.matmul, out_shardings=put("data", None)).lower(x, w).compile().as_text()
    found = count(text, dict(mesh.shape))
    (one,) = found.collectives
    assert (one.kind, one.axes, one.devices, one.count) == ("all-reduce", ("tensor",), 4, 1)
    assert one.array_bytes == 8 * 32 * 4
    assert one.sent_bytes == 2 * 3 / 4 * one.array_bytes
    assert found.flops == 2 * 8 * 16 * 32


def test_every_array_type_has_a_size():
    sizes = {"pred": 1, "s8": 1, "bf16": 2, "f8e4m3fn": 1, "f32": 4, "u64": 8, "token": 0}
    for dtype, size in sizes.items():
        assert hlo.Array(dtype, (3,)).size_bytes == 3 * size
    assert hlo.Array("s4", (8,)).size_bytes == 4
    assert np.prod(hlo.Array("f32", ()).dims) == 1


def test_an_all_reduce_that_is_sliced_in_its_fusion_scatters():
    text = """%sum (x.1: f32[64], i: s32[]) -> f32[8] {
  %x.1 = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %all = f32[64]{0} all-reduce(%x.1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = f32[8]{0} dynamic-slice(%all, %i), dynamic_slice_sizes={8}
}

ENTRY %m (x: f32[64], j: s32[]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %r = f32[8]{0} fusion(%x, %j), kind=kCustom, calls=%sum
}
"""
    (one,) = count(text, MESH).collectives
    assert (one.kind, one.array_bytes, one.sent_bytes) == ("reduce-scatter", 256, 7 / 8 * 256)


NESTED = """%slice (p0: f32[16,4096,64], p1: s32[]) -> f32[4096,64] {
  %p0 = f32[16,4096,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %part = f32[1,4096,64]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,4096,64}
  ROOT %flat = f32[4096,64]{1,0} bitcast(%part)
}

%outer (q0: f32[16,4096,64], q1: s32[], q2: f32[8,64]) -> (f32[16,4096,64], f32[8,4096]) {
  %q0 = f32[16,4096,64]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[8,64]{1,0:S(1)} parameter(2)
  %w = f32[4096,64]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%slice
  %new = f32[1,4096,64]{2,1,0} bitcast(%w)
  %stack = f32[16,4096,64]{2,1,0} dynamic-update-slice(%q0, %new, %q1)
  %y = f32[8,4096]{1,0} dot(%q2, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %both = (f32[16,4096,64]{2,1,0}, f32[8,4096]{1,0:S(1)}) tuple(%stack, %y)
}

ENTRY %m (a: f32[16,4096,64], b: s32[], c: f32[8,64]) -> (f32[16,4096,64], f32[8,4096]) {
  %a = f32[16,4096,64]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[8,64]{1,0:S(1)} parameter(2)
  ROOT %r = (f32[16,4096,64]{2,1,0}, f32[8,4096]{1,0:S(1)}) fusion(%a, %b, %c), calls=%outer
}
"""


def test_bytes_of_nested_fusions_are_those_of_slices():
    """One slice of the stack is read and one is written in place; the rest lies in VMEM."""
    module = hlo.parse(NESTED)
    last = [v for v in hlo.visits(module) if v.instruction.name == "r"]
    assert moved_bytes(module, last[0]) == 2 * 4096 * 64 * 4 + 4
