"""`scaled_matmul`: checks, and the choice of an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.scaled_matmul.mosaic_gpu import BLOCK, Tiles, run
from pallas_kernels.scaled_matmul.reference import reference
from pallas_kernels.target import not_hopper, target

__all__ = ["BLOCK", "IMPLEMENTATIONS", "explain", "rounded", "scaled_matmul", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "reference")
TOP = 448.0  # the largest float8_e4m3fn
WIDE = 192  # outputs of a program where there are many


def tiles_for(rows: int, outputs: int, out_bytes: int = 2) -> Tiles:
    """How a product of so many rows and outputs is cut, whose results take `out_bytes`."""
    piece = 128 // out_bytes
    if rows <= 2 * BLOCK or outputs < 2048:
        return Tiles(halves=1, piece=piece, buffers=3)
    high, wide = -(-rows // BLOCK), -(-outputs // WIDE)
    shared = "x" if high % 2 and wide % 2 == 0 else "values"
    parts = BLOCK, WIDE - BLOCK
    return Tiles(halves=1, parts=parts, ahead=2, shared=shared, piece=piece, buffers=3)


def unfit(implementation: str, *, rows: int, out_dtype: str, platform: str) -> str | None:
    """Why an implementation cannot serve a kind of call, or None.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      rows: M.
      out_dtype: of the result.
      platform: of `pallas_kernels.target`.
    """
    if implementation == "reference":
        return None
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if out_dtype not in ("bfloat16", "float16", "float32"):
        return f"it gives bfloat16, float16 and float32, not {out_dtype}"
    if rows < 1:
        return "it takes a row or more"
    return not_hopper(platform)


def _check(x, x_scale, values, scale) -> None:
    shapes = f"found {x.shape}, {x_scale.shape}, {values.shape} and {scale.shape}"
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[1]:
        raise ShapeError(f"scaled_matmul takes x [M, K] and values [O, K]; {shapes}")
    (count, inputs), outputs = x.shape, values.shape[0]
    if inputs % BLOCK or outputs % BLOCK or not inputs or not outputs:
        raise ShapeError(
            f"scaled_matmul takes inputs and outputs that are multiples of {BLOCK}; {shapes}"
        )
    wanted = (count, inputs // BLOCK), (outputs // BLOCK, inputs // BLOCK)
    if (x_scale.shape, scale.shape) != wanted:
        raise ShapeError(
            f"scaled_matmul takes x_scale [M, K / {BLOCK}] and scale [O / {BLOCK}, K / {BLOCK}]; "
            f"{shapes}"
        )
    wrong = [a.dtype for a in (x, values) if a.dtype != jnp.float8_e4m3fn]
    wrong += [a.dtype for a in (x_scale, scale) if a.dtype != jnp.float32]
    if wrong:
        raise ShapeError(
            f"scaled_matmul takes float8_e4m3fn with scales in float32, found {wrong[0]}"
        )


def _choose(implementation: str, x, out_dtype) -> Choice:
    def obstacle(name: str) -> str | None:
        kind = {"rows": x.shape[0], "out_dtype": str(jnp.dtype(out_dtype)), "platform": target()}
        return unfit(name, **kind)

    return choose("scaled_matmul", implementation, IMPLEMENTATIONS, obstacle, "'auto'")


def explain(x, *, out_dtype="bfloat16", implementation: str = "auto") -> Choice:
    """Which implementation `scaled_matmul` takes for a call, and why.

    Args:
      x: an array or `jax.ShapeDtypeStruct`.

    Raises:
      UnsupportedError: as `scaled_matmul`.
    """
    return _choose(implementation, x, out_dtype)


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [M, K] in float8_e4m3fn, and its scales [M, K / 128] float32: a token's 128 inputs each."""
    wide = x.astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
    peak = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(peak == 0, 1.0, peak / TOP)
    return (wide / scale[..., None]).astype(jnp.float8_e4m3fn).reshape(x.shape), scale


def scaled_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    out_dtype="bfloat16",
    implementation: str = "auto",
) -> jax.Array:
    """y[m, o] = sum over blocks b of 128 inputs of
    x_scale[m, b] scale[o / 128, b] sum over the block's k of x[m, k] values[o, k].

    Args:
      x: float8_e4m3fn [M, K]; K a multiple of 128.
      x_scale: float32 [M, K / 128].
      values: float8_e4m3fn [O, K]; O a multiple of 128.
      scale: float32 [O / 128, K / 128].
      out_dtype: of the result; sums are kept in float32.
      implementation: `auto`, `mosaic_gpu` (Hopper) or `reference`.

    Returns:
      [M, O] of `out_dtype`. It has no derivative: what calls it knows the unrounded numbers.

    Raises:
      ShapeError: shapes or dtypes that do not fit; UnsupportedError: the implementation, named,
        cannot serve.
    """
    _check(x, x_scale, values, scale)
    chosen = _choose(implementation, x, out_dtype)
    if chosen.name == "reference":
        return reference(x, x_scale, values, scale, out_dtype=out_dtype)
    kind = jnp.dtype(out_dtype)
    tiles = tiles_for(x.shape[0], values.shape[0], kind.itemsize)
    return run(x, x_scale, values, scale, tiles=tiles, out_dtype=str(kind))
