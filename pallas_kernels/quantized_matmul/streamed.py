# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x times packed numbers on Hopper, all formats: an equal share of all steps for every processor.

The weights are the register operand, x lies in shared memory.

A program makes some hundred outputs of some rows of x, over its share of the inputs. Its warpgroups
each widen a tile of packed values in registers and multiply it by x transposed (D = W xT, so that
the 64 rows of the instruction are outputs and few rows of x cost little); one more loads. The sums
of one group are scaled when they are whole, which is less work than scaling the values, and keeps
these exact.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.quantized_matmul.one_sum import LEAVING, OneSum
from pallas_kernels.quantized_matmul.order import natural, stored
from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.shares import (
    CHUNK,
    OUTPUTS,
    Coding,
    Form,
    Share,
    Tiles,
    bits_of,
    layouts,
)
from pallas_kernels.quantized_matmul.widen import LANES, of_scale, of_shared, pairs_of, widen
from pallas_kernels.warpgroups import COLUMN, along, multiply, run_kernel

__all__ = [
    "MOST_ROWS",
    "Coding",
    "Product",
    "Share",
    "Tiles",
    "bits_of",
    "layouts",
    "run",
    "tiles_for",
    "unfit",
]

MOST_ROWS = 4096
FEW, MANY = 16, 64  # rows: more than FEW have one sum over all inputs, more than MANY in tiles
MOST_AT_ONCE = 128  # rows of a tile
ROOM = 231_000  # bytes of shared memory
MANY_GROUPS = 16
BESIDE = 32  # rows for which sums of groups have their scales come with each step
TYPES = ("int4", "uint4", "int8", "float8_e4m3fn")
FLIGHT = 128  # columns of sums of products that are waited for together: half as many registers


def unfit(*, dtype: str, rows: int, kind: str, sizes: tuple[int, int, int]) -> str | None:
    """Why this kernel cannot serve a kind of call, or None; see `unfit` of the package."""
    outputs, _, group = sizes
    if kind not in (*TYPES, "table"):
        return f"it takes {', '.join(TYPES)} and tables of 16 numbers, not {kind}"
    if dtype != "bfloat16":
        return f"it takes activations in bfloat16, not {dtype}"
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    if outputs % 64 or (group not in (32, 64) and group % 128):
        return (
            "it takes outputs that are a multiple of 64 and groups of 32, 64 or of a multiple of "
            f"128 inputs, not {outputs} outputs and groups of {group}"
        )
    return None


def tiles_for(
    count: int,
    inputs: int,
    outputs: int,
    *,
    kind: str = "int4",
    group: int = 128,
    processors: int = 132,
) -> Tiles:
    """How a product is cut: one program for every processor, with an equal share of all steps.

    For 17 to 64 rows and outputs that are a multiple of 128 as many whole tiles as each program can
    have, and shares of what is left; or whole tiles alone, if they keep most processors busy. For
    more rows an equal number of outputs for each program, or shares, in tiles of up to 128 rows.
    `kind` is a `Coding`'s.
    """
    if count > MANY:
        return _many_tiles(count, inputs, outputs, processors)
    if count > FEW and outputs % (2 * OUTPUTS) == 0:
        return _one_sum_tiles(count, inputs, outputs, kind, group, processors)
    bits, kept = _memory(kind)
    wide = 256 % group == 0 or group % 256 == 0
    rows = -(-count // 8) * 8
    width = next(n for n in (256 if wide else 128, 128, 64, 32) if inputs % n == 0)
    # With four that compute the registers that Mosaic asks for are more than a program begins with.
    warpgroups = 2 if outputs % 128 == 0 else 1
    steps = inputs // width
    total = steps * (outputs // (64 * warpgroups))
    each = -(-total // processors)
    held = 64 * warpgroups * (width * bits // 8 + 16 * (rows <= BESIDE)) + rows * width * 2
    room = 220_000 - kept - 64 * warpgroups * rows * 4  # less what results take
    stages = max(2, min(8, room // held))
    return Tiles(inputs=width, stages=stages, steps=each, warpgroups=warpgroups, rows=rows)


def _memory(kind: str) -> tuple[int, int]:
    """Bits of a code, and the bytes of shared memory that all of them take besides."""
    return 8 if kind in ("int8", "e4m3") else 4, 256 * LANES * 4 if kind == "table" else 0


def _one_sum_tiles(count, inputs, outputs, kind, group, processors) -> Tiles:
    bits, kept = _memory(kind)
    # A step of 256 inputs reads lines of 128 bytes of four bits; groups of 32 have many scales.
    width = 256 if bits == 4 and group >= 64 and not kept else 128
    width = next(n for n in (width, 128, 64, 32) if inputs % n == 0)
    cut = Tiles(inputs=width, stages=8, rows=-(-count // 8) * 8, one_sum=True)
    steps, high = inputs // width, OUTPUTS * 3
    if group < inputs and outputs >= high * processors:
        rounds, left = divmod(outputs, high * processors)
        if left == 0:
            return dataclasses.replace(cut, steps=steps, warpgroups=3)
        each = -(-(-(-left // high) * steps) // processors)
        how = {"rounds": rounds, "programs": processors}
        return dataclasses.replace(cut, steps=each, warpgroups=3, **how)
    return _even(cut, inputs, outputs, processors)


def _many_tiles(count: int, inputs: int, outputs: int, processors: int) -> Tiles:
    """Whole tiles as high as four warpgroups, or three, so that all processors end together."""
    row_tiles, units = -(-count // MOST_AT_ONCE), outputs // OUTPUTS
    rows = -(-count // (8 * row_tiles)) * 8
    width = next(n for n in (128, 64, 32) if inputs % n == 0)
    programs = max(1, processors // row_tiles)
    each = -(-units // programs)
    cut = Tiles(inputs=width, stages=8, rows=rows, one_sum=True, steps=inputs // width)
    if each == 1 or units < 0.75 * each * programs:
        return _in_parts(cut, outputs, programs)
    rounds = -(-each // 4)
    high = -(-each // rounds)
    how = {"rounds": rounds, "slim": rounds * high - each, "programs": -(-units // each)}
    return dataclasses.replace(cut, warpgroups=high, **how)


def _in_parts(tiles: Tiles, outputs: int, programs: int) -> Tiles:
    """Equal shares of all steps, of whole tiles or whole parts of one if that costs little."""
    steps, warpgroups = tiles.steps, min(4, outputs // OUTPUTS)
    total = -(-outputs // (OUTPUTS * warpgroups)) * steps
    each = max(-(-total // programs), min(steps, 4))
    even = [n for n in range(each, 6 * each // 5 + 1) if n % steps == 0 or steps % n == 0]
    how = {"rounds": 0, "slim": 0, "programs": 0, "warpgroups": warpgroups}
    return dataclasses.replace(tiles, steps=even[0] if even else each, **how)


def _even(tiles: Tiles, inputs: int, outputs: int, processors: int, most: int = 4) -> Tiles:
    """Whole tiles, if they keep most processors busy, or equal shares of all steps."""
    steps = inputs // tiles.inputs
    for warpgroups in (most, 2):
        count, left = divmod(outputs, OUTPUTS * warpgroups)
        if not left and count / (-(-count // processors) * processors) > 0.75:
            break
    else:
        steps = -(-steps * count // processors)
    how = {"warpgroups": warpgroups, "rounds": 0, "programs": 0}
    return dataclasses.replace(tiles, steps=steps, **how)


@dataclasses.dataclass(frozen=True)
class Product(Form):
    """One compiled kernel."""

    beside: int = 0

    def widened(self, w_smem, dtype, pairs=None):
        if self.interpret:
            return numbers(plgpu.load(w_smem), self.coding.table).astype(dtype)
        w = plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_UPCAST_4X)
        return widen(w, self.coding.kind, self.coding.table, pairs)

    def step(self, at, w_smem, x_smem, *more, refs, out_smem, pairs=None, stage=None):
        """Adds what one tile of inputs gives to the sums [64, rows]; hands them out when whole."""
        (scale, offset, sums, out), (*beside, total) = refs, more
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        here = program * self.share.each + at[0]
        tile, k = lax.div(here, self.share.steps), lax.rem(here, self.share.steps)
        first = jnp.minimum(tile, self.share.tiles - 1) * self.tiles.outputs + wg * OUTPUTS
        first = pl.multiple_of(first, OUTPUTS)
        own = w_smem.at[pl.ds(wg * OUTPUTS, OUTPUTS)]
        mine = None if stage is None else stage.at[wg]
        rows = pl.ds(first, OUTPUTS)
        of = scale.at[rows], None if offset is None else offset.at[rows], sums
        if beside:
            of = functools.partial(self.scales_beside, beside[0], k, wg * OUTPUTS), *of[1:]
        total = self.products(own, x_smem, total, of, k, mine, pairs)
        last = (k == self.share.steps - 1) | (at[0] == self.share.each - 1)

        @pl.when(last)
        def _():
            part, rows = out_smem.at[wg], lax.axis_index("rows")
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.turned:
                part.T[...] = total.astype(out.dtype)
                plgpu.commit_smem()
                count = min(out.shape[0], self.tiles.rows)
                part = part.at[pl.ds(0, count)]
                to = out.at[pl.ds(rows * count, count), pl.ds(first, OUTPUTS)]
            else:
                part[...] = total
                plgpu.commit_smem()
                slot = tile - lax.div(program * self.share.each, self.share.steps)
                to = out.at[rows, program, slot, pl.ds(wg * OUTPUTS, OUTPUTS)]
            plgpu.copy_smem_to_gmem(part, to)

        return lax.cond(last, self.zeros, lambda: total)

    def products(self, w_smem, x_smem, total, of, k, stage, held=None):
        """The sums [64, rows] and what step k of one warpgroup's tile of values gives to them.

        of: the scales of its outputs, and offsets with the sums of x that they multiply, or None.
        held: what `widen` has of a table, or None.
        """
        (scale, offset, sums), inputs, count = of, self.tiles.inputs, self.tiles.rows
        chunk = min(inputs, CHUNK)
        part = min(self.group, chunk)

        def shifted(total, column):
            """What the offsets of a group, or of a part of it, add to its products."""
            index = lax.div(k * inputs + column, self.group)
            those = pl.ds(lax.axis_index("rows") * count, count)
            x = sums.at[lax.div(k * inputs + column, part), those]
            x = plgpu.load(x, layout=None if self.interpret else COLUMN, optimized=False)
            own = self.scales(offset.at[:, index])
            return total + along(own, total.shape, 0) * along(x, total.shape, 1)

        def run(some, *accs):
            scales, w = [], {}
            for (c, g), acc in zip(some, accs, strict=True):
                column = c * chunk + g * part
                index = lax.div(k * inputs + column, self.group)
                own = scale(index) if self.beside else self.scales(scale.at[:, index])
                scales.append(own)
                if c not in w:
                    w[c] = self.widened(w_smem.at[:, pl.ds(c * chunk, chunk)], x_smem.dtype, held)
                left = w[c] if part == chunk else w[c][:, g * part : (g + 1) * part]
                multiply(acc, left, x_smem.at[:, pl.ds(column, part)].T, stage)
                if stage is not None:
                    plgpu.wgmma_wait(0)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs], scales

        pairs = [(c, g) for c in range(inputs // chunk) for g in range(chunk // part)]
        at_once = max(1, FLIGHT // count)
        acc = plgpu.ACC((OUTPUTS, count), jnp.float32)
        for i in range(0, len(pairs), at_once):
            some = pairs[i : i + at_once]
            found = pl.run_scoped(functools.partial(run, some), *[acc] * len(some))
            for product, one in zip(*found, strict=True):
                total += product * along(one, product.shape, 0)
            if offset is not None:
                for c, g in some:
                    total = shifted(total, c * chunk + g * part)
        return total

    def scales(self, column):
        return of_scale(column, interpret=self.interpret)

    def scales_beside(self, held, k, first, index):
        """As `scales` of group `index`, from those [outputs of a tile, beside] that came along."""
        index -= self.box(k) * self.beside
        if self.interpret:
            return held[pl.ds(first, OUTPUTS), index].astype(jnp.float32)
        return of_shared(held, first, index)

    def box(self, k):
        """Which scales come with step k, counted in those that 16 bytes hold."""
        return lax.div(lax.div(k * self.tiles.inputs, self.group), self.beside)

    def body(self, values, scale, x, *refs, out_smem, pairs=None, come=None, stage=None):
        *shift, out = refs
        if pairs is not None:
            *shift, table = shift
            copy = functools.partial(plgpu.copy_gmem_to_smem, table, pairs, come)
            pl.when(lax.axis_index("wg") == 0)(copy)
        offset, sums = shift or (None, None)
        tiles, share, width = self.tiles, self.share, self.tiles.inputs
        start, rows = lax.axis_index("program") * share.each, lax.axis_index("rows")

        def of_values(k):
            tile = jnp.minimum(lax.div(start + k, share.steps), share.tiles - 1)
            return tile, lax.rem(start + k, share.steps)

        scales = []
        if self.beside:
            where = lambda k: (of_values(k)[0], self.box(of_values(k)[1]))  # noqa: E731
            scales = [plgpu.BlockSpec((tiles.outputs, self.beside), where)]

        def compute(pipeline):
            if pairs is not None:
                assert come is not None
                plgpu.barrier_wait(come)
            pipeline(self.zeros())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        options = {"refs": (scale, offset, sums, out), "out_smem": out_smem, "stage": stage}
        options["pairs"] = pairs
        pipeline = plgpu.emit_pipeline_warp_specialized(
            functools.partial(self.step, **options),
            grid=(share.each,),
            in_specs=[
                plgpu.BlockSpec(
                    (tiles.outputs, width),
                    of_values,
                    transforms=layouts(min(width, CHUNK), self.bits),
                ),
                plgpu.BlockSpec(
                    (tiles.rows, width),
                    lambda k: (rows, lax.rem(start + k, share.steps)),
                    transforms=layouts(min(width, self.group), 16),
                ),
                *scales,
            ],
            max_concurrent_steps=min(tiles.stages, share.each),
            wg_axis="wg",
            num_compute_wgs=tiles.warpgroups,
            memory_registers=24,
            compute_context=compute,
        )
        pipeline(values, x, *[scale] * len(scales))

    def zeros(self):
        sums = jnp.zeros((OUTPUTS, self.tiles.rows), jnp.float32)
        return sums if self.interpret else plgpu.layout_cast(sums, plgpu.Layout.WGMMA)


@lowered_once("tiles", "interpret", "out_dtype", "coding")
def run(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    tiles: Tiles,
    coding: Coding,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """[M, O] of x [M, K] times values [O, K] under scales, and offsets if any, [O, G].

    O is a multiple of `tiles.outputs`, `tiles.rows` at most 128; `tiles.inputs` divides K, and the
    group or the other way round.
    """
    (count, inputs), outputs = x.shape, values.shape[0]
    group, width = inputs // scale.shape[1], tiles.inputs
    row_tiles, narrow = -(-count // tiles.rows), jnp.dtype(out_dtype).itemsize == 2
    if tiles.rounds and not narrow:  # whose whole tiles are parts too
        if count > MANY:
            whole = dataclasses.replace(tiles, steps=inputs // width)
            tiles = _in_parts(whole, outputs, tiles.programs)
        else:
            tiles = _even(tiles, inputs, outputs, tiles.programs, most=2)
    shift = ()
    if offset is not None and not tiles.one_sum:
        part = min(group, width, CHUNK)
        sums = jnp.sum(x.astype(jnp.float32).reshape(count, -1, part), axis=2)
        shift = offset, jnp.pad(sums.T, ((0, 0), (0, row_tiles * tiles.rows - count)))
    if interpret == coding.arranged:  # the interpreter widens codes where they are
        x = (stored if interpret else natural)(x, coding.kind)
    if interpret:
        x = jnp.pad(x, ((0, row_tiles * tiles.rows - count), (0, 0)))
    elif count > 8 and count % 8:  # less than a tile of eight or whole ones are what TMA takes
        x = jnp.pad(x, ((0, -count % 8), (0, 0)))
    share = Share(outputs // tiles.outputs, inputs // width, tiles.steps)
    # Only values of 16 bits can be turned round on the way to shared memory.
    turned = share.whole and narrow
    turned = turned and (tiles.one_sum or count < tiles.rows or count % tiles.rows == 0)
    if turned:
        out_type = jax.ShapeDtypeStruct((count, outputs), out_dtype)
        held = plgpu.SMEM((tiles.warpgroups, tiles.rows, OUTPUTS), out_dtype)
    else:
        shape = (row_tiles, share.programs, share.slots, tiles.outputs, tiles.rows)
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
        held = plgpu.SMEM((tiles.warpgroups, OUTPUTS, tiles.rows), jnp.float32)
    pairs = {}
    if coding.kind == "table" and not interpret:
        pairs["pairs"] = jnp.asarray(pairs_of(coding.table))
    form = Form(group, tiles, share, coding, bits_of(values.dtype), turned, interpret)
    if tiles.one_sum:
        given = {"values": values, "scale": scale, "offset": offset, "x": x} | pairs
        return _by_one_sum(given, form, out_dtype)[:count].astype(out_dtype)
    here = offset is None and tiles.rows <= BESIDE
    kernel = Product(**vars(form), beside=_beside(scale, group, inputs, width) if here else 0)
    scratch = {"out_smem": held}
    if pairs:
        scratch |= {"pairs": plgpu.SMEM((256, LANES), jnp.int32), "come": plgpu.Barrier()}
    if interpret:
        part = min(group, width, CHUNK)
        scratch["stage"] = plgpu.SMEM(
            (tiles.warpgroups, OUTPUTS, part), x.dtype, transforms=layouts(part, 16)
        )
    found = plgpu.kernel(
        kernel.body,
        out_type=out_type,
        grid=(share.programs, row_tiles),
        grid_names=("program", "rows"),
        num_threads=tiles.warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="quantized_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(values, scale, x, *shift, *pairs.values())
    return found if turned else _gathered(found, share)[:count].astype(out_dtype)


def _beside(scale: jax.Array, group: int, inputs: int, width: int) -> int:
    """How many scales of a row come with a step, 16 bytes; 0: they are read where they lie."""
    beside = 16 // scale.dtype.itemsize
    whole = scale.shape[1] % beside == 0 and width <= beside * group
    return beside if whole and group < inputs and scale.dtype != jnp.float8_e8m0fnu else 0


def _by_one_sum(given: dict, form: Form, out_dtype: Any) -> jax.Array:
    """The product of `given`: [rows, O], of parts in float32."""
    given = {name: array for name, array in given.items() if array is not None}
    group, tiles, coding, turned = form.group, form.tiles, form.coding, form.turned
    scale, (count, inputs), outputs = given["scale"], given["x"].shape, given["values"].shape[0]
    beside, row_tiles = _beside(scale, group, inputs, tiles.inputs), -(-count // tiles.rows)
    shifted = "offset" in given
    left = max(0, outputs - tiles.programs * tiles.own)
    share = dataclasses.replace(form.share, tiles=-(-left // tiles.outputs))
    halved = jnp.dtype(out_dtype).itemsize == 2 and (not turned or tiles.rounds > 0) and left > 0
    out = {}
    if turned or tiles.rounds:
        # On a device TMA leaves out rows that are not there.
        high = row_tiles * tiles.rows if form.interpret else count
        out["out"] = jax.ShapeDtypeStruct((high, outputs), out_dtype)
    if halved:
        pieces = row_tiles * share.programs * share.slots * 2
        out["parts"] = jax.ShapeDtypeStruct((pieces, tiles.rows, tiles.outputs), out_dtype)
    elif not turned:
        shape = (row_tiles, share.programs, share.slots, tiles.outputs, tiles.rows)
        out["parts"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = tiles.outputs * (tiles.inputs * form.bits // 8 + 16 * (1 + shifted) * (beside > 0))
    step += tiles.rows * tiles.inputs * 2
    sums = OUTPUTS * tiles.warpgroups * min(tiles.rows, LEAVING) * (4 if "parts" in out else 2)
    stages = (ROOM - _memory(coding.kind)[1] - sums) // step
    tiles = dataclasses.replace(tiles, stages=max(2, min(tiles.stages, stages)))
    # A scale's rounding is a result's, if it is one of many, but more than that in one of float32.
    fine = (not halved and not turned) or scale.shape[1] < MANY_GROUPS
    fine = fine and scale.dtype not in (jnp.bfloat16, jnp.float8_e8m0fnu)
    more = {"centred": shifted and coding.kind == "uint4", "weighted": shifted or group < inputs}
    more |= {"beside": beside, "halved": halved, "fine": fine}
    common = vars(form) | {"tiles": tiles, "share": share}
    kernel = OneSum(**common, inputs=inputs, **more)
    grid = {"program": tiles.programs or share.programs, "rows": row_tiles}
    options = {"name": "quantized_matmul_one_sum", "grid": grid, "interpret": form.interpret}
    found = dict(zip(out, run_kernel(kernel, given, out, **options), strict=True))
    if "parts" not in found:
        return found["out"]
    added = _joined(found["parts"], share) if halved else _gathered(found["parts"], share)
    over = added.shape[1] - left  # outputs that the last tile has with the one before
    high = added.shape[1] - tiles.outputs
    if over:
        added = jnp.concatenate((added[:, :high], added[:, high + over :]), axis=1)
    if not tiles.rounds:
        return added
    rest = added[: found["out"].shape[0]].astype(out_dtype)
    return lax.dynamic_update_slice(found["out"], rest, (0, outputs - left))


def _added(found: jax.Array, share: Share) -> jax.Array:
    """[row tiles, tiles, …] of the parts [row tiles, programs, slots, …]."""
    found = found.reshape(found.shape[0], -1, *found.shape[3:])
    places, there = share.parts()
    total = jnp.zeros((found.shape[0], share.tiles, *found.shape[2:]), jnp.float32)
    for place, one in zip(places.T, there.T, strict=True):
        part = found[:, place].astype(jnp.float32)
        # What is not there may be anything, NaN as well.
        these = (one > 0).reshape(1, -1, *[1] * (part.ndim - 2))
        total += part if one.all() else jnp.where(these, part, 0.0)
    return total


def _gathered(found: jax.Array, share: Share) -> jax.Array:
    """[rows, O] of the parts [row tiles, programs, slots, outputs of a tile, rows of a tile]."""
    row_tiles, _, _, _, rows = found.shape
    total = _added(found, share)
    return total.reshape(row_tiles, -1, rows).transpose(0, 2, 1).reshape(row_tiles * rows, -1)


def _joined(found: jax.Array, share: Share) -> jax.Array:
    """As `_gathered`, of [row tiles x programs x slots x 2, rows of a tile, outputs of a tile]."""
    _, rows, high = found.shape
    found = found.reshape(-1, share.programs, share.slots, 2, rows, high)
    total = _added(found, share).sum(2)
    return total.transpose(0, 2, 1, 3).reshape(len(total) * rows, -1)
