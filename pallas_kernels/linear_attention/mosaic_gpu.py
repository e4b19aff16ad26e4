# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The walks on Hopper: one warpgroup loads, two compute (Pallas, Mosaic GPU backend).

A program walks over the chunks of one head for some columns of its matrix, half of them a consumer:
columns know nothing of each other. A consumer's part of the matrix stays in registers in float32;
its rounded copy in shared memory is what the chunk's products read.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.within import SIZE, Inside
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import (
    CONSUMERS,
    ROW,
    SQUARE,
    Spare,
    along,
    drain,
    roles,
    run_kernel,
    swizzled,
)

__all__ = ["COLUMNS", "backward", "forward", "states"]

COLUMNS = 128  # of a program
_WIDTH = COLUMNS // CONSUMERS  # of a consumer: what a product's right operand has to have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a kernel is compiled for."""

    batch: int
    heads: int
    chunks: int
    state: int  # rows of a matrix
    parts: int  # programs of a head
    dtype: jnp.dtype
    interpret: bool
    stages: int = 2

    @classmethod
    def of(cls, inside: Inside, *, interpret: bool) -> Sizes:
        batch, heads, chunks, state = inside.held.shape
        return cls(
            batch=batch,
            heads=heads,
            chunks=chunks,
            state=state,
            parts=inside.given.shape[-1] // COLUMNS,
            dtype=jnp.dtype(inside.given.dtype),
            interpret=interpret,
        )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What both kernels share: loading what a chunk needs, and who owns what."""

    sizes: Sizes
    names: frozenset[str]

    shared = ("reads", "writes", "erased", "seen")  # by both consumers
    own = "given"  # a consumer's columns of [B, N, C Q, H]

    def at(self, i):
        return i

    def place(self):
        """(sequence, head, first column of each consumer)."""
        batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        first = part * COLUMNS
        return batch, head, [first + wg * _WIDTH for wg in range(CONSUMERS)]

    def load(self, refs, smem, full, free):
        batch, head, columns = self.place()

        def one(i, _):
            slot, chunk = lax.rem(i, self.sizes.stages), self.at(i)
            tokens = pl.ds(chunk * SIZE, SIZE)
            plgpu.barrier_wait(free.at[slot])

            def bring(where, target):
                plgpu.copy_gmem_to_smem(where, target, full.at[slot])

            for name in self.shared:
                if name in self.names:
                    bring(refs[name].at[batch, head, tokens], smem[name].at[slot])
            for wg, column in enumerate(columns):
                where = refs[self.own].at[batch, head, tokens, pl.ds(column, _WIDTH)]
                bring(where, smem[self.own].at[slot, wg])
            bring(refs["held"].at[batch, head, chunk], smem["held"].at[slot])
            if "reach" in self.names:
                bring(refs["reach"].at[batch, tokens], smem["reach"].at[slot])

        lax.fori_loop(0, self.sizes.chunks, one, None)
        drain({"ring": free})

    def compute(self, refs, smem, full, free):
        wg, sizes = lax.axis_index("wg"), self.sizes
        batch, head, columns = self.place()
        column = columns[0] + wg * _WIDTH
        own = pl.ds(column, _WIDTH)
        spare = Spare.of(smem, wg)
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(free.at[slot])

        def walk(state):
            start = refs["start"].at[batch, head, :, own]
            state[...] = plgpu.load(start, layout=SQUARE, optimized=False)
            smem["state"].at[wg][...] = state[...].astype(sizes.dtype)
            plgpu.commit_smem()

            def one(i, _):
                slot, chunk = lax.rem(i, sizes.stages), self.at(i)
                plgpu.barrier_wait(full.at[slot])
                memory = {x: smem[x].at[slot] for x in (*self.shared, "held") if x in smem}
                if "reach" in self.names:
                    memory["reach"] = smem["reach"].at[slot]
                memory[self.own] = smem[self.own].at[slot, wg]
                memory |= {x: smem[x].at[wg] for x in ("state", "out")}
                self.chunk(memory, state, spare, (refs, (batch, head, chunk, own)))
                plgpu.barrier_arrive(free.at[slot])

            lax.fori_loop(0, sizes.chunks, one, None)
            return state[...]

        last = spare.zeroed(walk, (sizes.state, _WIDTH))
        refs["last"].at[batch, head, :, own][...] = last
        plgpu.wait_smem_to_gmem(0)

    def left(self, memory, state):
        """What is left of a matrix; zeros where that is nothing, be it NaN."""
        held = along(plgpu.load(memory["held"], layout=ROW), state.shape, 0)
        return jnp.where(held == 0.0, 0.0, state[...] * held)

    def body(self, refs):
        sizes, stages = self.sizes, self.sizes.stages
        wide = {"seen": SIZE}
        smem = {
            name: swizzled((stages, SIZE, wide.get(name, sizes.state)), sizes.dtype)
            for name in self.shared
            if name in self.names
        }
        copies = len(smem) + CONSUMERS + 1
        half = (CONSUMERS, SIZE, _WIDTH)
        smem |= {
            self.own: swizzled((stages, *half), sizes.dtype),
            "held": plgpu.SMEM((stages, sizes.state), jnp.float32),
            "state": swizzled((CONSUMERS, sizes.state, _WIDTH), sizes.dtype),
            "out": swizzled(half, sizes.dtype),
        }
        if "reach" in self.names:
            smem["reach"] = plgpu.SMEM((stages, SIZE), jnp.int32)
            copies += 1
        smem |= Spare.kinds(sizes, (SIZE, SIZE), (sizes.state, _WIDTH), (SIZE, _WIDTH))
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        roles(self, refs, smem, full, free)


@dataclasses.dataclass(frozen=True)
class Forward(_Walk):
    """u = given + E S; o = R S + P u; S <- h S + W^T u: gives o, or without `seen` every S and u.

    Its memory for `given` becomes that of u.
    """

    def chunk(self, memory, state, spare, target):
        """One chunk, from and to shared memory."""
        sizes = self.sizes
        if "erased" in self.names:
            self.write(memory)
        refs, (batch, head, chunk, own) = target
        tokens = pl.ds(chunk * SIZE, SIZE)
        if "seen" not in self.names:
            plgpu.copy_smem_to_gmem(
                memory["state"], refs["states"].at[batch, head, chunk, :, own], commit_group=False
            )
            plgpu.copy_smem_to_gmem(
                memory["given"], refs["u"].at[batch, head, tokens, own], commit_group=False
            )
            plgpu.commit_smem_to_gmem_group()
            state[...] = self.left(memory, state)
            spare.add_shared(state, memory["writes"].T, memory["given"])
            new = spare.read(state, 0).astype(sizes.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory["state"][...] = new
            plgpu.commit_smem()
            return

        def products(read):
            plgpu.wgmma(read, memory["reads"], memory["state"])
            state[...] = self.left(memory, state)
            spare.add_shared(state, memory["writes"].T, memory["given"])
            out = spare.kept(read, 1)
            if "reach" in self.names or sizes.interpret:
                out[...] = self.reaching(memory, plgpu.wgmma_accumulator_load(read, wait_n=1))
            spare.add_shared(out, memory["seen"], memory["given"])
            new = spare.read(state, 1).astype(sizes.dtype)
            # No warp's first product reads the state any more: this waits for all of them.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory["state"][...] = new
            memory["out"][...] = spare.read(out, 0).astype(sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory["out"], refs["o"].at[batch, head, tokens, own])

        pl.run_scoped(products, plgpu.ACC((SIZE, _WIDTH), jnp.float32))

    def reaching(self, memory, x):
        """Zeros where the state before the chunk, be it NaN, is not what tokens read."""
        if "reach" not in self.names:
            return x
        begun = along(plgpu.load(memory["reach"], layout=ROW), x.shape, 0)
        return jnp.where(begun == 0, x, 0.0)

    def write(self, memory):
        """u, in place of what was given."""

        def product(acc):
            plgpu.wgmma(acc, memory["erased"], memory["state"])
            given = plgpu.load(memory["given"], layout=SQUARE).astype(jnp.float32)
            return given + self.reaching(memory, plgpu.wgmma_accumulator_load(acc, wait_n=0))

        u = pl.run_scoped(product, plgpu.ACC((SIZE, _WIDTH), jnp.float32))
        memory["given"][...] = u.astype(self.sizes.dtype)
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Backward(_Walk):
    """du = P^T do + W dS; dS <- h dS + R^T do + E^T du, from the last chunk on: gives every du and
    dS."""

    own = "do"

    def at(self, i):
        return self.sizes.chunks - 1 - i

    def chunk(self, memory, state, spare, target):
        """One chunk, from and to shared memory."""
        dtype = self.sizes.dtype
        refs, (batch, head, chunk, own) = target

        def product(acc):
            plgpu.wgmma(acc, memory["writes"], memory["state"])
            du = spare.kept(acc, 1)
            if self.sizes.interpret:
                du[...] = plgpu.wgmma_accumulator_load(acc, wait_n=0)
            spare.add_shared(du, memory["seen"].T, memory["do"])
            state[...] = self.left(memory, state)
            spare.add_shared(state, memory["reads"].T, memory["do"])
            return spare.read(du, 1)

        du = pl.run_scoped(product, plgpu.ACC((SIZE, _WIDTH), jnp.float32))
        plgpu.copy_smem_to_gmem(
            memory["state"], refs["after"].at[batch, head, chunk, :, own], commit_group=False
        )
        memory["out"][...] = du.astype(dtype)
        plgpu.commit_smem()
        where = refs["du"].at[batch, head, pl.ds(chunk * SIZE, SIZE), own]
        plgpu.copy_smem_to_gmem(memory["out"], where, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        if "erased" in self.names:
            spare.add_shared(state, memory["erased"].T, memory["out"])
        new = spare.read(state, 0).astype(dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        memory["state"][...] = new
        plgpu.commit_smem()


def _run(kind, inside: Inside, inputs: dict, outputs: dict, *, name: str, interpret: bool):
    """Runs a walk over what is there of a call."""
    sizes = Sizes.of(inside, interpret=interpret)
    kernel = kind(sizes, frozenset(inputs))
    grid = {"batch": sizes.batch, "head": sizes.heads, "part": sizes.parts}
    return run_kernel(kernel, inputs, outputs, name=name, grid=grid, interpret=interpret)


@lowered_once("interpret")
def forward(inside: Inside, reach, initial, *, interpret: bool = False):
    """(o [B, N, C Q, H], the last matrix); M is a multiple of 64, H of COLUMNS.

    Args:
      inside: of `within`.
      reach: of `reached`, or None.
      initial: float32 [B, N, M, H].
    """
    like = inside.kinds()
    outputs = {"o": like["tokens"], "last": like["last"]}
    inputs = inside.there(reach=reach, start=initial)
    return _run(Forward, inside, inputs, outputs, name="linear_attention", interpret=interpret)


@lowered_once("interpret")
def states(inside: Inside, reach, initial, *, interpret: bool = False):
    """(every S [B, N, C, M, H], every u [B, N, C Q, H]) of the same walk."""
    like = inside.kinds()
    outputs = {"states": like["states"], "u": like["tokens"], "last": like["last"]}
    inputs = inside.there(reach=reach, start=initial, seen=None, reads=None)
    how = {"name": "linear_attention_states", "interpret": interpret}
    return _run(Forward, inside, inputs, outputs, **how)[:2]


@lowered_once("interpret")
def backward(inside: Inside, do, dlast, *, interpret: bool = False):
    """(every du [B, N, C Q, H], every dS after a chunk, the dS before all)."""
    like = inside.kinds()
    outputs = {"du": like["tokens"], "after": like["states"], "last": like["last"]}
    inputs = inside.there(do=do, given=None, start=dlast)
    how = {"name": "linear_attention_back", "interpret": interpret}
    return _run(Backward, inside, inputs, outputs, **how)
