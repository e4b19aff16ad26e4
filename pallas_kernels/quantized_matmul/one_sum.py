# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x of 17 rows or more times packed numbers on Hopper: one sum for each result, over all inputs.

As in `streamed.py` the weights are the register operand and x lies in shared memory. There a
group's sums are waited for, scaled and added, which is little for few rows. Here each code is
multiplied by its scale in registers, and an offset added (and rounded to bfloat16, as weights that
are unpacked beforehand are), so that codes are widened while the products before them are on their
way. A scale of all inputs multiplies the sums.

Many rows lie in tiles of up to 128. Each program makes as many outputs of its tile as any other, in
rounds of as many warpgroups, the last ones of one fewer; where outputs are few, all programs share
their steps.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.shares import CHUNK, OUTPUTS, Form, layouts
from pallas_kernels.quantized_matmul.widen import of_scale, of_shared, scaled, widen
from pallas_kernels.warpgroups import Spare, along, drain, pass_over, roles

__all__ = ["CENTRE", "LEAVING", "OneSum"]

LEAVING = 32  # rows of x whose results leave together, at most
CENTRE = 8  # which is subtracted from codes in uint4 with offsets, so that less is rounded


@dataclasses.dataclass(frozen=True)
class OneSum(Form):
    """One compiled kernel; see `streamed.Product`.

    Attributes:
      centred: CENTRE is subtracted from codes.
      beside: scales of a row that come with a step, what 16 bytes hold, and as many offsets; 0:
        they are read from the device's memory, or are for all inputs.
      fine: scales have more digits than bfloat16, and all of them count.
      weighted: codes are multiplied by their scales before the product, or one of all inputs
        multiplies sums.
      halved: parts of sums leave as two numbers of 16 bits each, turned round.
    """

    inputs: int
    centred: bool
    beside: int
    halved: bool
    fine: bool
    weighted: bool

    dtype = jnp.bfloat16

    @property
    def consumers(self) -> int:
        return self.tiles.warpgroups

    @property
    def chunk(self) -> int:
        return min(self.tiles.inputs, CHUNK)

    @property
    def part(self) -> int:
        """Inputs that are widened with one scale."""
        return min(self.group, self.chunk)

    @property
    def piece(self) -> int:
        """Inputs that are multiplied at a time: what there are registers for beside the sums."""
        return min(self.chunk, 64 if self.tiles.rows > 64 and self.tiles.warpgroups > 3 else CHUNK)

    @property
    def columns(self) -> int:
        """Rows of x whose results leave together."""
        return min(self.tiles.rows, LEAVING)

    def body(self, refs):
        tiles = self.tiles
        sums, leaving = (OUTPUTS, tiles.rows), (OUTPUTS, self.columns)
        shape = leaving[::-1] if self.turned else leaving
        shape = (tiles.warpgroups, *((2, *leaving[::-1]) if self.halved else shape))
        kinds = {
            "w": plgpu.SMEM(
                (tiles.stages, tiles.outputs, tiles.inputs),
                refs["values"].dtype,
                transforms=layouts(self.chunk, self.bits),
            ),
            "x": plgpu.SMEM(
                (tiles.stages, tiles.rows, tiles.inputs),
                self.dtype,
                transforms=layouts(self.chunk, 16),
            ),
            "out": plgpu.SMEM(shape, next(refs[n].dtype for n in ("out", "parts") if n in refs)),
        }
        for name in self.columns_of(refs) if self.beside else ():
            shape = tiles.stages, tiles.outputs, self.beside
            kinds[name] = plgpu.SMEM(shape, refs[name].dtype)
        if "pairs" in refs:
            kinds["pairs"] = plgpu.SMEM(refs["pairs"].shape, refs["pairs"].dtype)
        kinds |= Spare.kinds(self, (OUTPUTS, self.piece), sums)
        arrivals = 2 + (len(self.columns_of(refs)) if self.beside else 0)
        full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages)
        full = {"ring": full, "pairs": plgpu.Barrier()}
        free = plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages)
        roles(self, refs, kinds, full, {"ring": free})

    @staticmethod
    def columns_of(refs) -> list[str]:
        """Scales, and offsets if there are any."""
        return [name for name in ("scale", "offset") if name in refs]

    @property
    def shared(self) -> int:
        """The first of the outputs whose steps are shared by all programs."""
        return self.tiles.programs * self.tiles.own

    def mine(self):
        """The first of this program's steps of shared outputs, and the one after its last."""
        share = self.share
        begin = lax.axis_index("program") * share.each
        end = jnp.minimum(begin + share.each, share.tiles * share.steps)
        return begin, jnp.maximum(begin, end)

    def height(self, tile):
        """Outputs of a program's own tile: of the last `slim` ones 64 fewer."""
        slim = tile >= self.tiles.rounds - self.tiles.slim
        return OUTPUTS * (self.tiles.warpgroups - slim.astype(jnp.int32))

    def first(self, tile, refs, *, whole: bool):
        """The first output of a tile of this program's own, or of a shared one.

        The last of these lies over the one before, where there are not enough outputs for it.
        """
        tiles, last = self.tiles, refs["values"].shape[0]
        if not whole:
            return jnp.minimum(self.shared + tile * tiles.outputs, last - tiles.outputs)
        slim = jnp.maximum(tile - (tiles.rounds - tiles.slim), 0)
        first = lax.axis_index("program") * tiles.own + tile * tiles.outputs - slim * OUTPUTS
        return jnp.minimum(first, last - self.height(tile))

    def box(self, first, refs):
        """The first of the outputs that are loaded for a tile, which fit into all of them."""
        return jnp.minimum(first, refs["values"].shape[0] - self.tiles.outputs)

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""
        tiles, share, (begin, end) = self.tiles, self.share, self.mine()
        rows = pl.ds(lax.axis_index("rows") * tiles.rows, tiles.rows)

        if "pairs" in refs:
            plgpu.copy_gmem_to_smem(refs["pairs"], smem["pairs"], full["pairs"])
        full = full["ring"]

        before = tiles.rounds * share.steps

        def one(i, _):
            slot = lax.rem(i, tiles.stages)
            here = begin + i - before
            tile, k = lax.div(here, share.steps), lax.rem(here, share.steps)
            first = self.first(tile, refs, whole=False)
            if before:
                own = self.first(lax.div(i, share.steps), refs, whole=True)
                first = jnp.where(i < before, own, first)
                k = jnp.where(i < before, lax.rem(i, share.steps), k)
            deep = pl.ds(k * tiles.inputs, tiles.inputs)
            outputs = pl.ds(pl.multiple_of(self.box(first, refs), OUTPUTS), tiles.outputs)
            plgpu.barrier_wait(free["ring"].at[slot])
            values, x = refs["values"].at[outputs, deep], refs["x"].at[rows, deep]
            plgpu.copy_gmem_to_smem(values, smem["w"].at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x, smem["x"].at[slot], full.at[slot])
            for name in self.columns_of(refs) if self.beside else ():
                those = refs[name].at[outputs, pl.ds(self.group_beside(k), self.beside)]
                plgpu.copy_gmem_to_smem(those, smem[name].at[slot], full.at[slot])

        lax.fori_loop(0, before + end - begin, one, None)
        drain(free)

    def compute(self, refs, smem, full, free):
        """A multiplying warpgroup's part."""
        share, (begin, end) = self.share, self.mine()
        ring, wg = (full["ring"], free["ring"]), lax.axis_index("wg")
        if "pairs" in refs:
            plgpu.barrier_wait(full["pairs"])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(ring[1].at[slot])
        before = self.tiles.rounds * share.steps

        def whole(i, _):
            first, begun = self.first(i, refs, whole=True), i * share.steps
            make = lambda: self.tile(refs, smem, ring, (first, begun, 0, share.steps, None))  # noqa: E731
            if self.tiles.slim:
                works = wg * OUTPUTS < self.height(i)
                pl.when(works)(make)
                stages, steps = {"ring": self.tiles.stages}, (begun, begun + share.steps)
                pl.when(~works)(lambda: pass_over(full, free, stages, steps))
            else:
                make()

        def shared(i, _):
            tile = lax.div(begin, share.steps) + i
            start = jnp.maximum(begin, tile * share.steps)
            stop = jnp.minimum(end, (tile + 1) * share.steps)
            first, k = self.first(tile, refs, whole=False), start - tile * share.steps
            at = first, before + start - begin, k, stop - start, i
            self.tile(refs, smem, ring, at)

        if self.tiles.rounds > 1:
            lax.fori_loop(0, self.tiles.rounds, whole, None)
        elif self.tiles.rounds:
            whole(jnp.int32(0), None)
        if share.each == share.steps and not before:
            shared(0, None)
        elif share.tiles:  # some programs may have none
            count = lax.div(end - 1, share.steps) + 1 - lax.div(begin, share.steps)
            lax.fori_loop(0, jnp.where(end > begin, count, 0), shared, None)
        plgpu.wait_smem_to_gmem(0)

    def tile(self, refs, smem, ring, at):
        """Makes a tile's sums.

        at: its first output, steps of the program before it, its first step and how many, and its
          place among the program's parts, or None if they are all.
        """
        (first, before, k, count, slot), tiles, wg = at, self.tiles, lax.axis_index("wg")
        spare, (full, free) = Spare.of(smem, wg), ring
        high = first - self.box(first, refs) + wg * OUTPUTS if tiles.slim else wg * OUTPUTS
        high = pl.multiple_of(high, OUTPUTS)
        own = pl.ds(pl.multiple_of(first + wg * OUTPUTS, OUTPUTS), OUTPUTS)
        held = pl.ds(high, OUTPUTS)
        chunks = range(0, tiles.inputs, self.chunk)
        pieces = range(0, self.chunk, self.piece)

        def run(acc):
            def one(i, scales):
                slot, later = lax.rem(before + i, tiles.stages), scales
                if not self.beside:
                    soon = jnp.minimum(k + i + 1, self.share.steps - 1)
                    later = self.scales(refs, own, soon)
                plgpu.barrier_wait(full.at[slot])
                if self.beside:
                    held_now = {name: smem[name].at[slot] for name in self.columns_of(refs)}
                    scales = self.scales_beside(held_now, high, k + i)
                each = len(scales) // len(chunks)
                for n, c in enumerate(chunks):
                    deep, factors = pl.ds(c, self.chunk), scales[n * each : (n + 1) * each]
                    codes = self.codes(smem["w"].at[slot, held, deep])
                    for p in pieces:
                        left = self.widened(codes[:, p : p + self.piece], smem.get("pairs"))
                        self.ended(c + p, before + i, i > 0, free)
                        if self.weighted:
                            left = self.scaled(left, self.of_piece(factors, p))
                        columns = pl.ds(c + p, self.piece)
                        spare.add(acc, left, smem["x"].at[slot, :, columns].T)
                        if not self.weighted and not self.interpret:
                            plgpu.wgmma_wait(0)
                return later

            begun = [] if self.beside else self.scales(refs, own, k)
            lax.fori_loop(0, count, one, begun)
            found = spare.read(acc, 0)
            plgpu.barrier_arrive(free.at[lax.rem(before + count - 1, tiles.stages)])
            return found

        found = spare.zeroed(run, (OUTPUTS, tiles.rows))
        self.send(refs, smem["out"].at[wg], found, (own, slot))

    def groups(self, k) -> list[list[jax.Array]]:
        """Those that each chunk of step k has, counted from its tile's first."""
        start, parts = k * self.tiles.inputs, range(0, self.chunk, self.part)
        chunks = range(0, self.tiles.inputs, self.chunk)
        return [[lax.div(start + c + g, self.group) for g in parts] for c in chunks]

    def scales(self, refs, own, k) -> list[tuple[jax.Array, ...]]:
        """Of step k's chunks, one after the other, and offsets; none if one is for all inputs."""
        if not self.weighted:
            return []
        places = [at for some in self.groups(k) for at in some]
        columns = [refs[name] for name in self.columns_of(refs)]
        read = functools.partial(of_scale, interpret=self.interpret)
        return [self.centred_too(*(read(c.at[own, at]) for c in columns)) for at in places]

    def scales_beside(self, held, high, k) -> list[tuple[jax.Array, ...]]:
        """As `scales`, from [outputs of a tile, beside] of groups that came with step k."""
        first, columns = self.group_beside(k), [held[name] for name in self.columns_of(held)]
        places = [at - first for some in self.groups(k) for at in some]

        def read(column, at):
            if self.interpret:
                return column[pl.ds(high, OUTPUTS), at].astype(jnp.float32)
            return of_shared(column, high, at)

        return [self.centred_too(*(read(c, at) for c in columns)) for at in places]

    def centred_too(self, scale, *offset) -> tuple[jax.Array, ...]:
        """A scale, and its offset, to which what was subtracted from codes is added."""
        return scale, *(one + CENTRE * scale if self.centred else one for one in offset)

    def group_beside(self, k):
        """The first of the groups whose scales come with step k."""
        return lax.div(lax.div(k * self.tiles.inputs, self.group), self.beside) * self.beside

    def of_piece(self, factors, start: int) -> list:
        """The scales of a piece of a chunk's inputs, of all of the chunk's."""
        first, stop = start // self.part, -(-(start + self.piece) // self.part)
        return factors[first:stop]

    def ended(self, start, step, begun, free) -> None:
        """Waits for the piece before; with a step's last one, its place in the ring is free."""
        if self.weighted and not self.interpret:
            plgpu.wgmma_wait(0)
        if start == 0:

            @pl.when(begun)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(step - 1, self.tiles.stages)])

    def codes(self, held):
        """A chunk of them in registers; in the interpreter the numbers that they stand for."""
        if not self.interpret:
            return plgpu.load(held, layout=plgpu.Layout.WGMMA_UPCAST_4X)
        found = numbers(plgpu.load(held), self.coding.table)
        return (found - CENTRE if self.centred else found).astype(self.dtype)

    def widened(self, codes, pairs):
        if self.interpret:
            return codes
        kind = "uint4_centred" if self.centred else self.coding.kind
        return widen(codes, kind, self.coding.table, pairs)

    def scaled(self, w, factors):
        scales, *offsets = zip(*factors, strict=True)
        if not self.interpret:
            return scaled(w, scales, *offsets, fine=self.fine)
        high = OUTPUTS, w.shape[1] // len(scales)

        def wide(columns, exact):
            columns = columns if exact else [one.astype(self.dtype) for one in columns]
            wide = [along(one.astype(jnp.float32), high, 0) for one in columns]
            return jnp.concatenate(wide, axis=1)

        found = w.astype(jnp.float32) * wide(scales, self.fine)
        return sum((wide(one, False) for one in offsets), found).astype(self.dtype)

    def send(self, refs, shared, y, where):
        """Stores a warpgroup's results, some columns a time; the last may lie over those before."""
        own, slot = where
        if not self.weighted:
            scale = of_scale(refs["scale"].at[own, 0], interpret=self.interpret)
            y = y * along(scale, y.shape, 0)
        for start in range(0, self.tiles.rows, self.columns):
            start = min(start, self.tiles.rows - self.columns)
            part = y[:, start : start + self.columns]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.leave(refs, shared, part, (own, slot, start))

    def leave(self, refs, shared, y, where):
        """Stores columns of results from `start` on: where they belong, or among the parts."""
        (own, slot, start), tiles = where, self.tiles
        wg, program, rows = (lax.axis_index(name) for name in ("wg", "program", "rows"))
        here, columns = pl.ds(wg * OUTPUTS, OUTPUTS), pl.ds(start, self.columns)
        if slot is None or (self.turned and not self.halved):
            out, held = refs["out"], shared.at[0] if self.halved else shared
            held.T[...] = y.astype(out.dtype)
            count = min(out.shape[0], self.columns)
            first = rows * tiles.rows + start
            held, to = held.at[pl.ds(0, count)], out.at[pl.ds(first, count), own]
        elif self.halved:
            top = y.astype(shared.dtype)
            shared.at[0].T[...] = top
            shared.at[1].T[...] = (y - top.astype(y.dtype)).astype(shared.dtype)
            place = (rows * self.share.programs + program) * self.share.slots + slot
            held, to = shared, refs["parts"].at[pl.ds(2 * place, 2), columns, here]
        else:
            shared[...] = y
            held, to = shared, refs["parts"].at[rows, program, slot, here, columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held, to)
