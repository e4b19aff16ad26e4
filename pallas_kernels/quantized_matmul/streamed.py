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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.quantized_matmul.order import natural, stored
from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.widen import widen
from pallas_kernels.warpgroups import COLUMN, ROW, along, multiply

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

MOST_ROWS = 512
TYPES = ("int4", "uint4", "int8", "float8_e4m3fn")
CHUNK = 128  # inputs that are widened at a time
FLIGHT = 128  # columns of sums of products that are waited for together: half as many registers
OUTPUTS = 64  # rows of one product: what a warpgroup's instruction has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result up to rounding.

    The steps of all tiles of outputs stand one after the other, and a program takes the next so
    many of them: it may end one tile's and begin another's. What several programs found of a tile
    is added afterwards.

    Attributes:
      inputs: of one step; whole groups, or a divisor of one.
      stages: steps in flight.
      steps: of one program.
      warpgroups: that compute in a program, 64 outputs each.
      rows: of x at a time; a multiple of 8.
    """

    inputs: int = 128
    stages: int = 4
    steps: int = 8
    warpgroups: int = 2
    rows: int = 8

    @property
    def outputs(self) -> int:
        """Of one tile."""
        return OUTPUTS * self.warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding:
    """How codes are widened.

    Attributes:
      kind: one of `widen.KINDS`.
      table: what the codes of `table` and `e2m1` stand for.
      arranged: they are stored as `order.stored` has it.
    """

    kind: str = "int4"
    table: tuple[float, ...] = ()
    arranged: bool = False


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
    count: int, inputs: int, outputs: int, *, bits: int = 4, group: int = 128, processors: int = 132
) -> Tiles:
    """How a product is cut: one program for every processor, with an equal share of all steps."""
    wide = count <= 64 and (256 % group == 0 or group % 256 == 0)
    rows = min(-(-count // 8) * 8, 128)
    width = next(n for n in (256 if wide else 128, 128, 64, 32) if inputs % n == 0)
    row_tiles = -(-count // rows)
    # With four that compute the registers that Mosaic asks for are more than a program begins with.
    warpgroups = 2 if outputs % 128 == 0 else 1
    steps = inputs // width
    total = steps * (outputs // (64 * warpgroups))
    each = -(-total * row_tiles // processors)
    held = 64 * warpgroups * width * bits // 8 + rows * width * 2
    room = 220_000 - 64 * warpgroups * rows * 4  # of shared memory, less what results take
    stages = max(2, min(8, room // held))
    return Tiles(inputs=width, stages=stages, steps=each, warpgroups=warpgroups, rows=rows)


def bits_of(dtype) -> int:
    """Of a value."""
    return 4 if str(dtype) in ("int4", "uint4") else 8


def layouts(width: int, bits: int) -> tuple:
    """How a tile of so many columns lies in shared memory, as TMA and WGMMA agree on."""
    swizzle = plgpu.find_swizzle(width * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which programs make which tiles.

    Attributes:
      tiles: how many.
      steps: of each.
      each: steps of a program.
    """

    tiles: int
    steps: int
    each: int

    @property
    def programs(self) -> int:
        return -(-self.tiles * self.steps // self.each)

    @property
    def whole(self) -> bool:
        """Whether no tile is made by several programs."""
        return self.each % self.steps == 0

    def _first(self, program: int) -> int:
        return program * self.each // self.steps

    @property
    def slots(self) -> int:
        """Tiles that a program works on, at most; past the last tile it works for nothing."""
        last = lambda p: ((p + 1) * self.each - 1) // self.steps  # noqa: E731
        return max(last(p) - self._first(p) + 1 for p in range(self.programs))

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """For each tile the places (program x slots + slot) of its parts, and whether there are."""
        found = []
        for tile in range(self.tiles):
            begin, end = tile * self.steps, (tile + 1) * self.steps
            programs = range(begin // self.each, -(-end // self.each))
            found.append([p * self.slots + tile - self._first(p) for p in programs])
        most = max(map(len, found))
        places = [one + [0] * (most - len(one)) for one in found]
        there = [[1.0] * len(one) + [0.0] * (most - len(one)) for one in found]
        return np.asarray(places, np.int32), np.asarray(there, np.float32)


@dataclasses.dataclass(frozen=True)
class Product:
    """One compiled kernel."""

    group: int
    tiles: Tiles
    share: Share
    coding: Coding
    bits: int
    turned: bool
    interpret: bool

    def widened(self, w_smem, dtype):
        if self.interpret:
            return numbers(plgpu.load(w_smem), self.coding.table).astype(dtype)
        w = plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_UPCAST_4X)
        return widen(w, self.coding.kind, self.coding.table)

    def step(self, at, w_smem, x_smem, total, *, refs, out_smem, stage=None):
        """Adds what one tile of inputs gives to the sums [64, rows]; hands them out when whole."""
        scale, offset, sums, out = refs
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        here = program * self.share.each + at[0]
        tile, k = lax.div(here, self.share.steps), lax.rem(here, self.share.steps)
        first = jnp.minimum(tile, self.share.tiles - 1) * self.tiles.outputs + wg * OUTPUTS
        first = pl.multiple_of(first, OUTPUTS)
        own = w_smem.at[pl.ds(wg * OUTPUTS, OUTPUTS)]
        mine = None if stage is None else stage.at[wg]
        rows = pl.ds(first, OUTPUTS)
        of = scale.at[rows], None if offset is None else offset.at[rows], sums
        total = self.products(own, x_smem, total, of, k, mine)
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

    def products(self, w_smem, x_smem, total, of, k, stage):
        """The sums [64, rows] and what step k of one warpgroup's tile of values gives to them.

        of: the scales of its outputs, and offsets with the sums of x that they multiply, or None.
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
                scales.append(self.scales(scale.at[:, index]))
                if c not in w:
                    w[c] = self.widened(w_smem.at[:, pl.ds(c * chunk, chunk)], x_smem.dtype)
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
        layout = None if self.interpret else ROW
        found = plgpu.load(column, layout=layout, optimized=False)
        if found.dtype == jnp.float8_e8m0fnu and not self.interpret:
            bits = lax.bitcast_convert_type(found, jnp.uint8).astype(jnp.int32)
            return lax.bitcast_convert_type(bits << 23, jnp.float32)
        return found.astype(jnp.float32)

    def body(self, values, scale, x, *refs, out_smem, stage=None):
        *shift, out = refs
        offset, sums = shift or (None, None)
        tiles, share, width = self.tiles, self.share, self.tiles.inputs
        start, rows = lax.axis_index("program") * share.each, lax.axis_index("rows")

        def of_values(k):
            tile = jnp.minimum(lax.div(start + k, share.steps), share.tiles - 1)
            return tile, lax.rem(start + k, share.steps)

        def compute(pipeline):
            pipeline(self.zeros())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        options = {"refs": (scale, offset, sums, out), "out_smem": out_smem, "stage": stage}
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
            ],
            max_concurrent_steps=min(tiles.stages, share.each),
            wg_axis="wg",
            num_compute_wgs=tiles.warpgroups,
            memory_registers=24,
            compute_context=compute,
        )
        pipeline(values, x)

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
    row_tiles = -(-count // tiles.rows)
    shift = ()
    if offset is not None:
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
    turned = share.whole and jnp.dtype(out_dtype).itemsize == 2
    turned = turned and (count < tiles.rows or count % tiles.rows == 0)
    kernel = Product(group, tiles, share, coding, bits_of(values.dtype), turned, interpret)
    if turned:
        out_type = jax.ShapeDtypeStruct((count, outputs), out_dtype)
        held = plgpu.SMEM((tiles.warpgroups, tiles.rows, OUTPUTS), out_dtype)
    else:
        shape = (row_tiles, share.programs, share.slots, tiles.outputs, tiles.rows)
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
        held = plgpu.SMEM((tiles.warpgroups, OUTPUTS, tiles.rows), jnp.float32)
    scratch = {"out_smem": held}
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
    )(values, scale, x, *shift)
    return found if turned else _gathered(found, share)[:count].astype(out_dtype)


def _gathered(found: jax.Array, share: Share) -> jax.Array:
    """[rows, O] of the parts [row tiles, programs, slots, outputs of a tile, rows of a tile]."""
    row_tiles, _, _, high, rows = found.shape
    found = found.reshape(row_tiles, -1, high, rows)
    places, there = share.parts()
    total = jnp.zeros((row_tiles, share.tiles, high, rows), jnp.float32)
    for place, one in zip(places.T, there.T, strict=True):
        part = found[:, place]
        # What is not there may be anything, NaN as well.
        total += part if one.all() else jnp.where((one > 0)[None, :, None, None], part, 0.0)
    return total.reshape(row_tiles, -1, rows).transpose(0, 2, 1).reshape(row_tiles * rows, -1)
