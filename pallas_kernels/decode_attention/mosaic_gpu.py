# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""One new token a sequence on Hopper: its rotation, its place in the cache, and what it sees.

A dense cache is one page a sequence; pages of a pool are found in a table.

A cluster of up to eight programs of one warpgroup shares a sequence's keys of one head, steps in
turns; its first program adds their sums up, which it reads from their shared memory.
Keys are the rows of a product and queries its columns. The new key never lies in a tile: its
score is a sum of registers that is made while the first keys are on their way.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import COLUMN, ROW, along, capped, iota, swizzled, weighed

__all__ = ["MOST_GROUP", "Tiles", "attend", "tiles_for"]

MOST_GROUP = COLUMNS = 8  # query heads of a key head: the columns of a product
_MOST_PARTS = 8  # programs of a cluster


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a call is cut; any choice gives the same result up to rounding.

    Attributes:
      keys: of a step, a multiple of 64.
      stages: steps in flight.
      parts: programs of a cluster, which share a sequence's keys; a power of two up to 8.
    """

    keys: int = 128
    stages: int = 2
    parts: int = 1


def tiles_for(programs: int, slots: int, processors: int) -> Tiles:
    """As many parts as there are processors and steps of keys for, by measured times (NOTES.md).

    Of more programs than two a processor, four fit on one with short steps.
    """
    tiles, parts = Tiles(keys=64 if programs > 2 * processors else 128), 1
    while (
        2 * parts <= _MOST_PARTS
        and 2 * parts * programs <= processors
        and parts * tiles.keys < slots
    ):
        parts *= 2
    return dataclasses.replace(tiles, parts=parts)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
      pool: pages, tokens a page, K and H; a dense cache is a page a sequence.
      table: columns of the table of pages; None for a dense cache.
      rotates: whether queries and keys are turned.
    """

    problem: Problem
    pool: tuple[int, ...]
    table: int | None
    dtype: jnp.dtype
    rotates: bool
    tiles: Tiles
    interpret: bool

    @property
    def unit(self) -> int:
        """Keys that come in one copy."""
        return self.tiles.keys if self.table is None else min(self.tiles.keys, self.pool[1])

    @property
    def width(self) -> int:
        return self.pool[3]

    @property
    def group(self) -> int:
        return self.problem.heads // self.pool[2]

    @property
    def asks(self) -> list[pl.Slice]:
        """Queries of a group that come together: all, or each by itself.

        A copy to eight rows wants an array of whole eights.
        """
        whole = self.group < COLUMNS or (self.problem.heads + 2 * self.pool[2]) % COLUMNS == 0
        many = self.group if whole else 1
        return [pl.ds(first, many) for first in range(0, self.group, many)]

    def held(self) -> dict:
        """Shared memory."""
        width, keys = self.width, self.tiles.keys
        return {
            "k": swizzled((self.tiles.stages, keys, width), self.dtype),
            "v": swizzled((self.tiles.stages, keys, width), self.dtype),
            "q": swizzled((COLUMNS, width), self.dtype),
            "weights": swizzled((COLUMNS, keys), self.dtype),
            "asked": plgpu.SMEM((COLUMNS, width), self.dtype),
            "both": plgpu.SMEM((2 * width, COLUMNS), jnp.float32),
            "twice": plgpu.SMEM((2 * width,), jnp.float32),
            "new": plgpu.SMEM((2, width), self.dtype),
            "sums": plgpu.SMEM((width, COLUMNS), jnp.float32),
            "peak": plgpu.SMEM((COLUMNS,), jnp.float32),
            "total": plgpu.SMEM((COLUMNS,), jnp.float32),
            "out": plgpu.SMEM((COLUMNS, width), self.dtype),
        }

    def body(self, refs):
        pl.run_scoped(
            lambda smem, full, asked: self.program(refs, smem, full, asked),
            self.held(),
            plgpu.Barrier(
                num_arrivals=2 * (self.tiles.keys // self.unit), num_barriers=self.tiles.stages
            ),
            plgpu.Barrier(num_arrivals=2 + len(self.asks)),
        )

    def program(self, refs, smem, full, asked):
        index, (keys, stages, parts) = lax.axis_index("cta"), dataclasses.astuple(self.tiles)
        at = lax.div(index, self.pool[2]), lax.rem(index, self.pool[2])
        part = lax.axis_index("part") if parts > 1 else jnp.int32(0)
        self.ask(refs, smem, asked, at)
        position = refs["positions"][at[0]]
        base, end = self.bounds(refs, at[0], position)
        steps = jnp.maximum(lax.div(end - base + keys, keys), 0)
        mine = lax.div(jnp.maximum(steps - part + (parts - 1), 0), parts)
        begin_of = lambda i: base + (part + i * parts) * keys  # noqa: E731

        def bring(i, slot):
            """A part's step i, begun; behind the last key any page will do."""
            places = [self.place(refs, at[0], begin_of(i) + n) for n in range(0, keys, self.unit)]

            def copies():
                for n, (page, first) in enumerate(places):
                    own = pl.ds(n * self.unit, self.unit)
                    for name in ("k", "v"):
                        theirs = refs[name].at[page, pl.ds(first, self.unit), at[1]]
                        plgpu.copy_gmem_to_smem(theirs, smem[name].at[slot, own], full.at[slot])

            pl.when(i < mine)(copies)

        for slot in range(stages):
            bring(slot, slot)
        plgpu.barrier_wait(asked)
        score = self.prepare(refs, smem, at)
        holds = (steps > 0) & (lax.rem(steps - 1, parts) == part)
        pl.when(holds & (end == position))(lambda: self.remember(refs, smem, at, position))

        def step(i, carry):
            slot, begin = lax.rem(i, stages), begin_of(i)
            plgpu.barrier_wait(full.at[slot])

            @pl.when(begin + keys > end)
            def _():
                self.patch(smem, slot, position - begin)

            carry = self.fold(smem, slot, (begin, position, end), score, carry)
            bring(i + stages, slot)
            return carry

        found = lax.fori_loop(0, mine, step, self.nothing())
        self.hand_out(refs, smem, found, (*at, part))

    def bounds(self, refs, row, position):
        """Places of the first key that is brought, and of the last: that of the new token, or of a
        dense cache's last slot."""
        base = jnp.int32(0)
        if self.problem.window is not None:
            base = lax.div(jnp.maximum(position - self.problem.window, 0), self.unit) * self.unit
        if self.table is None:
            return base, jnp.minimum(position, self.pool[1] - 1)
        return jnp.maximum(base, refs["firsts"][row] * self.pool[1]), position

    def place(self, refs, row, token):
        """(page, place in it) of a token of a sequence."""
        if self.table is None:
            return row, token
        column = lax.div(token, self.pool[1]) - refs["firsts"][row]
        page = refs["table"][row, jnp.clip(column, 0, self.table - 1)]
        return jnp.clip(page, 0, self.pool[0] - 1), lax.rem(token, self.pool[1])

    def remember(self, refs, smem, at, position):
        """Writes the new key and value."""
        page, place = self.place(refs, at[0], position)
        for side, name in enumerate(("k", "v")):
            target = refs[name].at[page, place, at[1]]
            plgpu.copy_smem_to_gmem(smem["new"].at[side], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def ask(self, refs, smem, asked, at):
        """Brings a group's queries and the new key and value."""
        row, head = at
        heads, kv_heads = self.problem.heads, self.pool[2]
        for some in self.asks:
            own = pl.ds(head * self.group + some.start, some.size)
            plgpu.copy_gmem_to_smem(refs["qkv"].at[row, own], smem["asked"].at[some], asked)
        for side in range(2):
            theirs = refs["qkv"].at[row, heads + side * kv_heads + head]
            plgpu.copy_gmem_to_smem(theirs, smem["new"].at[side], asked)

    def prepare(self, refs, smem, at):
        """Turns queries and the new key where they lie; the new key's score of each query."""
        queries = self.load(smem["asked"].T, plgpu.Layout.WGMMA).astype(jnp.float32)
        key = self.load(smem["new"].at[0], ROW).astype(jnp.float32)
        if self.rotates:
            width, half = self.width, self.width // 2
            for i in range(2):
                smem["both"].at[pl.ds(i * width, width)][...] = queries
                smem["twice"].at[pl.ds(i * width, width)][...] = key
            plgpu.commit_smem()
            cosines, sines = (self.load(refs["turns"].at[at[0], i], ROW) for i in range(2))
            queries = queries * along(cosines, queries.shape, 0)
            swapped = self.load(smem["both"].at[pl.ds(half, width)], plgpu.Layout.WGMMA)
            queries = queries + swapped * along(sines, queries.shape, 0)
            key = key * cosines + self.load(smem["twice"].at[pl.ds(half, width)], ROW) * sines
        turned, key = queries.astype(self.dtype), key.astype(self.dtype)
        smem["q"].T[...] = turned
        if self.rotates:
            smem["new"].at[0][...] = key
        plgpu.commit_smem()
        wide = key.astype(jnp.float32)
        return jnp.sum(turned.astype(jnp.float32) * along(wide, turned.shape, 0), axis=0)

    def load(self, ref, layout):
        """Registers with what a ref holds, one by one."""
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, layout=layout, optimized=False)

    def patch(self, smem, slot, place):
        """The new value at its place of a step, and zeros behind, where there may be NaN."""
        tile = smem["v"].at[slot]
        for i in range(0, self.width, 64):
            part = tile.at[:, pl.ds(i, 64)]
            row = iota((self.tiles.keys, 64), 0)
            value = self.load(smem["new"].at[1, pl.ds(i, 64)], COLUMN)
            kept = jnp.where(row < place, part[...], jnp.zeros((), self.dtype))
            part[...] = jnp.where(row == place, along(value, kept.shape, 1), kept)
        plgpu.commit_smem()

    def nothing(self):
        """Sums [H, 8] and totals [keys, 8] that are added up at the end, and peaks."""
        out = jnp.zeros((self.width, COLUMNS), jnp.float32)
        peak, total = (
            jnp.full((COLUMNS,), -jnp.inf, jnp.float32),
            jnp.zeros((self.tiles.keys, COLUMNS), jnp.float32),
        )
        if self.interpret:
            return out, peak, total
        cast, square = plgpu.layout_cast, plgpu.Layout.WGMMA
        return cast(out, square), cast(peak, COLUMN), cast(total, square)

    def fold(self, smem, slot, ends, score, carry):
        """Sums with one more step's keys; `ends`: its first place, the query's and the last."""
        out, peak, total = carry
        (begin, position, end), shape, problem = ends, (self.tiles.keys, COLUMNS), self.problem

        def product(left, right, size):
            def run(acc):
                plgpu.wgmma(acc, left, right)
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC(size, jnp.float32))

        scores = product(smem["k"].at[slot], smem["q"].T, shape)
        key = iota(shape, 0) + begin
        scores = jnp.where(key == position, along(score, shape, 1), scores)
        scores, factor = capped(scores, problem.scale, problem.softcap)
        seen = key <= end
        if problem.window is not None:
            seen = seen & (key >= position - problem.window)
        weights, decay, higher = weighed(scores * factor, seen, peak, 0)
        total = total * along(decay, shape, 1) + weights
        smem["weights"].T[...] = weights.astype(self.dtype)
        plgpu.commit_smem()
        found = product(smem["v"].at[slot].T, smem["weights"].T, out.shape)
        return out * along(decay, out.shape, 1) + found, higher, total

    def hand_out(self, refs, smem, found, at):
        """The first program of a cluster adds all parts up and writes the result."""
        out, peak, total = found
        total = jnp.sum(total, axis=0)
        if self.tiles.parts == 1:
            self.write(refs, smem, out, total, at)
            plgpu.wait_smem_to_gmem(0)
            return
        part = at[2]
        smem["sums"][...], smem["peak"][...], smem["total"][...] = out, peak, total
        plgpu.commit_smem()
        meet()

        @pl.when(part == 0)
        def _():
            others = [jnp.int32(i) for i in range(self.tiles.parts)]
            peaks = [
                self.load(plgpu.cluster_ref(smem["peak"], {"part": i}), COLUMN) for i in others
            ]
            highest = peaks[0]
            for other in peaks[1:]:
                highest = jnp.maximum(highest, other)
            sums, totals = jnp.zeros_like(out), jnp.zeros_like(total)
            for i, own in zip(others, peaks, strict=True):
                decay = jnp.where(own == -jnp.inf, 0.0, jnp.exp2(own - highest))
                theirs = (plgpu.cluster_ref(smem[name], {"part": i}) for name in ("sums", "total"))
                sum_, total_ = next(theirs), next(theirs)
                totals = totals + self.load(total_, COLUMN) * decay
                found = self.load(sum_, plgpu.Layout.WGMMA)
                sums = sums + found * along(decay, out.shape, 1)
            self.write(refs, smem, sums, totals, at)

        meet()  # nobody ends while its memory is read
        plgpu.wait_smem_to_gmem(0)

    def write(self, refs, smem, sums, total, at):
        """The result of all keys; zeros where there are none."""
        share = jnp.where(total > 0.0, 1.0 / total, 0.0)
        smem["out"].T[...] = (sums * along(share, sums.shape, 1)).astype(self.dtype)
        plgpu.commit_smem()
        target = refs["out"].at[at[0], pl.ds(at[1] * self.group, self.group)]
        plgpu.copy_smem_to_gmem(smem["out"].at[pl.ds(0, self.group)], target)


def meet() -> None:
    """All programs of a cluster are here, and see what the others' memory holds."""

    @plgpu.inline_mgpu()
    def both(_):
        utils.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True)
        utils.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True)

    both()


@lowered_once("problem", "tiles", "interpret")
def attend(
    qkv: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    turns: jax.Array | None,
    pages: tuple[jax.Array, jax.Array] | None = None,
    *,
    problem: Problem,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention`; any tiles will do."""
    rows = qkv.shape[0]
    kernel = Kernel(
        problem=problem,
        pool=k.shape,
        table=None if pages is None else pages[0].shape[1],
        dtype=jnp.dtype(k.dtype),
        rotates=turns is not None,
        tiles=tiles,
        interpret=interpret,
    )
    caches = {"k": jax.new_ref(k), "v": jax.new_ref(v)}
    inputs = {"qkv": qkv, "positions": positions}
    inputs |= {} if turns is None else {"turns": turns}
    inputs |= {} if pages is None else dict(zip(("table", "firsts"), pages, strict=True))

    def body(*refs):
        kernel.body(dict(zip((*inputs, "out"), refs, strict=True)) | caches)

    cluster = {"cluster": (tiles.parts,), "cluster_names": ("part",)} if tiles.parts > 1 else {}
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, problem.heads, k.shape[3]), qkv.dtype),
        grid=(rows * k.shape[2],),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        kernel_name="decode_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        **cluster,
    )(*inputs.values())
    return out, jax.freeze(caches["k"]), jax.freeze(caches["v"])
