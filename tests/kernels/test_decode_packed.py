"""Products of a few rows with weights of four bits: interpreted against float64, lowered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_matmul import (
    Link,
    Packed,
    api,
    decode_chain,
    decode_matmul,
    explain,
    packed,
)
from pallas_kernels.decode_matmul.mosaic_gpu import Part
from pallas_kernels.decode_matmul.packed import Packing
from pallas_kernels.decode_matmul.shapes import CASES
from pallas_kernels.errors import ShapeError
from pallas_kernels.quantized_matmul.order import natural, stored
from pallas_kernels.target import targeting
from tests.kernels.lowered import kernel_calls
from tests.kernels.test_decode_matmul import draw, error, exact
from tests.kernels.test_quantized_streamed import Words

SLOW = pytest.mark.slow
PACKED = [name for name in CASES if "int4" in name]


def packing(*shape, kind="int4", group=128, scale="bfloat16", arranged=False):
    """(packed weights, their values in float64)."""
    random = np.random.default_rng(len(shape) + shape[-1])
    low = -8 if kind == "int4" else 0
    codes = random.integers(low, low + 16, shape)
    scales = jnp.asarray(random.uniform(0.01, 0.1, (*shape[:-1], shape[-1] // group)), scale)
    values = jnp.asarray(codes, jnp.int8).astype(kind)
    values = stored(values, kind) if arranged else values
    wide = codes * np.repeat(np.asarray(scales, np.float64), group, axis=-1)
    return Packed(values, scales, arranged), wide


FORMS = [
    (1, 64, {"norm": True, "residual": True}, {}),
    (2, 64, {"norm": True, "gate": "silu"}, {"kind": "uint4", "scale": "float32", "group": 64}),
    (3, 64, {"norm": True}, {"arranged": True}),
    pytest.param(8, 64, {"residual": True}, {"group": 64, "arranged": True}, marks=SLOW),
]


@pytest.mark.parametrize(("rows", "outputs", "form", "how"), FORMS)
def test_kernel_and_reference_are_as_near_as_bfloat16_allows(rows, outputs, form, how, monkeypatch):
    monkeypatch.setattr(api, "_MANY_TILES", 8)  # three warpgroups for one row
    x, w, options = draw(rows, 1024, outputs, **form)
    w, wide = packing(*w.shape, **how)
    wanted = exact(x, wide, **options)
    with targeting("interpreter"):
        found = decode_matmul(x, w, **options, out_dtype="float32")
    plain = decode_matmul(x, w, **options, implementation="reference")
    # Codes are multiplied unrounded, and scaled in float32; the reference rounds what it unpacks.
    # A norm rounds x times its weight, and with a gate two such products are multiplied.
    allowed = (8e-3 if "gate" in form else 4e-3) if "norm" in form else 1e-6
    assert error(found, wanted) < allowed
    assert error(plain, wanted) < 3 * max(allowed, 4e-3)
    assert found.dtype == jnp.float32 and plain.dtype == jnp.bfloat16


@SLOW
def test_a_chain_is_its_links_one_by_one():
    first, one = packing(1024, 1024)
    second, two = packing(64, 1024)
    x, _, options = draw(1, 1024, 1024, residual=True)
    links = (Link(w=first, residual="given"), Link(w=second))
    with targeting("interpreter"):
        found = decode_chain(x, links, residual=options["residual"])
    middle = exact(x, one, norm=None, eps=0, gate=None, residual=options["residual"])
    assert error(found[0], middle) < 4e-3
    assert error(found[1], np.asarray(found[0], np.float64) @ two.T) < 4e-3


def test_x_is_brought_into_the_order_of_codes(monkeypatch):
    """What threads read and write, computed on words of numpy in memory as TMA leaves it."""

    class More(Words):
        addi = staticmethod(lambda a, b: np.uint32(a + b))
        muli = staticmethod(lambda a, b: np.uint32(a * b))
        divui = staticmethod(lambda a, b: np.uint32(a // b))
        remui = staticmethod(lambda a, b: np.uint32(a % b))

    monkeypatch.setattr(packed, "arith", More)
    monkeypatch.setattr(packed, "ptx", Words.ptx)
    monkeypatch.setattr(packed, "constant", np.uint32)
    high, wide = 16, 192
    x = np.arange(high * wide, dtype=np.uint16).reshape(high, wide)

    def in_memory(x):
        """Tiles of 8 rows of 128 bytes, in which 16 bytes change places as the row says."""
        tiles = x.reshape(high // 8, 8, wide // 64, 8, 8).transpose(0, 2, 1, 3, 4)
        rows, chunks = np.arange(8)[:, None], np.arange(8)
        return np.ascontiguousarray(tiles[:, :, rows, chunks ^ rows]).reshape(-1)

    memory = in_memory(x).view(np.uint32)
    for block in range(high * wide // 32):
        places = [int(at) // 4 for at in packed.chunks_of(np.uint32(block), wide)]
        words = [list(memory[at : at + 4]) for at in places]
        for at, found in zip(places, packed.paired(words), strict=True):
            memory[at : at + 4] = [np.uint32(one) for one in found]
    wanted = natural(x, "int4")
    np.testing.assert_array_equal(memory.view(np.uint16), in_memory(wanted))
    assert packed.rounds_of((high, wide)) * 128 >= high * wide // 32


def kinds_of(case):
    """The arguments of a case, as shapes."""
    kind = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    shape = (*([2] if case.gate else []), case.outputs, case.inputs)
    codes = jax.ShapeDtypeStruct(shape, jnp.int4)
    options = {"norm": kind(case.inputs)} if case.norm else {}
    options |= {"residual": kind(case.rows, case.outputs)} if case.residual else {}
    w = Packed(codes, kind(*shape[:-1], case.inputs // 128))
    return kind(case.rows, case.inputs), w, options


@pytest.mark.parametrize("rows", [3, 8])
def test_groups_of_64_lower(rows):
    """Several products of one widened chunk, each waited for."""
    shape = jax.ShapeDtypeStruct
    w = Packed(shape((64, 2048), jnp.uint4), shape((64, 32), jnp.float32), True)
    with targeting("gpu"):
        traced = jax.jit(decode_matmul).trace(shape((rows, 2048), jnp.bfloat16), w)
        assert kernel_calls(traced.lower(lowering_platforms=("cuda",)).as_text()) == 1


@pytest.mark.parametrize("name", [PACKED[0], PACKED[-2], PACKED[-3]])
def test_lowers_for_cuda_as_one_kernel(name):
    case = CASES[name]
    with targeting("gpu"):
        call = jax.jit(lambda x, w, o: decode_matmul(x, w, gate=case.gate, **o))
        text = call.trace(*kinds_of(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 1
    assert "stablehlo.dot" not in text and "stablehlo.reduce" not in text


def links_of(width, inner, outputs):
    kind = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731

    def w(*shape):
        codes = jax.ShapeDtypeStruct(shape, jnp.int4)
        return Packed(codes, kind(*shape[:-1], shape[-1] // 128))

    return (
        Link(w=w(width, width), residual="given"),
        Link(w=w(2, inner, width), norm=kind(width), gate="silu"),
        Link(w=w(width, inner), residual=0),
        Link(w=w(outputs, width), norm=kind(width)),
    )


def test_a_chain_lowers_for_cuda_as_one_kernel():
    links = links_of(2048, 8192, 3072)
    arrays = [(link.w, link.norm) for link in links]

    def call(x, residual, arrays):
        pairs = zip(links, arrays, strict=True)
        given = [dataclasses.replace(one, w=w, norm=norm) for one, (w, norm) in pairs]
        return decode_chain(x, tuple(given), residual=residual)

    x = jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16)
    with targeting("gpu"):
        text = jax.jit(call).trace(x, x, arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 1


def test_tiles_keep_weights_in_flight():
    for name in PACKED:
        case = CASES[name]
        eps = 1e-6 if case.norm else None
        part = Part(inputs=case.inputs, outputs=case.outputs, eps=eps, packed=Packing())
        if case.rows * case.inputs <= 75_000:
            tiles = api.tiles_for(case.rows, (part,))
            assert tiles.stages * tiles.width * 32 >= 40_960, name
            assert tiles.woven and tiles.held and part.inputs // 8 % tiles.width == 0


def test_large_products_of_one_row_have_three_warpgroups():
    def consumers(rows, *sizes):
        parts = (Part(inputs=2048, outputs=n, gate=gate, packed=Packing()) for n, gate in sizes)
        return api.tiles_for(rows, tuple(parts)).consumers

    gate, head, qkv = (8192, "silu"), (128_256, None), (3072, None)
    assert [consumers(1, one) for one in (gate, head, qkv)] == [3, 3, 2]
    assert consumers(2, gate) == consumers(1, (2048, None), gate) == 2


def test_refusals():
    kind = jax.ShapeDtypeStruct

    def why(w, rows=1, *others):
        x = kind((rows, w.shape[-1]), jnp.bfloat16)
        return explain(x, (Link(w=w), *(Link(w=one) for one in others))).why

    def w(outputs, inputs, *, codes=jnp.int4, group=128, scale=jnp.bfloat16):
        return Packed(kind((outputs, inputs), codes), kind((outputs, inputs // group), scale))

    with targeting("gpu"):
        assert explain(kind((1, 1024), jnp.bfloat16), (Link(w=w(64, 1024)),)).name == "mosaic_gpu"
        assert "codes in int4 and uint4, not int8" in why(w(64, 1024, codes=jnp.int8))
        assert "groups of 64 and 128 inputs, not 32" in why(w(64, 1024, group=32))
        assert "scales in bfloat16 and float32, not float16" in why(w(64, 1024, scale=jnp.float16))
        assert "multiple of 1024 and outputs" in why(w(64, 1536))
        assert "1 to 8 rows, not 9" in why(w(64, 1024), 9)
        assert "75000 inputs of all rows together" in why(w(64, 16384), 8)
        plain = kind((64, 1024), jnp.bfloat16)
        assert "all alike, plain or of one packed kind" in why(w(1024, 1024), 1, plain)
    with pytest.raises(ShapeError, match=r"scales of packed weights are \[\*, O, K / group\]"):
        short = dataclasses.replace(w(64, 1024), scale=kind((64, 7), jnp.bfloat16))
        explain_shapes = Link(w=short)
        decode_chain(jnp.zeros((1, 1024), jnp.bfloat16), (explain_shapes,))
