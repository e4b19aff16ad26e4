"""`quantized_matmul`: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import known
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import mosaic_tpu, streamed
from pallas_kernels.quantized_matmul.mosaic_gpu import Tiles, run
from pallas_kernels.quantized_matmul.order import kind_of, natural, stored
from pallas_kernels.quantized_matmul.reference import dequantized, reference
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "Plan", "quantized_matmul", "tiles_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_gpu_streamed", "mosaic_tpu", "reference")
MOST_ROWS = 64
_TYPES = ("int4", "uint4", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one call."""

    implementation: str
    tiles: Tiles | streamed.Tiles | None = None
    table: tuple[float, ...] = ()
    arranged: bool = False
    out_dtype: str = "float32"
    interpret: bool = False


def tiles_for(inputs: int, outputs: int, group: int, *, processors: int = 132) -> Tiles:
    """How a product is cut: enough programs for four on every processor, of eight steps or more."""
    width = min(group, 128)
    steps, tiles = inputs // width, outputs // 64
    splits = 1
    while tiles * splits < 4 * processors and steps % (2 * splits) == 0 and steps // splits >= 16:
        splits *= 2
    return Tiles(inputs=width, stages=6, splits=splits)


def unfit(
    implementation: str,
    *,
    dtype: str,
    rows: int,
    kind: str,
    sizes: tuple[int, int, int],
    platform: str,
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      dtype: of the activations.
      rows: of them.
      kind: type of the values, or `table` for codes of 16 numbers.
      sizes: outputs, inputs, and inputs of a group.
      platform: of `target`.
    """
    if implementation == "reference":
        return None
    wanted = "tpu" if implementation == "mosaic_tpu" else "gpu"
    if platform not in (wanted, "interpreter"):
        return f"it needs a {'TPU' if wanted == 'tpu' else 'CUDA device'}, this is {platform}"
    if implementation == "mosaic_tpu":
        return mosaic_tpu.unfit(dtype=dtype, kind=kind, sizes=sizes)
    if implementation == "mosaic_gpu_streamed":
        found = streamed.unfit(dtype=dtype, rows=rows, kind=kind, sizes=sizes)
    else:
        found = _unfit_for_hopper(dtype, rows, kind, sizes)
    return found or not_hopper(platform)


def _unfit_for_hopper(dtype: str, rows: int, kind: str, sizes: tuple[int, int, int]) -> str | None:
    outputs, _, group = sizes
    if kind not in ("int4", "uint4", "int8"):
        return f"it takes int4, uint4, int8, not {kind}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes activations in bfloat16 and float16, not {dtype}"
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    if outputs % 64 or group % 64 or (group > 128 and group % 128):
        return (
            "it takes outputs that are a multiple of 64 and groups of 64 or of a multiple of 128 "
            f"inputs, not {outputs} outputs and groups of {group}"
        )
    return None


def _obstacle(x, values, scale, offset, plan: Plan) -> str | None:
    name = plan.implementation
    if plan.arranged and name not in ("mosaic_gpu_streamed", "reference"):
        return "it takes values in their natural order"
    if offset is not None and name == "mosaic_tpu":
        return "it takes no offsets"
    (count, inputs), outputs = x.shape, values.shape[0]
    return unfit(
        name,
        dtype=str(x.dtype),
        rows=count,
        kind="table" if plan.table else str(values.dtype),
        sizes=(outputs, inputs, inputs // scale.shape[1]),
        platform=target(),
    )


def _check(x: jax.Array, values: jax.Array, scale: jax.Array, offset: jax.Array | None) -> None:
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[1]:
        raise ShapeError(
            f"quantized_matmul takes x [M, K] and values [O, K], found {x.shape} and {values.shape}"
        )
    if str(values.dtype) not in _TYPES:
        raise UnsupportedError(
            f"quantized_matmul takes values in {', '.join(_TYPES)}, not {values.dtype}; "
            "dequantize others"
        )
    groups = scale.shape[1] if scale.ndim == 2 else 0
    fits = groups > 0 and scale.shape == (values.shape[0], groups) and x.shape[1] % groups == 0
    if not fits or (offset is not None and offset.shape != scale.shape):
        raise ShapeError(
            f"scales are [O, groups] with groups that divide K = {x.shape[1]}, and offsets like "
            f"them; found {scale.shape}" + ("" if offset is None else f" and {offset.shape}")
        )


def quantized_matmul(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    table: tuple[float, ...] = (),
    arranged: bool = False,
    implementation: str = "reference",
    out_dtype: str = "float32",
) -> jax.Array:
    """x times the transpose of packed numbers; differentiable with respect to x alone.

    y[m, o] = sum over k of x[m, k] (n(values[o, k]) scale[o, k / group] + offset[o, k / group])

    where n is the number itself, or what `table` has for it.

    Args:
      x: [M, K], bfloat16, float16 or float32.
      values: [O, K], int4, uint4, int8 or float8_e4m3fn.
      scale: float [O, G], one for each group of K / G inputs: float32, bfloat16, float16 or
        float8_e8m0fnu.
      offset: like `scale`, or None.
      table: 16 numbers that values in uint4 are codes of (NF4, E2M1); none for plain numbers.
      arranged: the inputs of values are in the order of `order.stored`, which spares the kernel
        for Hopper to bring x into an order of its own.
      implementation: `mosaic_gpu` (Hopper: integers, 1 to 64 rows), `mosaic_gpu_streamed` (Hopper:
        all of these, 1 to 4096 rows), `mosaic_tpu` (int4 and int8 in groups of a multiple of 128)
        or `reference`.
      out_dtype: of the result; sums are kept in float32.

    Returns:
      [M, O].

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: an implementation that cannot serve
        the call, with the reason.
    """
    _check(x, values, scale, offset)
    if table and (len(table) != 16 or values.dtype != jnp.uint4):
        raise ShapeError(
            f"a table has 16 numbers for values in uint4, found {len(table)} for {values.dtype}"
        )
    known("quantized_matmul", implementation, IMPLEMENTATIONS)
    plan = Plan(implementation=implementation, table=table, arranged=arranged, out_dtype=out_dtype)
    reason = _obstacle(x, values, scale, offset, plan)
    if reason is not None:
        raise UnsupportedError(
            f"quantized_matmul {implementation!r}: {reason}; use implementation='reference'"
        )
    plan = dataclasses.replace(plan, tiles=_tiles(x, values, scale, plan), interpret=interpreting())
    return product(x, values, scale, offset, plan)


def _tiles(x, values, scale, plan: Plan) -> Tiles | streamed.Tiles | None:
    (count, inputs), (outputs, groups) = x.shape, scale.shape
    if plan.implementation == "mosaic_gpu":
        return tiles_for(inputs, outputs, inputs // groups, processors=processors())
    if plan.implementation == "mosaic_gpu_streamed":
        kind = kind_of(values.dtype, plan.table)
        where = {"group": inputs // groups, "processors": processors()}
        return streamed.tiles_for(count, inputs, outputs, kind=kind, **where)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def product(x, values, scale, offset, plan: Plan) -> jax.Array:
    """The call of a plan."""
    kind = kind_of(values.dtype, plan.table)
    if plan.implementation == "reference":
        x = stored(x, kind) if plan.arranged else x
        return reference(x, values, scale, offset, plan.table).astype(plan.out_dtype)
    options: dict[str, Any] = {"interpret": plan.interpret}
    if plan.implementation == "mosaic_tpu":
        return mosaic_tpu.run(x, values, scale, out_dtype=plan.out_dtype, **options)
    if plan.implementation == "mosaic_gpu":
        padded = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))
        y = run(padded, values, scale, offset, tiles=plan.tiles, **options)[: x.shape[0]]
        return y.astype(plan.out_dtype)
    coding = streamed.Coding(kind=kind, table=plan.table, arranged=plan.arranged)
    options |= {"tiles": plan.tiles, "coding": coding}
    return streamed.run(x, values, scale, offset, out_dtype=plan.out_dtype, **options)


def _forward(x, values, scale, offset, plan: Plan):
    return product(x, values, scale, offset, plan), (x[:, :0], values, scale, offset)


def _backward(plan: Plan, kept, dy):
    like, values, scale, offset = kept
    w = dequantized(values, scale, offset, plan.table).astype(like.dtype)
    wide = like.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dx = jnp.matmul(dy.astype(like.dtype), w, precision=precision)
    if plan.arranged:
        dx = natural(dx, kind_of(values.dtype, plan.table))
    return dx, None, None, None


product.defvjp(_forward, _backward)
