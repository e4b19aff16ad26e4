# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x of tens of rows times packed numbers on Hopper: one sum for each result, over all inputs.

As in `streamed.py` the weights are the register operand and x lies in shared memory. There a
group's sums are waited for, scaled and added, which is little for few rows. Here each code is
multiplied by its scale in registers (and rounded to bfloat16, as weights that are unpacked
beforehand are), so that products follow each other without an end and the tensor cores need not
wait; a warpgroup has one or two times 64 outputs to each tile of x.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.shares import CHUNK, OUTPUTS, Coding, Share, Tiles, layouts
from pallas_kernels.quantized_matmul.widen import of_scale, scaled, widen
from pallas_kernels.warpgroups import CONSUMERS, Spare, along, drain, roles

__all__ = ["CENTRE", "OneSum"]

CENTRE = 8  # which is subtracted from codes in uint4 with offsets, so that less is rounded


@dataclasses.dataclass(frozen=True)
class OneSum:
    """One compiled kernel; see `streamed.Product`.

    Attributes:
      centred: CENTRE is subtracted from codes.
    """

    group: int
    tiles: Tiles
    share: Share
    coding: Coding
    bits: int
    turned: bool
    interpret: bool
    inputs: int
    centred: bool

    dtype = jnp.bfloat16

    @property
    def chunk(self) -> int:
        return min(self.tiles.inputs, CHUNK)

    @property
    def part(self) -> int:
        """Inputs that are widened with one scale."""
        return min(self.group, self.chunk)

    def body(self, refs):
        tiles = self.tiles
        sums = (OUTPUTS, tiles.rows)
        shape = (CONSUMERS, tiles.tall, *sums[::-1]) if self.turned else (CONSUMERS, 1, *sums)
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
            "out": plgpu.SMEM(shape, refs["out"].dtype),
        }
        if "pairs" in refs:
            kinds["pairs"] = plgpu.SMEM(refs["pairs"].shape, refs["pairs"].dtype)
        kinds |= Spare.kinds(self, (OUTPUTS, self.chunk), *[sums] * tiles.tall)
        full = plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages)
        full = {"ring": full, "pairs": plgpu.Barrier()}
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages)
        roles(self, refs, kinds, full, {"ring": free})

    def mine(self):
        """The first of this program's steps, and the one after its last."""
        share = self.share
        begin = lax.axis_index("program") * share.each
        return begin, jnp.minimum(begin + share.each, share.tiles * share.steps)

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""
        tiles, share, (begin, end) = self.tiles, self.share, self.mine()
        rows = pl.ds(lax.axis_index("rows") * tiles.rows, tiles.rows)

        if "pairs" in refs:
            plgpu.copy_gmem_to_smem(refs["pairs"], smem["pairs"], full["pairs"])
        full = full["ring"]

        def one(i, _):
            slot = lax.rem(i, tiles.stages)
            tile, k = lax.div(begin + i, share.steps), lax.rem(begin + i, share.steps)
            deep = pl.ds(k * tiles.inputs, tiles.inputs)
            outputs = pl.ds(tile * tiles.outputs, tiles.outputs)
            plgpu.barrier_wait(free["ring"].at[slot])
            values, x = refs["values"].at[outputs, deep], refs["x"].at[rows, deep]
            plgpu.copy_gmem_to_smem(values, smem["w"].at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x, smem["x"].at[slot], full.at[slot])

        lax.fori_loop(0, end - begin, one, None)
        drain(free)

    def compute(self, refs, smem, full, free):
        """A multiplying warpgroup's part."""
        share, (begin, end) = self.share, self.mine()
        ring = full["ring"], free["ring"]
        if "pairs" in refs:
            plgpu.barrier_wait(full["pairs"])
        for slot in range(self.tiles.stages):
            plgpu.barrier_arrive(ring[1].at[slot])
        if share.each == share.steps:
            self.tile(refs, smem, ring, (lax.axis_index("program"), begin, begin, end))
        else:
            first = lax.div(begin, share.steps)

            def one(i, _):
                tile = first + i
                start = jnp.maximum(begin, tile * share.steps)
                stop = jnp.minimum(end, (tile + 1) * share.steps)
                self.tile(refs, smem, ring, (tile, begin, start, stop))

            lax.fori_loop(0, lax.div(end - 1, share.steps) + 1 - first, one, None)
        plgpu.wait_smem_to_gmem(0)

    def tile(self, refs, smem, ring, at):
        """Makes a tile's sums from steps `start` to `stop` of those that begin with `begin`."""
        (tile, begin, start, stop), tiles, wg = at, self.tiles, lax.axis_index("wg")
        spare, (full, free) = Spare.of(smem, wg), ring
        before, k = start - begin, start - tile * self.share.steps
        high = [(wg * tiles.tall + h) * OUTPUTS for h in range(tiles.tall)]
        held = [pl.ds(pl.multiple_of(first, OUTPUTS), OUTPUTS) for first in high]
        high = [tile * tiles.outputs + first for first in high]
        own = [pl.ds(pl.multiple_of(first, OUTPUTS), OUTPUTS) for first in high]
        units = [(c, h) for c in range(0, tiles.inputs, self.chunk) for h in range(tiles.tall)]

        def run(*accs):
            def one(i, scales):
                slot = lax.rem(before + i, tiles.stages)
                later = self.scales(refs["scale"], own, k + i + 1)
                plgpu.barrier_wait(full.at[slot])
                each = len(scales) // len(units)
                for n, (c, h) in enumerate(units):
                    deep, factors = pl.ds(c, self.chunk), scales[n * each : (n + 1) * each]
                    left = self.widened(smem["w"].at[slot, held[h], deep], smem.get("pairs"))
                    if tiles.ahead:
                        self.ended(n, before + i, i > 0, free)
                    left = self.scaled(left, factors)
                    if not tiles.ahead:
                        self.ended(n, before + i, i > 0, free)
                    spare.add(accs[h], left, smem["x"].at[slot, :, deep].T)
                    if not tiles.ahead and not self.interpret:
                        plgpu.wgmma_wait(0)
                return later

            lax.fori_loop(0, stop - start, one, self.scales(refs["scale"], own, k))
            found = [spare.read(acc, 0) for acc in accs]
            plgpu.barrier_arrive(free.at[lax.rem(before + stop - start - 1, tiles.stages)])
            return found

        found = spare.zeroed(run, *[(OUTPUTS, tiles.rows)] * tiles.tall)
        self.send(refs, smem["out"].at[wg], found, (tile, begin, own))

    def scales(self, scale, own, k) -> list[jax.Array]:
        """Of step k's units, one after the other; none where they are for all inputs."""
        if self.group == self.inputs:
            return []
        k = jnp.minimum(k, self.share.steps - 1)
        found = []
        for c in range(0, self.tiles.inputs, self.chunk):
            for rows in own:
                for g in range(0, self.chunk, self.part):
                    index = lax.div(k * self.tiles.inputs + c + g, self.group)
                    found.append(of_scale(scale.at[rows, index], interpret=self.interpret))
        return found

    def ended(self, unit, step, begun, free) -> None:
        """Waits for the unit before; with a step's last one, its place in the ring is free."""
        if not self.interpret:
            plgpu.wgmma_wait(0)
        if unit == 0:

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
            return scaled(w, scales) if scales or self.tiles.ahead else w
        if not scales:
            return w
        high = OUTPUTS, self.part
        wide = [along(one.astype(self.dtype), high, 0) for one in scales]
        return w * jnp.concatenate(wide, axis=1)

    def send(self, refs, shared, sums, where):
        """Stores a warpgroup's results."""
        (tile, begin, own), out, tiles = where, refs["out"], self.tiles
        wg, program, rows = (lax.axis_index(name) for name in ("wg", "program", "rows"))
        if self.group == self.inputs:
            scales = [of_scale(refs["scale"].at[some, 0], interpret=self.interpret) for some in own]
            sums = [y * along(one, y.shape, 0) for y, one in zip(sums, scales, strict=True)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if self.turned:
            for h, y in enumerate(sums):
                shared.at[h].T[...] = y.astype(out.dtype)
            plgpu.commit_smem()
            count = min(out.shape[0], tiles.rows)
            for h, some in enumerate(own):
                to = out.at[pl.ds(rows * count, count), some]
                plgpu.copy_smem_to_gmem(shared.at[h, pl.ds(0, count)], to)
            return
        slot = tile - lax.div(begin, self.share.steps)
        for h, y in enumerate(sums):  # float32 finds place for one of them
            if h:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared[0] = y
            plgpu.commit_smem()
            here = pl.ds((wg * tiles.tall + h) * OUTPUTS, OUTPUTS)
            plgpu.copy_smem_to_gmem(shared.at[0], out.at[rows, program, slot, here])
