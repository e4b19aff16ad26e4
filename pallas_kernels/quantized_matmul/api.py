"""`quantized_matmul`: checks, the choice of an implementation, and the derivative."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.choice import known
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul.mosaic_gpu import Tiles, run
from pallas_kernels.quantized_matmul.reference import dequantized, reference
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "Plan", "quantized_matmul", "tiles_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "reference")
MOST_ROWS = 64
_TYPES = ("int4", "uint4", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one call."""

    implementation: str
    tiles: Tiles = Tiles()
    interpret: bool = False


def tiles_for(inputs: int, outputs: int, group: int, *, processors: int = 132) -> Tiles:
    """How a product is cut: enough programs for four on every processor, of eight steps or more."""
    width = min(group, 128)
    warpgroups = next(n for n in (4, 2, 1) if outputs % (64 * n) == 0)
    steps, tiles = inputs // width, outputs // 64
    splits = 1
    while tiles * splits < 4 * processors and steps % (2 * splits) == 0 and steps // splits >= 16:
        splits *= 2
    return Tiles(inputs=width, stages=4, splits=splits, warpgroups=warpgroups)


def unfit(
    *, dtype: str, rows: int, kind: str, sizes: tuple[int, int, int], platform: str
) -> str | None:
    """Why the kernel for Hopper cannot serve a kind of call, or None.

    Args:
      dtype: of the activations.
      rows: of them.
      kind: type of the values.
      sizes: outputs, inputs, and inputs of a group.
      platform: of `target`.
    """
    outputs, _, group = sizes
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if kind not in _TYPES:
        return f"it takes {', '.join(_TYPES)}, not {kind}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes activations in bfloat16 and float16, not {dtype}"
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    if outputs % 64 or group % 64 or (group > 128 and group % 128):
        return (
            "it takes outputs that are a multiple of 64 and groups of 64 or of a multiple of 128 "
            f"inputs, not {outputs} outputs and groups of {group}"
        )
    return not_hopper(platform)


def _obstacle(x: jax.Array, values: jax.Array, scale: jax.Array) -> str | None:
    (count, inputs), outputs = x.shape, values.shape[0]
    return unfit(
        dtype=str(x.dtype),
        rows=count,
        kind=str(values.dtype),
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
    implementation: str = "reference",
) -> jax.Array:
    """x times the transpose of packed integers; differentiable with respect to x alone.

    y[m, o] = sum over k of x[m, k] (values[o, k] scale[o, k / group] + offset[o, k / group])

    Args:
      x: [M, K], bfloat16, float16 or float32.
      values: [O, K], int4, uint4 or int8.
      scale: float [O, G], one for each group of K / G inputs; float32 or bfloat16.
      offset: like `scale`, or None.
      implementation: `mosaic_gpu` (Hopper, 1 to 64 rows) or `reference`.

    Returns:
      float32 [M, O].

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: an implementation that cannot serve
        the call, with the reason.
    """
    _check(x, values, scale, offset)
    known("quantized_matmul", implementation, IMPLEMENTATIONS)
    plan = Plan(implementation=implementation)
    if implementation == "mosaic_gpu":
        reason = _obstacle(x, values, scale)
        if reason is not None:
            raise UnsupportedError(
                f"quantized_matmul 'mosaic_gpu': {reason}; use implementation='reference'"
            )
        group = x.shape[1] // scale.shape[1]
        tiles = tiles_for(x.shape[1], values.shape[0], group, processors=processors())
        plan = dataclasses.replace(plan, tiles=tiles, interpret=interpreting())
    return product(x, values, scale, offset, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def product(x, values, scale, offset, plan: Plan) -> jax.Array:
    """The call of a plan."""
    if plan.implementation == "reference":
        return reference(x, values, scale, offset)
    count = x.shape[0]
    y = run(x, values, scale, tiles=plan.tiles, interpret=plan.interpret)
    if offset is None:
        return y
    # An offset adds itself times the sum of its group's inputs: a product as narrow as the scales.
    sums = jnp.sum(x.astype(jnp.float32).reshape(count, scale.shape[1], -1), axis=2)
    highest = jax.lax.Precision.HIGHEST
    return y + jnp.matmul(sums, offset.astype(jnp.float32).T, precision=highest)


def _forward(x, values, scale, offset, plan: Plan):
    return product(x, values, scale, offset, plan), (x[:, :0], values, scale, offset)


def _backward(plan: Plan, kept, dy):
    del plan
    like, values, scale, offset = kept
    w = dequantized(values, scale, offset).astype(like.dtype)
    wide = like.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dx = jnp.matmul(dy.astype(like.dtype), w, precision=precision)
    return dx, None, None, None


product.defvjp(_forward, _backward)
