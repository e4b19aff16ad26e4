"""The streamed product of all formats: interpreted, lowered, its shares, orders and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.quantized_matmul import order, quantized_matmul, widen
from pallas_kernels.quantized_matmul.api import Plan, product
from pallas_kernels.quantized_matmul.order import BLOCK, natural, stored
from pallas_kernels.quantized_matmul.streamed import Share, Tiles, tiles_for
from pallas_kernels.target import targeting
from tests.kernels.test_quantized_matmul import TABLES, draw, exact

CASES = {
    "one row": {"count": 1},
    "rows, tiles in parts": {"count": 5, "steps": 3},
    "tiles of rows": {"count": 21, "steps": 6, "rows": 16},
    "turned": {"count": 8, "steps": 8, "out_dtype": "bfloat16"},
    "offset": {"count": 3, "kind": "uint4", "offset": True},
    "int8": {"count": 8, "kind": "int8", "warpgroups": 2},
    "fp8": {"count": 8, "kind": "float8_e4m3fn"},
    "groups of 32": {"count": 8, "group": 32},
    "groups of 64": {"count": 8, "group": 64, "steps": 3},
    "large groups": {"count": 8, "group": 256},
    "nf4": {"count": 2, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "mxfp4": {
        "count": 2,
        "kind": "uint4",
        "table": TABLES["e2m1"],
        "group": 32,
        "exponents": True,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    """At most twice the error of the product in bfloat16; integers are multiplied unrounded."""
    options = {"rows": 8, "table": (), "out_dtype": "float32"} | CASES[name]
    cut = {key: options.pop(key) for key in ("steps", "warpgroups") if key in options}
    rows, table, out_dtype = (options.pop(key) for key in ("rows", "table", "out_dtype"))
    arguments = draw(options.pop("count"), 128, 512, **options)
    tiles = Tiles(**({"stages": 2, "steps": 4, "warpgroups": 1, "rows": rows} | cut))
    plan = Plan(
        implementation="mosaic_gpu_streamed",
        tiles=tiles,
        table=table,
        out_dtype=out_dtype,
        interpret=True,
    )
    found = product(*arguments, plan)
    wanted = exact(*arguments, table)
    plain = quantized_matmul(*arguments, table=table)
    assert found.dtype == out_dtype
    error, allowed = (np.abs(np.asarray(y, np.float64) - wanted).max() for y in (found, plain))
    largest = np.abs(wanted).max()
    assert error <= 2 * allowed + (2**-8 * largest if out_dtype == "bfloat16" else 0)
    if out_dtype == "float32" and not table:
        assert error < 1e-5 * largest


ONE_SUM = {
    "whole tiles": {"count": 24, "out_dtype": "bfloat16"},
    "ragged rows": {"count": 17, "inputs": 256, "out_dtype": "bfloat16"},
    "tiles in parts": {"count": 24, "steps": 3},
    "groups of 64": {"count": 32, "group": 64, "inputs": 256},
    "parts, halved": {"count": 24, "steps": 3, "out_dtype": "bfloat16"},
    "whole tiles, then few": {"count": 24, "rounds": 1, "out_dtype": "bfloat16"},
    "two rounds": {"count": 24, "steps": 3, "rounds": 2, "out_dtype": "bfloat16"},
    "whole tiles, then parts": {"count": 24, "steps": 3, "rounds": 1, "out_dtype": "bfloat16"},
    "four warpgroups": {"count": 32, "warpgroups": 4, "inputs": 256},
    "offset, halved": {"count": 24, "kind": "uint4", "offset": True, "out_dtype": "bfloat16"},
    "groups of 32": {"count": 24, "group": 32},
    "many groups": {"count": 24, "group": 32, "out_dtype": "bfloat16"},
    "large groups": {"count": 24, "group": 256, "inputs": 256, "steps": 1},
    "offset": {"count": 40, "kind": "uint4", "offset": True, "inputs": 256},
    "int8, a scale an output": {"count": 24, "kind": "int8", "group": 512, "steps": 3},
    "int8": {"count": 24, "kind": "int8"},
    "fp8": {"count": 24, "kind": "float8_e4m3fn"},
    "nf4": {"count": 24, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "tiles of rows": {"count": 40, "rows": 24, "out_dtype": "bfloat16"},
    "tiles of rows in parts": {"count": 40, "rows": 24, "steps": 3, "out_dtype": "bfloat16"},
    "tiles of rows, offset": {"count": 40, "rows": 24, "kind": "uint4", "offset": True},
    "many rows, fours": {"count": 83, "steps": 3, "warpgroups": 4},
    "many rows, parts, halved": {"count": 80, "steps": 3, "out_dtype": "bfloat16"},
    "a slim round": {"count": 83, "rows": 48, "rounds": 2, "slim": 1, "out_dtype": "bfloat16"},
    "a slim round, int8": {
        "count": 24,
        "kind": "int8",
        "group": 512,
        "rounds": 3,
        "slim": 2,
        "warpgroups": 3,
        "out_dtype": "bfloat16",
    },
    "slim rounds, offset": {
        "count": 83,
        "rows": 48,
        "kind": "uint4",
        "offset": True,
        "rounds": 2,
        "slim": 1,
        "out_dtype": "bfloat16",
    },
    "a slim round, float32": {"count": 24, "rounds": 2, "slim": 1},
    "fours, groups of 32": {"count": 72, "group": 32, "warpgroups": 4, "out_dtype": "bfloat16"},
    "fours, large groups": {"count": 72, "group": 256, "inputs": 256, "warpgroups": 4},
    "overlapping": {"count": 24, "warpgroups": 3, "steps": 3, "out_dtype": "bfloat16"},
    "int8, an offset an output": {"count": 24, "kind": "int8", "group": 512, "offset": True},
}


@pytest.mark.parametrize("name", ONE_SUM)
def test_one_sum_interpreted(name):
    """At most twice the error of the product in bfloat16; a scale an output multiplies sums."""
    options = {"inputs": 128, "table": (), "out_dtype": "float32"} | ONE_SUM[name]
    warpgroups = options.pop("warpgroups", 2)
    table, out_dtype, width = (options.pop(key) for key in ("table", "out_dtype", "inputs"))
    steps, count = options.pop("steps", 512 // width), options.pop("count")
    rows = options.pop("rows", -(-count // 8) * 8)
    cut = {"inputs": width, "steps": steps, "rows": rows, "one_sum": True}
    rounds, slim = options.pop("rounds", 0), options.pop("slim", 0)
    cut |= {"rounds": rounds, "slim": slim, "programs": 3 if rounds else 0}
    # Three tiles of 128 outputs, once or twice, and 192 in two that overlap; or 64 too few.
    outputs = 192 + 384 * rounds if rounds else 256
    if slim:
        outputs = 3 * 64 * (rounds * warpgroups - slim) - 64
    arguments = draw(count, outputs, 512, **options)
    plan = Plan(
        implementation="mosaic_gpu_streamed",
        tiles=Tiles(stages=2, warpgroups=warpgroups, **cut),
        table=table,
        out_dtype=out_dtype,
        interpret=True,
    )
    found, wanted = product(*arguments, plan), exact(*arguments, table)
    plain = quantized_matmul(*arguments, table=table)
    assert found.dtype == out_dtype
    error, allowed = (np.abs(np.asarray(y, np.float64) - wanted).max() for y in (found, plain))
    largest = np.abs(wanted).max()
    assert error <= 2 * allowed + (2**-8 * largest if out_dtype == "bfloat16" else 0)
    if options.get("group") == 512 and out_dtype == "float32" and arguments[3] is None:
        assert error < 1e-5 * largest


@pytest.mark.parametrize("name", [*CASES, *ONE_SUM, "64 rows", "200 rows", "whole row"])
def test_lowering(name):
    more = ONE_SUM | {
        "64 rows": {"count": 64},
        "200 rows": {"count": 200},
        "whole row": {"count": 8, "group": 2048, "kind": "int8"},
    }
    options = {"count": 8, "out_dtype": "float32", "table": ()} | (CASES | more)[name]
    for key in ("steps", "rows", "warpgroups", "inputs", "rounds", "slim"):
        options.pop(key, None)
    table, out_dtype = options.pop("table"), options.pop("out_dtype")
    arguments = draw(options.pop("count"), 256, 2048, **options)
    call = functools.partial(
        quantized_matmul,
        table=table,
        out_dtype=out_dtype,
        implementation="mosaic_gpu_streamed",
    )
    with targeting("gpu"):
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_shares():
    """Every step of every tile is one program's, and the parts are found where they were put."""
    for tiles, steps, each in ((3, 4, 4), (3, 4, 3), (5, 7, 11), (2, 9, 2), (4, 4, 8)):
        share = Share(tiles, steps, each)
        places, there = share.parts()
        wanted = [set() for _ in range(tiles)]
        for here in range(tiles * steps):
            program, tile = here // each, here // steps
            wanted[tile].add(program * share.slots + tile - program * each // steps)
        assert [set(p[t > 0]) for p, t in zip(places, there, strict=True)] == wanted
        assert share.whole == (there.sum(1) == 1).all()
        assert places.max() < share.programs * share.slots


class Words:
    """What `widen` asks of a processor, on numpy's words of 32 bits."""

    shli = staticmethod(lambda a, b: a << b)
    shrui = staticmethod(lambda a, b: a >> b)
    andi = staticmethod(lambda a, b: a & b)
    ori = staticmethod(lambda a, b: a | b)
    addi = staticmethod(lambda a, b: a + b)
    xori = staticmethod(lambda a, b: a ^ b)

    @staticmethod
    def ptx(text, *words):
        words = np.broadcast_arrays(*words)
        if text.startswith("prmt"):
            source = np.stack(words[:2], axis=-1).view(np.uint8)
            picks = (words[2][..., None] >> (4 * np.arange(4, dtype=np.uint32))) & 0xF
            assert (picks < 8).all()  # the eighth bit would repeat a sign
            return np.take_along_axis(source, picks.astype(int), -1).view(np.uint32)[..., 0]
        if text.startswith("lop3"):
            both = words[0] & words[1]
            return {"0x6a;": both ^ words[2], "0xea;": both | words[2]}[text.split()[-1]]
        a, *rest = [pairs(word).astype(np.float32) for word in words]
        assert text.startswith(("sub.bf16x2", "mul.bf16x2"))
        found = a - rest[0] if text.startswith("sub") else a * rest[0]
        return found.astype(jnp.bfloat16).view(np.uint32)[..., 0]


def pairs(words):
    """bfloat16 [..., 2] of words, the lower half first."""
    return np.ascontiguousarray(words)[..., None].view(jnp.bfloat16)


@pytest.mark.parametrize("kind", widen.KINDS)
def test_widening(kind, monkeypatch):
    """Every code, at every place of a word: exact, and in the order that x is brought into."""
    monkeypatch.setattr(widen, "arith", Words)
    monkeypatch.setattr(widen, "ptx", Words.ptx)
    monkeypatch.setattr(widen, "constant", np.uint32)
    eight = kind in ("int8", "e4m3")
    codes = np.arange(256 if eight else 16)
    codes = np.stack([np.roll(codes, 3 * i) for i in range(8)], axis=-1)
    if eight:
        words = codes.astype(np.uint8).reshape(-1, 2, 4).view(np.uint32)[..., 0]
        found = widen._EIGHT[kind](list(words.T))
        dtype = np.int8 if kind == "int8" else jnp.float8_e4m3fn
        numbers = np.arange(256).astype(np.uint8).view(dtype).astype(np.float32)
        numbers[np.isnan(numbers)] = np.nan
    else:
        words = (codes << 4 * np.arange(8)).sum(-1).astype(np.uint32)
        signed = np.where(np.arange(16) < 8, np.arange(16), np.arange(16) - 16)
        table = TABLES["nf4"] if kind == "table" else TABLES["e2m1"]
        plain = {"int4": signed, "uint4": np.arange(16), "uint4_centred": np.arange(16) - 8}
        numbers = plain.get(kind, np.asarray(table))
        numbers = numbers.astype(jnp.bfloat16).astype(np.float32)
        held = widen.pairs_of(table).view(np.uint32)
        if kind == "table":  # each lane reads in its own bank
            lane = np.arange(0, 128, 4, dtype=np.uint32)
            at = functools.partial(widen._read, words[:, None], np.uint32(2048), lane)
            places = np.stack(at(lambda place: place))
            assert (places // 4 % 32 == np.arange(32)).all()
            read = np.stack(at(lambda place: held.ravel()[(place - 2048) // 4]))
            same = np.stack(widen._looked_up(words, table))
            np.testing.assert_array_equal(read, np.broadcast_to(same[..., None], read.shape))
        found = widen._looked_up(words, table) if kind == "table" else widen._FOUR[kind](words)
    found = np.stack([pairs(word) for word in found], axis=1).astype(np.float32)
    read = order.order(kind).reshape(4, 4, 2)[:, 0]  # the codes of a row's first thread
    wanted = numbers[codes][:, read]
    known = ~np.isnan(wanted)  # a NaN of fp8 stands in no checkpoint, and widens to 480
    np.testing.assert_array_equal(found[known], wanted[known])


@pytest.mark.parametrize("kind", ["int4", "int8", "table"])
def test_orders(kind):
    """A place of its own for each input of a block, and the way back."""
    assert sorted(order.order(kind)) == list(range(BLOCK))
    x = np.arange(3 * 64).reshape(3, 64)
    assert np.array_equal(natural(stored(x, kind), kind), x)
    # A thread's four pairs: inputs 2 q and 2 q + 1 of each eight, from the eight that it read.
    read = order.order(kind).reshape(4, 4, 2)
    for thread in range(4):
        assert sorted(read[:, thread].ravel()) == list(range(8 * thread, 8 * thread + 8))


def test_tiles():
    """No more programs than processors, and all of them busy where there is work."""
    for count, inputs, outputs in (
        (1, 8192, 28672),
        (64, 4096, 14336),
        (64, 8192, 28672),
        (20, 14336, 4096),
        (3, 2048, 2048),
        (1, 576, 960),
    ):
        tiles = tiles_for(count, inputs, outputs)
        left = outputs - tiles.rounds * tiles.programs * tiles.outputs
        share = Share(-(-left // tiles.outputs), inputs // tiles.inputs, tiles.steps)
        assert share.programs <= 132
        assert tiles.warpgroups <= (4 if tiles.one_sum else 2)  # more registers than a program has
        if tiles.steps != share.steps:
            assert share.programs * tiles.steps < 132 * (tiles.steps + 1)
        assert tiles.rounds or share.programs > 66


def test_whole_tiles_come_first():
    """Three of 64 outputs for each of 132 programs, and what is left in shares."""
    tiles = tiles_for(64, 8192, 28672)
    assert (tiles.rounds, tiles.programs, tiles.warpgroups) == (1, 132, 3)
    left = 28672 - 132 * 192
    assert 0 < left < tiles.outputs * 18
    assert tiles.steps == -(-18 * 32 // 132)
    assert tiles_for(64, 8192, 132 * 384).steps == 32  # none is left
    assert tiles_for(64, 8192, 28672, kind="int8", group=8192).warpgroups == 4


@pytest.mark.parametrize("count", [65, 100, 128, 129, 256, 300, 512, 4096])
@pytest.mark.parametrize("outputs", [64, 192, 512, 2112, 4096, 14336, 28672, 128256])
def test_tiles_of_many_rows(count, outputs):
    """All outputs of all rows have a program, and most processors are busy where there is work."""
    tiles = tiles_for(count, 8192, outputs)
    row_tiles = -(-count // tiles.rows)
    assert tiles.one_sum and tiles.rows <= 128 and tiles.rows % 8 == 0 and tiles.warpgroups <= 4
    assert tiles.outputs <= outputs
    if tiles.rounds:
        assert tiles.steps == 64 and tiles.slim < tiles.rounds
        assert outputs <= tiles.programs * tiles.own < outputs + tiles.own
        programs, work = tiles.programs, tiles.own
    else:
        share = Share(-(-outputs // tiles.outputs), 64, tiles.steps)
        programs, work = share.programs, tiles.outputs * tiles.steps / 64
    assert programs * row_tiles <= 132
    if outputs > 512:
        assert row_tiles * outputs > 0.7 * 132 * work


def test_refusals():
    x, values, scale, _ = draw(4, 128, 256)
    named = functools.partial(quantized_matmul, implementation="mosaic_gpu_streamed")
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        named(x, values, scale)
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="in bfloat16, not float16"):
            named(x.astype(jnp.float16), values, scale)
        with pytest.raises(UnsupportedError, match="1 to 4096 rows, not 4097"):
            named(jnp.zeros((4097, 256), jnp.bfloat16), values, scale)
        with pytest.raises(UnsupportedError, match="groups of 16"):
            named(x, values, jnp.ones((128, 16)))
