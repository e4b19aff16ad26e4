# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The selective scan on Hopper (Pallas, Mosaic GPU backend): a loop over tokens.

A program is one warpgroup that holds the states of some channels in registers, a row a channel in
the layout of an accumulator, and walks over the tokens of one sequence. Tokens come in pieces by
TMA, the next while one is walked over. Many small programs share a processor.

The backward pass walks from the last piece to the first. Of each it makes the states again, from
the one before the piece, into shared memory, then goes back over them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import COLUMN, LOG2E, ROW, SQUARE, along

__all__ = ["Tiles", "backward", "forward"]


_COPIED = 32  # floats: TMA copies to multiples of 128 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a scan is cut; any choice gives the same result.

    Attributes:
      channels: of a program, a multiple of 64.
      tokens: of a piece.
      unroll: tokens of a loop's step.
    """

    channels: int = 64
    tokens: int = 64
    unroll: int = 8


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What both kernels share: where a program is, what it loads, and the step from a token."""

    shape: tuple[int, int, int, int]  # B, T, I, M
    tiles: Tiles
    dtype: jnp.dtype
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    interpret: bool

    by_channel = ("x", "dt")
    shared = ("b", "c")

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.shape[1], self.tiles.tokens)

    @property
    def states(self) -> tuple[int, int]:
        return self.tiles.channels, self.shape[3]

    def memory(self) -> dict:
        """Shared memory for what is loaded, twice."""
        tokens, narrow = self.tiles.tokens, ("x", "dy")
        piece = (2, tokens, self.tiles.channels)
        smem = {
            name: plgpu.SMEM(piece, self.dtype if name in narrow else jnp.float32)
            for name in self.by_channel
        }
        smem |= {name: plgpu.SMEM((2, tokens, self.shape[3]), jnp.float32) for name in self.shared}
        if "keep" in self.inputs:
            smem["keep"] = plgpu.SMEM((2, max(tokens, _COPIED)), jnp.float32)
        return smem

    def body(self, *refs):
        refs = dict(zip((*self.inputs, *self.outputs), refs, strict=True))
        loaded = self.memory()
        full = plgpu.Barrier(num_arrivals=len(loaded), num_barriers=2)
        smem = loaded | self.results()
        pl.run_scoped(lambda smem, full: self.program(refs, smem, full), smem, full)

    def place(self):
        """(sequence, channels)."""
        first = lax.axis_index("tile") * self.tiles.channels
        return lax.axis_index("batch"), pl.ds(first, self.tiles.channels)

    def bring(self, i, refs, smem, full):
        """Begins to load a piece."""
        batch, own = self.place()
        slot, tokens = lax.rem(i, 2), pl.ds(i * self.tiles.tokens, self.tiles.tokens)
        for name in self.by_channel:
            where = refs[name].at[batch, tokens, own]
            plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full.at[slot])
        for name in self.shared:
            where = refs[name].at[batch, tokens]
            plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full.at[slot])
        if "keep" in smem:
            target = smem["keep"].at[slot, pl.ds(0, self.tiles.tokens)]
            plgpu.copy_gmem_to_smem(refs["keep"].at[batch, tokens], target, full.at[slot])

    def row(self, smem, name: str, slot, t):
        """A token's values a channel."""
        return plgpu.load(smem[name].at[slot, t], layout=ROW).astype(jnp.float32)

    def column(self, smem, name: str, slot, t):
        """A token's values a state."""
        return plgpu.load(smem[name].at[slot, t], layout=COLUMN)

    def kept(self, smem, slot, t, h):
        """States that a token finds: zeros where a sequence begins with it, be they NaN."""
        if "keep" not in smem:
            return h
        keep = plgpu.layout_cast(jnp.full(self.states, smem["keep"][slot, t]), SQUARE)
        return jnp.where(keep == 0.0, 0.0, h)

    def step(self, smem, slot, t, rate, h):
        """The states after a token."""
        dt = self.row(smem, "dt", slot, t)
        entering = along(dt * self.row(smem, "x", slot, t), self.states, 0)
        decay = jnp.exp2(rate * along(dt, self.states, 0))
        b = along(self.column(smem, "b", slot, t), self.states, 1)
        return decay * self.kept(smem, slot, t, h) + entering * b


@dataclasses.dataclass(frozen=True)
class Forward(_Scan):
    """Gives y and the last states, or the states before every piece."""

    def results(self) -> dict:
        """Shared memory for what is stored."""
        if "y" not in self.outputs:
            return {}
        return {"y": plgpu.SMEM((self.tiles.tokens, self.tiles.channels), self.dtype)}

    def program(self, refs, smem, full):
        tiles = self.tiles
        batch, own = self.place()
        self.bring(jnp.int32(0), refs, smem, full)
        rate = plgpu.load(refs["a"].at[own], layout=SQUARE, optimized=False) * LOG2E
        start = plgpu.load(refs["initial"].at[batch, own], layout=SQUARE, optimized=False)

        def walk(i, h):
            slot = lax.rem(i, 2)

            @pl.when(i + 1 < self.pieces)
            def _():
                self.bring(i + 1, refs, smem, full)

            if "states" in refs:
                refs["states"].at[batch, i, own][...] = h
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def some(j, h):
                for k in range(tiles.unroll):
                    t = j * tiles.unroll + k
                    h = self.step(smem, slot, t, rate, h)
                    if "y" in smem:
                        c = along(self.column(smem, "c", slot, t), self.states, 1)
                        smem["y"].at[t][...] = jnp.sum(h * c, axis=1).astype(self.dtype)
                return h

            h = lax.fori_loop(0, tiles.tokens // tiles.unroll, some, h)
            plgpu.commit_smem()  # waits for all warps, too: the next piece is loaded over this one
            if "y" in smem:
                target = refs["y"].at[batch, pl.ds(i * tiles.tokens, tiles.tokens), own]
                plgpu.copy_smem_to_gmem(smem["y"], target)
            return h

        refs["final"].at[batch, own][...] = lax.fori_loop(0, self.pieces, walk, start)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Backward(_Scan):
    """Gives the gradients of x and dt, those of b and c by these channels, of a by this sequence,
    and of the first states."""

    by_channel = ("x", "dt", "dy")

    def results(self) -> dict:
        """Shared memory for states, and for what is stored."""
        tokens, channels = self.tiles.tokens, self.tiles.channels
        return {
            "before": plgpu.SMEM((tokens, *self.states), jnp.float32),
            "dx": plgpu.SMEM((tokens, channels), self.dtype),
            "ddt": plgpu.SMEM((tokens, channels), jnp.float32),
            "db": plgpu.SMEM((tokens, self.shape[3]), jnp.float32),
            "dc": plgpu.SMEM((tokens, self.shape[3]), jnp.float32),
        }

    def program(self, refs, smem, full):
        batch, own = self.place()
        tile, tokens = lax.axis_index("tile"), self.tiles.tokens
        self.bring(jnp.int32(self.pieces - 1), refs, smem, full)

        def matrix(ref):
            return plgpu.load(ref, layout=SQUARE, optimized=False)

        rate = matrix(refs["a"].at[own]) * LOG2E
        pull = matrix(refs["dfinal"].at[batch, own])
        zero = plgpu.layout_cast(jnp.zeros(self.states, jnp.float32), SQUARE)

        def walk(i, sums):
            piece = self.pieces - 1 - i
            slot = lax.rem(piece, 2)

            @pl.when(piece > 0)
            def _():
                self.bring(piece - 1, refs, smem, full)

            before = matrix(refs["states"].at[batch, piece, own])
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sums = self.piece(smem, slot, rate, (before, *sums))
            plgpu.commit_smem()
            rows = pl.ds(piece * tokens, tokens)
            for name in ("dx", "ddt"):
                target = refs[name].at[batch, rows, own]
                plgpu.copy_smem_to_gmem(smem[name], target, commit_group=False)
            for name in ("db", "dc"):
                target = refs[name].at[batch, tile, rows]
                plgpu.copy_smem_to_gmem(smem[name], target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            return sums

        pull, da = lax.fori_loop(0, self.pieces, walk, (pull, zero))
        refs["dinitial"].at[batch, own][...] = pull
        refs["da"].at[batch, own][...] = da
        plgpu.wait_smem_to_gmem(0)

    def piece(self, smem, slot, rate, carry):
        """(gradient of the states before a piece, that of a so far), from that of those after."""
        unroll, steps = self.tiles.unroll, self.tiles.tokens // self.tiles.unroll
        before, pull, da = carry

        def forth(j, h):
            for k in range(unroll):
                t = j * unroll + k
                smem["before"].at[t][...] = h
                h = self.step(smem, slot, t, rate, h)
            return h

        after = lax.fori_loop(0, steps, forth, before)

        def back(j, carry):
            for k in range(unroll):
                t = self.tiles.tokens - 1 - (j * unroll + k)
                carry = self.token(smem, slot, t, rate, carry)
            return carry

        _, pull, da = lax.fori_loop(0, steps, back, (after, pull, da))
        return pull, da

    def token(self, smem, slot, t, rate, carry):
        """One token back: carry is states after it, their gradient by what follows, that of a."""
        after, pull, da = carry
        dt, x, dy = (self.row(smem, name, slot, t) for name in ("dt", "x", "dy"))
        b, c = (along(self.column(smem, name, slot, t), self.states, 1) for name in ("b", "c"))
        wide_dy, wide_dt = along(dy, self.states, 0), along(dt, self.states, 0)
        smem["dc"].at[t][...] = jnp.sum(wide_dy * after, axis=0)
        pull = pull + wide_dy * c
        smem["db"].at[t][...] = jnp.sum(pull * along(dt * x, self.states, 0), axis=0)
        entered = jnp.sum(pull * b, axis=1)
        smem["dx"].at[t][...] = (dt * entered).astype(self.dtype)
        before = plgpu.load(smem["before"].at[t], layout=SQUARE)
        pull = self.kept(smem, slot, t, pull * jnp.exp2(rate * wide_dt))
        change = pull * self.kept(smem, slot, t, before)
        smem["ddt"].at[t][...] = x * entered + jnp.sum(change * rate, axis=1) * (1 / LOG2E)
        return before, pull, da + change * wide_dt


def _run(kind, shape, tiles: Tiles, arrays: tuple[dict, dict], *, name: str, interpret: bool):
    """Runs a kernel on what there is of inputs; outputs by name."""
    inputs = {key: x for key, x in arrays[0].items() if x is not None}
    outputs = arrays[1]
    dtype = jnp.dtype(inputs["x"].dtype)
    kernel = kind(shape, tiles, dtype, tuple(inputs), tuple(outputs), interpret)
    return plgpu.kernel(
        kernel.body,
        out_type=tuple(outputs.values()),
        grid=(shape[0], shape[2] // tiles.channels),
        grid_names=("batch", "tile"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=6144
        ),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(*inputs.values())


@lowered_once("tiles", "keep_states", "interpret")
def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    initial: jax.Array,
    keep: jax.Array | None = None,
    *,
    tiles: Tiles = Tiles(),
    keep_states: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, I] in x's dtype and the last states, float32 [B, I, M]; or the states before every
    piece, float32 [B, T / tokens, I, M], and the last.

    Args:
      x: [B, T, I]; I is a multiple of the tile's channels, T of its tokens.
      dt: float32 [B, T, I].
      a: float32 [I, M], negative; M is a multiple of 8.
      b, c: float32 [B, T, M].
      initial: float32 [B, I, M].
      keep: float32 [B, T], 0 where a sequence begins; None where none does.
      keep_states: give states instead of y.
    """
    shape = (*x.shape, a.shape[1])
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    pieces = (shape[0], shape[1] // tiles.tokens, *a.shape)
    kept = {"states": jax.ShapeDtypeStruct(pieces, jnp.float32)}
    outputs = kept if keep_states else {"y": like}
    outputs = outputs | {"final": jax.ShapeDtypeStruct(initial.shape, jnp.float32)}
    inputs = {"x": x, "dt": dt, "b": b, "c": c, "keep": keep, "a": a, "initial": initial}
    name = "selective_scan_states" if keep_states else "selective_scan"
    return _run(Forward, shape, tiles, (inputs, outputs), name=name, interpret=interpret)


@lowered_once("tiles", "interpret")
def backward(
    inputs: tuple[Any, ...],
    states: jax.Array,
    gradients: tuple[jax.Array, jax.Array],
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients of x [B, T, I] in its dtype, and in float32 of dt [B, T, I], of b and c by tiles of
    channels [B, I / channels, T, M], of a by sequences [B, I, M], of the first states [B, I, M].

    Args:
      inputs: x, dt, a, b, c and keep as of `forward`.
      states: of `forward` with the same tiles.
      gradients: of y, in x's dtype, and of the last states in float32.
    """
    x, dt, a, b, c, keep = inputs
    dy, dfinal = gradients
    shape, wide = (*x.shape, a.shape[1]), jnp.float32
    part = jax.ShapeDtypeStruct((shape[0], shape[2] // tiles.channels, *b.shape[1:]), wide)
    matrix = jax.ShapeDtypeStruct(dfinal.shape, wide)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "ddt": jax.ShapeDtypeStruct(x.shape, wide),
        "db": part,
        "dc": part,
        "da": matrix,
        "dinitial": matrix,
    }
    given = {"x": x, "dt": dt, "dy": dy, "b": b, "c": c, "keep": keep, "a": a}
    arrays = (given | {"states": states, "dfinal": dfinal}, outputs)
    return _run(Backward, shape, tiles, arrays, name="selective_scan_back", interpret=interpret)
