# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x of tens of rows times packed numbers on Hopper: one sum for each result, over all inputs.

As in `streamed.py` the weights are the register operand and x lies in shared memory. There a
group's sums are waited for, scaled and added, which is little for few rows. Here each code is
multiplied by its scale in registers (and rounded to bfloat16, as weights that are unpacked
beforehand are), so that codes are widened while the products before them are on their way. A scale
of all inputs multiplies the sums.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.shares import CHUNK, OUTPUTS, Form, layouts
from pallas_kernels.quantized_matmul.widen import of_scale, of_shared, scaled, widen
from pallas_kernels.warpgroups import Spare, along, drain, roles

__all__ = ["CENTRE", "OneSum"]

CENTRE = 8  # which is subtracted from codes in uint4 with offsets, so that less is rounded


@dataclasses.dataclass(frozen=True)
class OneSum(Form):
    """One compiled kernel; see `streamed.Product`.

    Attributes:
      centred: CENTRE is subtracted from codes.
      beside: scales of a row that come with a step, what 16 bytes hold; 0: they are read from the
        device's memory, or are for all inputs.
      fine: scales have more digits than bfloat16, and all of them count.
      halved: parts of sums leave as two numbers of 16 bits each, turned round.
    """

    inputs: int
    centred: bool
    beside: int
    halved: bool
    fine: bool

    dtype = jnp.bfloat16

    @property
    def consumers(self) -> int:
        return self.tiles.warpgroups

    @property
    def chunk(self) -> int:
        return min(self.tiles.inputs, CHUNK)

    @property
    def ahead(self) -> bool:
        """Whether there is something to be done to widened codes after products were waited for."""
        return self.group < self.inputs

    @property
    def part(self) -> int:
        """Inputs that are widened with one scale."""
        return min(self.group, self.chunk)

    def body(self, refs):
        tiles = self.tiles
        sums = (OUTPUTS, tiles.rows)
        shape = sums[::-1] if self.turned else sums
        shape = (tiles.warpgroups, *((2, *sums[::-1]) if self.halved else shape))
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
        if self.beside:
            kinds["scales"] = plgpu.SMEM(
                (tiles.stages, tiles.outputs, self.beside), refs["scale"].dtype
            )
        if "pairs" in refs:
            kinds["pairs"] = plgpu.SMEM(refs["pairs"].shape, refs["pairs"].dtype)
        kinds |= Spare.kinds(self, (OUTPUTS, self.chunk), sums)
        full = plgpu.Barrier(num_arrivals=2 + (self.beside > 0), num_barriers=tiles.stages)
        full = {"ring": full, "pairs": plgpu.Barrier()}
        free = plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages)
        roles(self, refs, kinds, full, {"ring": free})

    @property
    def shared(self) -> int:
        """The first of the outputs whose steps are shared by all programs."""
        return self.tiles.rounds * self.tiles.programs * self.tiles.outputs

    def mine(self):
        """The first of this program's steps of shared outputs, and the one after its last."""
        share = self.share
        begin = lax.axis_index("program") * share.each
        end = jnp.minimum(begin + share.each, share.tiles * share.steps)
        return begin, jnp.maximum(begin, end)

    def first(self, tile, refs, *, whole: bool):
        """The first output of a tile of this program's own, or of a shared one.

        The last of these lies over the one before, where there are not enough outputs for it.
        """
        high = self.tiles.outputs
        if whole:
            return (lax.axis_index("program") + tile * self.tiles.programs) * high
        last = refs["values"].shape[0] - high
        return jnp.minimum(self.shared + tile * high, last)

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
            outputs = pl.ds(pl.multiple_of(first, OUTPUTS), tiles.outputs)
            plgpu.barrier_wait(free["ring"].at[slot])
            values, x = refs["values"].at[outputs, deep], refs["x"].at[rows, deep]
            plgpu.copy_gmem_to_smem(values, smem["w"].at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x, smem["x"].at[slot], full.at[slot])
            if self.beside:
                scales = refs["scale"].at[outputs, pl.ds(self.group_beside(k), self.beside)]
                plgpu.copy_gmem_to_smem(scales, smem["scales"].at[slot], full.at[slot])

        lax.fori_loop(0, before + end - begin, one, None)
        drain(free)

    def compute(self, refs, smem, full, free):
        """A multiplying warpgroup's part."""
        share, (begin, end) = self.share, self.mine()
        ring = full["ring"], free["ring"]
        if "pairs" in refs:
            plgpu.barrier_wait(full["pairs"])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(ring[1].at[slot])
        before = self.tiles.rounds * share.steps

        def whole(i, _):
            first = self.first(i, refs, whole=True)
            self.tile(refs, smem, ring, (first, i * share.steps, 0, share.steps, None))

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
            whole(0, None)
        if self.share.each == self.share.steps and not before:
            shared(0, None)
        else:  # some programs may have none
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
        high = pl.multiple_of(wg * OUTPUTS, OUTPUTS)
        held, own = pl.ds(high, OUTPUTS), pl.ds(pl.multiple_of(first + high, OUTPUTS), OUTPUTS)
        chunks = range(0, tiles.inputs, self.chunk)

        def run(acc):
            def one(i, scales):
                slot, later = lax.rem(before + i, tiles.stages), scales
                if not self.beside:
                    soon = jnp.minimum(k + i + 1, self.share.steps - 1)
                    later = self.scales(refs["scale"], own, soon)
                plgpu.barrier_wait(full.at[slot])
                if self.beside:
                    scales = self.scales_beside(smem["scales"].at[slot], high, k + i)
                each = len(scales) // len(chunks)
                for n, c in enumerate(chunks):
                    deep, factors = pl.ds(c, self.chunk), scales[n * each : (n + 1) * each]
                    left = self.widened(smem["w"].at[slot, held, deep], smem.get("pairs"))
                    self.ended(n, before + i, i > 0, free)
                    if self.ahead:
                        left = self.scaled(left, factors)
                    spare.add(acc, left, smem["x"].at[slot, :, deep].T)
                    if not self.ahead and not self.interpret:
                        plgpu.wgmma_wait(0)
                return later

            begun = [] if self.beside else self.scales(refs["scale"], own, k)
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

    def scales(self, scale, own, k) -> list[jax.Array]:
        """Of step k's chunks, one after the other; none where they are for all inputs."""
        if self.group == self.inputs:
            return []
        places = [at for some in self.groups(k) for at in some]
        return [of_scale(scale.at[own, at], interpret=self.interpret) for at in places]

    def scales_beside(self, scale, high, k) -> list[jax.Array]:
        """As `scales`, from [outputs of a tile, beside] of groups that came with step k."""
        first = self.group_beside(k)
        places = [at - first for some in self.groups(k) for at in some]
        if self.interpret:
            return [scale[pl.ds(high, OUTPUTS), at].astype(jnp.float32) for at in places]
        return [of_shared(scale, high, at) for at in places]

    def group_beside(self, k):
        """The first of the groups whose scales come with step k."""
        return lax.div(lax.div(k * self.tiles.inputs, self.group), self.beside) * self.beside

    def ended(self, chunk, step, begun, free) -> None:
        """Waits for the chunk before; with a step's last one, its place in the ring is free."""
        if self.ahead and not self.interpret:
            plgpu.wgmma_wait(0)
        if chunk == 0:

            @pl.when(begun)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(step - 1, self.tiles.stages)])

    def widened(self, codes, pairs):
        if not self.interpret:
            codes = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_4X)
            kind = "uint4_centred" if self.centred else self.coding.kind
            return widen(codes, kind, self.coding.table, pairs)
        found = numbers(plgpu.load(codes), self.coding.table)
        return (found - CENTRE if self.centred else found).astype(self.dtype)

    def scaled(self, w, scales):
        if not self.interpret:
            return scaled(w, scales, fine=self.fine)
        high = OUTPUTS, self.part
        if not self.fine:
            scales = [one.astype(self.dtype) for one in scales]
        wide = [along(one.astype(jnp.float32), high, 0) for one in scales]
        return (w.astype(jnp.float32) * jnp.concatenate(wide, axis=1)).astype(self.dtype)

    def send(self, refs, shared, y, where):
        """Stores a warpgroup's results."""
        (own, slot), tiles = where, self.tiles
        wg, program, rows = (lax.axis_index(name) for name in ("wg", "program", "rows"))
        if self.group == self.inputs:
            scale = of_scale(refs["scale"].at[own, 0], interpret=self.interpret)
            y = y * along(scale, y.shape, 0)
        here = pl.ds(wg * OUTPUTS, OUTPUTS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if slot is None or (self.turned and not self.halved):
            out, held = refs["out"], shared.at[0] if self.halved else shared
            held.T[...] = y.astype(out.dtype)
            count = min(out.shape[0], tiles.rows)
            held, to = held.at[pl.ds(0, count)], out.at[pl.ds(rows * count, count), own]
        elif self.halved:
            top = y.astype(shared.dtype)
            shared.at[0].T[...] = top
            shared.at[1].T[...] = (y - top.astype(y.dtype)).astype(shared.dtype)
            place = (rows * self.share.programs + program) * self.share.slots + slot
            held, to = shared, refs["parts"].at[pl.ds(2 * place, 2), :, here]
        else:
            shared[...] = y
            held, to = shared, refs["parts"].at[rows, program, slot, here]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held, to)
