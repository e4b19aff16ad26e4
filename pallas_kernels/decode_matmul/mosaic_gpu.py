# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
"""A decoding step's product on Hopper: one warpgroup loads, one multiplies (Pallas, Mosaic GPU).

Few rows of x leave nothing but the weights' bytes to wait for. Every processor has one program with
an equal share of the outputs, to within eight, and a ring of shared memory that is always full. An
instruction of the tensor cores has 64 rows: they are 64 / `fold` outputs, each cut into `fold`
pieces of its inputs, and x has its pieces as columns. So the sums wanted are those of a piece of
the weights with the same piece of x, on a diagonal, and what is multiplied for nothing costs no
bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.decode_matmul.packed import Packed, Packing, arrange, rounds_of, scales_of
from pallas_kernels.decode_matmul.reference import ACTIVATIONS
from pallas_kernels.once import lowered_once
from pallas_kernels.quantized_matmul.order import stored
from pallas_kernels.quantized_matmul.reference import numbers
from pallas_kernels.quantized_matmul.streamed import CHUNK, layouts
from pallas_kernels.quantized_matmul.widen import widen
from pallas_kernels.target import interpreting, processors
from pallas_kernels.warpgroups import COLUMN, SQUARE, along, multiply, pass_over, swizzled

__all__ = ["Part", "Tiles", "run"]

HIGH = 64  # rows of an instruction
SPREAD = 128  # times that a number stands beside itself, one for each thread
FLIGHT = 32  # columns of sums of codes that are waited for together; more find no registers
TURNED = plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How products are cut; any choice gives the same result up to rounding.

    Attributes:
      fold: pieces of an output's inputs; 1, 2, 4 or 8.
      width: inputs of a piece that come in one step; a multiple of 64.
      stages: steps in flight.
      held: x is kept in shared memory, and does not come with each step.
      consumers: warpgroups that multiply, a tile each in turn.
      woven: neighbouring steps of `fold` x `width` inputs are cut into the pieces, instead of all
        inputs at once, so that a step reads them in one go; fold is 8, and x is held.
    """

    fold: int = 8
    width: int = 256
    stages: int = 6
    held: bool = True
    consumers: int = 2
    woven: bool = False

    @property
    def outputs(self) -> int:
        """Of one tile."""
        return HIGH // self.fold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One product of those that a kernel makes one after the other, each of the result before.

    Attributes:
      inputs: K.
      outputs: O.
      eps: of the norm of its rows, or None.
      gate: activation of the first half of the weights, which multiplies the second, or None.
      residual: what is added: `given`, an earlier part's result by its index, or None.
      packed: what weights of four bits are, the same for all parts; None where they are plain.
    """

    inputs: int
    outputs: int
    eps: float | None = None
    gate: str | None = None
    residual: int | str | None = None
    packed: Packing | None = None

    @property
    def halves(self) -> int:
        return 1 if self.gate is None else 2


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    rows: int
    parts: tuple[Part, ...]
    tiles: Tiles
    ctas: int
    interpret: bool

    @property
    def columns(self) -> int:
        return -(-self.rows * self.tiles.fold // 8) * 8

    @property
    def packed(self) -> Packing | None:
        return self.parts[0].packed

    @property
    def groups(self) -> int:
        """Of a piece in one step."""
        assert self.packed is not None
        return self.tiles.width // self.packed.group

    def piece(self, part: Part) -> int:
        return part.inputs // self.tiles.fold

    def steps(self, part: Part) -> int:
        return self.piece(part) // self.tiles.width

    def grain(self, part: Part) -> int:
        """Neighbouring inputs that lie in one piece."""
        return self.tiles.width if self.tiles.woven else self.piece(part)

    def x_name(self, part: Part) -> str:
        """Its rows' place in shared memory, which parts of as many inputs share."""
        return f"x of {part.inputs}"

    def mine(self, part: Part):
        """This program's tiles of outputs: the first one, and how many."""
        count, cta = part.outputs // self.tiles.outputs, lax.axis_index("cta")
        begin = lax.div(cta * count, self.ctas)
        return begin, lax.div((cta + 1) * count, self.ctas) - begin

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part: the weights of all products in one stream."""
        if self.tiles.held:
            name = self.x_name(self.parts[0])
            self.bring(refs["x0"], smem[name], full[name], self.parts[0])
            self.bring_norms(refs, smem, full)
        before = jnp.int32(0)  # rows and norms are asked for first: behind weights they would wait
        for index, part in enumerate(self.parts):
            before = self.load_part(refs, smem, full, free, (index, part, before))
        for slot in range(self.tiles.stages if self.interpret else 0):  # no barrier ends half-way
            pl.when(slot < before)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))

    def bring_norms(self, refs, smem, full):
        for index, part in enumerate(self.parts):
            if part.eps is not None:
                norm = f"norm{index}"
                self.bring(refs[norm], smem[norm], full[norm], part)

    def load_part(self, refs, smem, full, free, at):
        (index, part, before), tiles, high = at, self.tiles, self.tiles.outputs
        (begin, count), steps = self.mine(part), self.steps(part)

        def one(i, _):
            slot = lax.rem(before + i, tiles.stages)
            tile, k = lax.div(i, steps), lax.rem(i, steps)
            first = (begin + lax.div(tile, part.halves)) * high
            first += lax.rem(tile, part.halves) * part.outputs
            pl.when(before + i >= tiles.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for c in range(tiles.fold):
                start = (k * tiles.fold + c) if tiles.woven else c * steps + k
                deep = pl.ds(start * tiles.width, tiles.width)
                source = refs[f"w{index}"].at[pl.ds(first, high), deep]
                target = smem["w"].at[slot, pl.ds(c * high, high)]
                plgpu.copy_gmem_to_smem(source, target, full["w"].at[slot])
            if self.packed is not None:
                own = pl.ds(k * self.groups * tiles.fold, self.groups * tiles.fold)
                source = refs[f"scale{index}"].at[pl.ds(first, high), own]
                plgpu.copy_gmem_to_smem(source, smem["scales"].at[slot], full["w"].at[slot])
            if not tiles.held:
                deep = pl.ds(k * tiles.width, tiles.width)
                source = refs["x0"].at[pl.ds(0, self.columns), deep]
                plgpu.copy_gmem_to_smem(
                    source, smem[self.x_name(part)].at[slot], full["w"].at[slot]
                )

        total = count * part.halves * steps
        lax.fori_loop(0, total, one, None)
        return before + total

    def compute(self, refs, smem, full, free):
        """A multiplying warpgroup's part."""
        wg = lax.axis_index("wg")
        before = jnp.int32(0)
        for index, part in enumerate(self.parts):
            if index:
                fence()
                self.meet(full)

            @pl.when(wg == 0)
            def _(index=index, part=part):
                if index:  # all programs have what all of them have made
                    gather(refs["counter"], index * self.ctas)
                    fence()
                self.prepare(refs, smem, full, index, part)

            self.meet(full)
            before = self.compute_part(refs, smem, full, free, (index, part, before))
        if len(self.parts) > 1:
            pl.when(wg == 0)(lambda: leave(refs["counter"], len(self.parts) * self.ctas))

    def meet(self, full):
        """Multiplying warpgroups wait for each other."""
        if self.tiles.consumers > 1:
            plgpu.barrier_arrive(full["met"])
            plgpu.barrier_wait(full["met"])

    def prepare(self, refs, smem, full, index, part: Part):
        """One warpgroup's part for all: x in shared memory, and the scales of its rows."""
        held, source = smem[self.x_name(part)], refs[f"out{index - 1}" if index else "x0"]
        scales = []
        if self.tiles.held:
            ready = full[self.x_name(part)]
            if index:
                self.bring(source, held, ready, part)
            plgpu.barrier_wait(ready)
            if part.eps is not None:
                plgpu.barrier_wait(full[f"norm{index}"])
                scales = self.scaled(held, smem[f"norm{index}"], part)
            if self.packed is not None and not self.interpret and not self.packed.arranged:
                self.arranged(held)
        for m, scale in enumerate(scales):
            smem["scale"][m] = jnp.full((SPREAD,), scale)
        plgpu.commit_smem()

    def arranged(self, x) -> None:
        """Brings x into the order in which codes stand when they are widened."""
        plgpu.commit_smem()
        kind = swizzled(x.shape, x.dtype)
        once = lambda i, _: arrange(x, i, kind.transforms)  # noqa: E731
        lax.fori_loop(0, rounds_of(x.shape), once, None)

    def compute_part(self, refs, smem, full, free, at):
        (index, part, before), tiles, rows = at, self.tiles, self.rows
        steps, wg, some = self.steps(part), lax.axis_index("wg"), pl.ds(0, tiles.outputs)
        (begin, count), held = self.mine(part), smem[self.x_name(part)]

        def tile(i, _):
            own = lax.rem(i, tiles.consumers) == wg
            pl.when(own)(lambda: multiplied(i))

            @pl.when(~own)
            def _():  # another's; all of them count what has come, and no one runs ahead
                begun, stages = before + i * part.halves * steps, {"w": tiles.stages}
                pass_over(full, {"w": free}, stages, (begun, begun + part.halves * steps))

        def multiplied(i):
            first = (begin + i) * tiles.outputs
            kept = None
            if part.residual is not None:
                name = "residual" if part.residual == "given" else f"out{part.residual}"
                kept = [self.loaded(self.place(refs[name], m, first)) for m in range(rows)]
                kept = [values.astype(jnp.float32) for values in kept]
            turn = lax.rem(lax.div(i, tiles.consumers), 2)
            sums = smem["sums"].at[wg, turn]
            for half in range(part.halves):
                begun = before + (i * part.halves + half) * steps
                product = self.product if self.packed is None else self.of_codes
                found = product((smem, held), full, free, begun, steps)
                for m, own in enumerate(found):
                    sums[half, m] = own
            if kept is not None and rows > 1:  # by way of shared memory, like the sums
                for m, values in enumerate(kept):
                    smem["kept"][wg, turn, m, some] = values
            plgpu.commit_smem()

            def row(m, _):
                y, *more = (self.joined(sums.at[half, m]) for half in range(part.halves))
                if part.eps is not None:
                    scale = self.loaded(smem["scale"].at[m, some])
                    y, more = y * scale, [x * scale for x in more]
                if part.gate is not None:
                    y = ACTIVATIONS[part.gate](y) * more[0]
                if kept is not None:
                    y += kept[0] if rows == 1 else self.loaded(smem["kept"].at[wg, turn, m, some])
                place = self.place(refs[f"out{index}"], m, first)
                place[...] = y.astype(place.dtype)

            lax.fori_loop(0, rows, row, None) if rows > 1 else row(0, None)

        lax.fori_loop(0, count, tile, None)
        return before + count * part.halves * steps

    def bring(self, source, target, ready, part: Part):
        """Rows [rows x pieces, inputs of a piece] to shared memory, begun and not waited for."""
        rows, width = target.shape[0], self.tiles.width
        if not self.tiles.woven:
            plgpu.copy_gmem_to_smem(source.at[pl.ds(0, rows)], target, ready)
            return
        for m in range(rows // 8):
            for k in range(self.steps(part)):
                own = pl.ds((m * self.steps(part) + k) * 8, 8)
                to = target.at[pl.ds(m * 8, 8), pl.ds(k * width, width)]
                plgpu.copy_gmem_to_smem(source.at[own], to, ready)

    def place(self, ref, m, first):
        """A tile's outputs in a row of [rows x pieces, outputs of a piece]."""
        width = ref.shape[1]
        pieces = ref.shape[0] // self.rows
        own = pl.ds(first if pieces == 1 else lax.rem(first, width), self.tiles.outputs)
        return ref.at[m if pieces == 1 else m * pieces + lax.div(first, width), own]

    def loaded(self, ref):
        return plgpu.load(ref, layout=None if self.interpret else COLUMN, optimized=False)

    def scaled(self, x, norm, part: Part) -> list[jax.Array]:
        """Multiplies x by the norm's weight where it lies; 1 / the root mean square of each row."""
        fold, deep = self.tiles.fold, math.gcd(self.piece(part), 256)
        scales = []
        for m in range(self.rows):
            own = x.at[pl.ds(m * fold, fold)]

            def some(i, squares, own=own):
                here = pl.ds(pl.multiple_of(i * deep, deep), deep)
                values = self.turned(own.at[:, here]).astype(jnp.float32)
                weight = self.turned(norm.at[:, here]).astype(jnp.float32)
                own.at[:, here].T[...] = (values * weight).astype(jnp.bfloat16)
                return squares + values * values

            empty = jnp.zeros((deep, fold), jnp.float32)
            if not self.interpret:
                empty = plgpu.layout_cast(empty, TURNED)
            squares = lax.fori_loop(0, self.piece(part) // deep, some, empty)
            total = jnp.sum(jnp.sum(squares, axis=0))
            scales.append(self.scale(total, part))
        return scales

    def scale(self, squares, part: Part):
        """1 / the root mean square of a row, from its sum of squares."""
        assert part.eps is not None
        return lax.rsqrt(squares / part.inputs + part.eps)

    def turned(self, ref):
        """[inputs, 8] of shared memory [8, inputs]."""
        if self.interpret:
            return ref[...].T
        return plgpu.load(ref.T, layout=TURNED)

    def product(self, smem, full, free, begun, steps) -> list[jax.Array]:
        """A tile's sums [64] of an output's piece with the same piece of x, for each row."""
        tiles, (smem, x_smem) = self.tiles, smem
        w_smem = smem["w"]

        def of_x(k, slot):
            if tiles.held:
                return x_smem.at[:, pl.ds(k * tiles.width, tiles.width)]
            return x_smem.at[slot]

        def run(acc):
            def one(k, _):
                slot = lax.rem(begun + k, tiles.stages)
                plgpu.barrier_wait(full["w"].at[slot])
                plgpu.wgmma(acc, w_smem.at[slot], of_x(k, slot).T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            lax.fori_loop(0, steps, one, None)
            return acc[...]

        sums = pl.run_scoped(run, plgpu.ACC((HIGH, self.columns), jnp.float32))
        return [self.diagonal(sums, m) for m in range(self.rows)]

    def of_codes(self, smem, full, free, begun, steps) -> list[jax.Array]:
        """As `product`, of codes: a group's sums are scaled when they are whole."""
        tiles, packed, (smem, x_smem) = self.tiles, self.packed, smem
        assert packed is not None
        chunk = min(tiles.width, CHUNK)
        stage = smem["stage"].at[lax.axis_index("wg")] if self.interpret else None
        group, acc = packed.group, plgpu.ACC((HIGH, self.columns), jnp.float32)
        pairs = [(c, g) for c in range(tiles.width // chunk) for g in range(chunk // group)]
        at_once = max(1, FLIGHT // self.columns)

        def one(k, total):
            slot = lax.rem(begun + k, tiles.stages)
            plgpu.barrier_wait(full["w"].at[slot])
            scales = scales_of(smem["scales"].at[slot], self.groups, interpret=self.interpret)
            codes = [
                self.codes(smem["w"].at[slot, :, pl.ds(c, chunk)])
                for c in range(0, tiles.width, chunk)
            ]
            plgpu.barrier_arrive(free.at[slot])
            wide = [self.widened(own) for own in codes] if group < chunk else []

            def run(some, *accs):
                for (c, g), own in zip(some, accs, strict=True):
                    here = slice(g * group, (g + 1) * group)
                    left = wide[c][:, here] if wide else self.widened(codes[c])
                    here = pl.ds(k * tiles.width + c * chunk + g * group, group)
                    multiply(own, left, x_smem.at[:, here].T, stage)
                    if stage is not None:
                        plgpu.wgmma_wait(0)
                plgpu.wgmma_wait(0)
                return [own[...] for own in accs]

            for i in range(0, len(pairs), at_once):
                some = pairs[i : i + at_once]
                found = pl.run_scoped(functools.partial(run, some), *[acc] * len(some))
                for (c, g), sums in zip(some, found, strict=True):
                    total += sums * along(scales[c * (chunk // group) + g], sums.shape, 0)
            return total

        empty = jnp.zeros((HIGH, self.columns), jnp.float32)
        if not self.interpret:
            empty = plgpu.layout_cast(empty, SQUARE)
        total = lax.fori_loop(0, steps, one, empty)
        return [self.diagonal(total, m) for m in range(self.rows)]

    def codes(self, ref):
        layout = None if self.interpret else plgpu.Layout.WGMMA_UPCAST_4X
        return plgpu.load(ref, layout=layout)

    def widened(self, codes):
        if self.interpret:
            return numbers(codes, ()).astype(jnp.bfloat16)
        assert self.packed is not None
        return widen(codes, self.packed.kind)

    def squared(self, ref):
        return ref[...] if self.interpret else plgpu.load(ref, layout=SQUARE)

    def diagonal(self, sums, m):
        """A row's sums [64] of an output's piece with the same piece of x."""
        fold, high = self.tiles.fold, self.tiles.outputs
        if fold == 8:
            sums, m = sums[:, m * 8 : m * 8 + 8], 0
        row, column = (iota(sums.shape, dim) for dim in (0, 1))
        sums = jnp.where(column == m * fold + lax.div(row, high), sums, 0.0)
        return jnp.sum(sums, axis=1)

    def joined(self, sums) -> jax.Array:
        """Outputs of a tile: the sums [64] of their pieces, in shared memory, added."""
        high = self.tiles.outputs
        pieces = [self.loaded(sums.at[pl.ds(c * high, high)]) for c in range(self.tiles.fold)]
        return functools.reduce(operator.add, pieces)

    def ring(self) -> dict[str, Any]:
        """Shared memory of the steps in flight."""
        tiles, packed = self.tiles, self.packed
        shape = (tiles.stages, HIGH, tiles.width)
        if packed is None:
            return {"w": swizzled(shape, jnp.bfloat16)}
        transforms = layouts(min(tiles.width, CHUNK), 4)
        scales = (tiles.stages, tiles.outputs, tiles.fold * self.groups)
        smem = {"w": plgpu.SMEM(shape, packed.kind, transforms=transforms)}
        smem["scales"] = plgpu.SMEM(scales, packed.scale)
        if self.interpret:
            staged = (tiles.consumers, HIGH, packed.group)
            smem["stage"] = swizzled(staged, jnp.bfloat16)
        return smem

    def body(self, refs):
        tiles, stages = self.tiles, self.tiles.stages
        columns, dtype = self.columns, jnp.bfloat16
        smem: dict[str, Any] = self.ring()
        copies = tiles.fold + (not tiles.held) + (self.packed is not None)
        full: dict[str, Any] = {"w": plgpu.Barrier(num_arrivals=copies, num_barriers=stages)}
        for index, part in enumerate(self.parts):
            copies = self.steps(part) if tiles.woven else 1
            name, piece = self.x_name(part), self.piece(part)
            x = (columns, piece) if tiles.held else (stages, columns, tiles.width)
            smem[name] = swizzled(x, dtype)
            full[name] = plgpu.Barrier(num_arrivals=copies * self.rows if tiles.woven else 1)
            if part.eps is not None:
                smem[f"norm{index}"] = swizzled((tiles.fold, piece), dtype)
                full[f"norm{index}"] = plgpu.Barrier(num_arrivals=copies)
        if tiles.consumers > 1:
            full["met"] = plgpu.Barrier(num_arrivals=tiles.consumers)
        if any(part.eps is not None for part in self.parts):
            smem["scale"] = plgpu.SMEM((self.rows, SPREAD), jnp.float32)
        # Of two tiles, so that all warps meet once in each; likewise what is added.
        halves = max(part.halves for part in self.parts)
        smem["sums"] = plgpu.SMEM((tiles.consumers, 2, halves, self.rows, HIGH), jnp.float32)
        if self.rows > 1 and any(part.residual is not None for part in self.parts):
            smem["kept"] = plgpu.SMEM((tiles.consumers, 2, self.rows, HIGH), jnp.float32)
        free = plgpu.Barrier(num_arrivals=tiles.consumers, num_barriers=stages)

        def scoped(smem, full, free):
            wg = lax.axis_index("wg")

            @pl.when(wg < tiles.consumers)
            def _():
                self.compute(refs, smem, full, free)

            @pl.when(wg == tiles.consumers)
            def _():
                self.load(refs, smem, full, free)

        pl.run_scoped(scoped, smem, full, free, collective_axes="wg")


def iota(shape, dim):
    """Indices along `dim` in the layout of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=SQUARE)


def fence() -> None:
    """A warpgroup's results are there for TMA, and what others have signalled for this one's."""

    @plgpu.inline_mgpu()
    def both(_):
        utils.inline_ptx("fence.proxy.async;", has_side_effects=True)
        utils.warpgroup_barrier()

    both()


def _semaphore(counter) -> utils.SemaphoreRef:
    """A counter in the device's memory as Mosaic's semaphore."""
    return utils.SemaphoreRef(utils.memref_ptr(counter))


def gather(counter, wanted: int) -> None:
    """A warpgroup's program is here; waits until so many are, each time counted anew."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def both(_, counter):
        semaphore = _semaphore(counter)
        semaphore.signal(1, memory_scope="gpu")
        semaphore.wait(wanted, decrement=False, memory_scope="gpu")

    both(counter)


def leave(counter, most: int) -> None:
    """A program waits no more; the last one, with which the counter has `most`, sets it to 0."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(_, counter):
        utils.inline_ptx(
            "red.relaxed.gpu.global.inc.u32 [$0], $1;",
            _semaphore(counter).ptr,
            utils.c(most - 1, ir.IntegerType.get_signless(32)),
            predicate=utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )

    count(counter)


@lowered_once("parts", "tiles", "out_dtype")
def run(
    x: jax.Array,
    weights: tuple[jax.Array | Packed, ...],
    norms: tuple[jax.Array | None, ...],
    residual: jax.Array | None,
    counter: Any = None,
    *,
    parts: tuple[Part, ...],
    tiles: Tiles,
    out_dtype: str,
) -> tuple[jax.Array, ...]:
    """[M, O] of each part, the last one of `out_dtype`; see `decode_chain` for the rest.

    Weights are all packed or none; packed ones need a fold of 8 and rows that are held and woven.
    """
    rows, fold = x.shape[0], tiles.fold
    most = min(part.outputs for part in parts) // tiles.outputs
    interpret = interpreting()
    ctas = min(processors(), most)
    kernel = Kernel(rows=rows, parts=parts, tiles=tiles, ctas=ctas, interpret=interpret)
    if interpret and kernel.packed is not None and kernel.packed.arranged:
        kind = kernel.packed.kind  # the interpreter widens codes where they are
        x, norms = stored(x, kind), tuple(g if g is None else stored(g, kind) for g in norms)
    given = {"x0": x.reshape(-1, kernel.grain(parts[0]))}
    if interpret and rows * fold % 8:  # TMA reads zeros where the array ends
        given["x0"] = jnp.pad(given["x0"], ((0, kernel.columns - rows * fold), (0, 0)))
    kinds = []
    for index, (part, w, norm) in enumerate(zip(parts, weights, norms, strict=True)):
        if isinstance(w, Packed):
            given[f"scale{index}"] = w.scale.reshape(-1, w.scale.shape[-1])
            w = w.values
        given[f"w{index}"] = w.reshape(-1, part.inputs)
        if norm is not None:
            given[f"norm{index}"] = norm.reshape(-1, kernel.grain(part))
        last = index == len(parts) - 1
        grain = part.outputs if last else kernel.grain(parts[index + 1])
        shape = (rows * (part.outputs // grain), grain)
        kinds.append(jax.ShapeDtypeStruct(shape, out_dtype if last else jnp.bfloat16))
    if residual is not None:
        given["residual"] = residual
    if len(parts) > 1 and counter is None:
        counter = jax.new_ref(jnp.zeros(1, jnp.int32))
    held = {"counter": counter}
    names = (*given, *(f"out{index}" for index in range(len(parts))))
    found = plgpu.kernel(
        lambda *refs: kernel.body(dict(zip(names, refs, strict=True)) | held),
        out_type=tuple(kinds),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=tiles.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=2048
        ),
        kernel_name="decode_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(*given.values())
    return tuple(y.reshape(rows, -1) for y in found)
