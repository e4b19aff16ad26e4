# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The selective scan's forward on Hopper (Pallas, Mosaic GPU backend): a loop over tokens.

A program is one warpgroup that holds the states of some channels in registers, a row a channel in
the layout of an accumulator, and walks over the tokens of one sequence. Tokens come in pieces by
TMA, the next while one is walked over. Many small programs share a processor.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import COLUMN, LOG2E, ROW, SQUARE, along

__all__ = ["forward"]


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
class Forward:
    """One compiled kernel."""

    shape: tuple[int, int, int, int]  # B, T, I, M
    tiles: Tiles
    dtype: jnp.dtype
    interpret: bool

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.shape[1], self.tiles.tokens)

    def body(self, *refs):
        _, _, _, state = self.shape
        tiles = self.tiles
        piece = (2, tiles.tokens, tiles.channels)
        smem = {
            "x": plgpu.SMEM(piece, self.dtype),
            "dt": plgpu.SMEM(piece, jnp.float32),
            "b": plgpu.SMEM((2, tiles.tokens, state), jnp.float32),
            "c": plgpu.SMEM((2, tiles.tokens, state), jnp.float32),
            "y": plgpu.SMEM((tiles.tokens, tiles.channels), self.dtype),
        }
        full = plgpu.Barrier(num_arrivals=4, num_barriers=2)
        pl.run_scoped(lambda smem, full: self.program(refs, smem, full), smem, full)

    def program(self, refs, smem, full):
        names = ("x", "dt", "b", "c", "a", "initial", "y", "final")
        refs = dict(zip(names, refs, strict=True))
        tiles = self.tiles
        batch = lax.axis_index("batch")
        own = pl.ds(lax.axis_index("tile") * tiles.channels, tiles.channels)
        shape = (tiles.channels, self.shape[3])

        def bring(i):
            slot, tokens = lax.rem(i, 2), pl.ds(i * tiles.tokens, tiles.tokens)
            for name in ("x", "dt"):
                where = refs[name].at[batch, tokens, own]
                plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full.at[slot])
            for name in ("b", "c"):
                where = refs[name].at[batch, tokens]
                plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full.at[slot])

        bring(jnp.int32(0))
        rate = plgpu.load(refs["a"].at[own], layout=SQUARE, optimized=False) * LOG2E
        start = plgpu.load(refs["initial"].at[batch, own], layout=SQUARE, optimized=False)

        def walk(i, h):
            slot = lax.rem(i, 2)

            @pl.when(i + 1 < self.pieces)
            def _():
                bring(i + 1)

            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def some(j, h):
                for k in range(tiles.unroll):
                    h = self.token(smem, slot, j * tiles.unroll + k, rate, h, shape)
                return h

            h = lax.fori_loop(0, tiles.tokens // tiles.unroll, some, h)
            plgpu.commit_smem()
            target = refs["y"].at[batch, pl.ds(i * tiles.tokens, tiles.tokens), own]
            plgpu.copy_smem_to_gmem(smem["y"], target)
            return h

        refs["final"].at[batch, own][...] = lax.fori_loop(0, self.pieces, walk, start)
        plgpu.wait_smem_to_gmem(0)

    def token(self, smem, slot, t, rate, h, shape):
        """The states after a token, whose y is left in shared memory."""
        dt = plgpu.load(smem["dt"].at[slot, t], layout=ROW)
        x = plgpu.load(smem["x"].at[slot, t], layout=ROW).astype(jnp.float32)
        b = plgpu.load(smem["b"].at[slot, t], layout=COLUMN)
        c = plgpu.load(smem["c"].at[slot, t], layout=COLUMN)
        decay = jnp.exp2(rate * along(dt, shape, 0))
        h = decay * h + along(dt * x, shape, 0) * along(b, shape, 1)
        smem["y"].at[t][...] = jnp.sum(h * along(c, shape, 1), axis=1).astype(self.dtype)
        return h


@lowered_once("tiles", "interpret")
def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    initial: jax.Array,
    *,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, I] in x's dtype and the last state, float32 [B, I, M].

    Args:
      x: [B, T, I]; I is a multiple of the tile's channels, T of its tokens.
      dt: float32 [B, T, I].
      a: float32 [I, M], negative; M is a multiple of 8.
      b, c: float32 [B, T, M].
      initial: float32 [B, I, M].
    """
    batch, length, channels = x.shape
    kernel = Forward((batch, length, channels, a.shape[1]), tiles, jnp.dtype(x.dtype), interpret)
    return plgpu.kernel(
        kernel.body,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        ),
        grid=(batch, channels // tiles.channels),
        grid_names=("batch", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="selective_scan",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(x, dt, b, c, a, initial)
