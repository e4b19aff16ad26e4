"""`quantized_matmul`: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.choice import known
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import mosaic_tpu
from pallas_kernels.quantized_matmul.mosaic_gpu import Coding, Tiles, run
from pallas_kernels.quantized_matmul.order import kind_of, natural, stored
from pallas_kernels.quantized_matmul.reference import dequantized, reference
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "Plan", "quantized_matmul", "tiles_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "reference")
MOST_ROWS = 512
_TYPES = ("int4", "uint4", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one call."""

    implementation: str
    tiles: Tiles = Tiles()
    table: tuple[float, ...] = ()
    arranged: bool = False
    out_dtype: str = "float32"
    interpret: bool = False


def tiles_for(
    count: int, inputs: int, outputs: int, *, bits: int = 4, processors: int = 132
) -> Tiles:
    """How a product is cut: one program for every processor, with an equal share of all steps."""
    width = 128 if inputs % 128 == 0 else (64 if inputs % 64 == 0 else 32)
    rows = min(-(-count // 8) * 8, 128)
    row_tiles = -(-count // rows)
    most = 4 if rows <= 64 else 2
    few = inputs // width * (outputs // 256) < 3 * processors
    warpgroups = next(n for n in (4, 2, 1) if outputs % (64 * n) == 0 and n <= (2 if few else most))
    steps = inputs // width
    total = steps * (outputs // (64 * warpgroups))
    each = -(-total * row_tiles // processors)
    held = 64 * warpgroups * width * bits // 8 + rows * width * 2
    room = 220_000 - 64 * warpgroups * rows * 4  # of shared memory, less what results take
    stages = max(2, min(8, room // held))
    return Tiles(inputs=width, stages=stages, steps=each, warpgroups=warpgroups, rows=rows)


def unfit(
    *, dtype: str, rows: int, kind: str, sizes: tuple[int, int, int], platform: str
) -> str | None:
    """Why no kernel for a platform can serve a kind of call, or None.

    Args:
      dtype: of the activations.
      rows: of them.
      kind: type of the values, or `table` for codes of 16 numbers.
      sizes: outputs, inputs, and inputs of a group.
      platform: of `target`.
    """
    outputs, _, group = sizes
    if platform == "tpu":
        return mosaic_tpu.unfit(dtype=dtype, kind=kind, sizes=sizes)
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device or a TPU, this is {platform}"
    if kind not in (*_TYPES, "table"):
        return f"it takes {', '.join(_TYPES)} and tables of 16 numbers, not {kind}"
    narrow = ("bfloat16", "float16") if kind in ("int4", "int8") else ("bfloat16",)
    if dtype not in narrow:
        return f"it takes activations in {' and '.join(narrow)} for {kind}, not {dtype}"
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    if outputs % 64 or (group not in (32, 64) and group % 128):
        return (
            "it takes outputs that are a multiple of 64 and groups of 32, 64 or of a multiple of "
            f"128 inputs, not {outputs} outputs and groups of {group}"
        )
    return not_hopper(platform)


def _obstacle(x: jax.Array, values: jax.Array, scale: jax.Array, table: tuple) -> str | None:
    if target() not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {target()}"
    (count, inputs), outputs = x.shape, values.shape[0]
    return unfit(
        dtype=str(x.dtype),
        rows=count,
        kind="table" if table else str(values.dtype),
        sizes=(outputs, inputs, inputs // scale.shape[1]),
        platform=target(),
    )


def _tpu_obstacle(x, values, scale, plan: Plan, offset) -> str | None:
    platform = target()
    if platform not in ("tpu", "interpreter"):
        return f"it needs a TPU, this is {platform}"
    if plan.arranged or offset is not None:
        return "it takes values in their natural order, without offsets"
    kind = "table" if plan.table else str(values.dtype)
    sizes = (values.shape[0], x.shape[1], x.shape[1] // scale.shape[1])
    return mosaic_tpu.unfit(dtype=str(x.dtype), kind=kind, sizes=sizes)


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
      implementation: `mosaic_gpu` (Hopper, 1 to 512 rows), `mosaic_tpu` (int4 and int8 in groups
        of a multiple of 128) or `reference`.
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
    if implementation == "mosaic_tpu":
        reason = _tpu_obstacle(x, values, scale, plan, offset)
        if reason is not None:
            raise UnsupportedError(
                f"quantized_matmul 'mosaic_tpu': {reason}; use implementation='reference'"
            )
        plan = dataclasses.replace(plan, interpret=interpreting())
    if implementation == "mosaic_gpu":
        reason = _obstacle(x, values, scale, table)
        if arranged and x.dtype != jnp.bfloat16:
            reason = f"it takes arranged values with x in bfloat16, not {x.dtype}"
        if reason is not None:
            raise UnsupportedError(
                f"quantized_matmul 'mosaic_gpu': {reason}; use implementation='reference'"
            )
        bits = 4 if "int4" in str(values.dtype) else 8
        count, inputs = x.shape
        tiles = tiles_for(count, inputs, len(values), bits=bits, processors=processors())
        plan = dataclasses.replace(plan, tiles=tiles, interpret=interpreting())
    return product(x, values, scale, offset, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def product(x, values, scale, offset, plan: Plan) -> jax.Array:
    """The call of a plan."""
    kind = kind_of(values.dtype, plan.table)
    if plan.implementation == "reference":
        x = stored(x, kind) if plan.arranged else x
        return reference(x, values, scale, offset, plan.table).astype(plan.out_dtype)
    tiles, interpret = plan.tiles, plan.interpret
    if plan.implementation == "mosaic_tpu":
        return mosaic_tpu.run(x, values, scale, out_dtype=plan.out_dtype, interpret=interpret)
    kind = kind if x.dtype == jnp.bfloat16 else ""
    coding = Coding(kind=kind, table=plan.table, arranged=plan.arranged)
    if offset is None:
        options = {"tiles": tiles, "coding": coding, "interpret": interpret}
        return run(x, values, scale, out_dtype=plan.out_dtype, **options)
    y = run(x, values, scale, tiles=tiles, coding=coding, interpret=interpret)
    # An offset adds itself times the sum of its group's inputs: a product as narrow as the scales.
    sums = jnp.sum(x.astype(jnp.float32).reshape(x.shape[0], scale.shape[1], -1), axis=2)
    highest = jax.lax.Precision.HIGHEST
    more = jnp.matmul(sums, offset.astype(jnp.float32).T, precision=highest)
    return (y + more).astype(plan.out_dtype)


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
