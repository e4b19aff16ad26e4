"""The Mosaic GPU kernels as one differentiable function that composes with jax's transforms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from pallas_kernels.grouped_matmul.mosaic_gpu import Tiles, outer, product
from pallas_kernels.grouped_matmul.tables import UNIT, group_bounds, row_tiles
from pallas_kernels.grouped_matmul.tiles import group_tiles_for, row_tiles_for
from pallas_kernels.target import interpreting, target

__all__ = ["Plan", "grouped", "obstacle", "run", "unfit"]


def unfit(*, dtype: str, sides: tuple[int, int], platform: str) -> str | None:
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if any(side % 64 for side in sides):
        return f"it takes matrices whose sides are multiples of 64, not {sides}"
    if platform == jax.default_backend():
        found = getattr(jax.devices()[0], "compute_capability", "unknown")
        if found != "9.0":
            return f"it needs compute capability 9.0 (Hopper), this device has {found}"
    return None


def obstacle(lhs, rhs) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if 0 in (*lhs.shape, *rhs.shape):
        return "it takes no empty arrays"
    return unfit(dtype=str(lhs.dtype), sides=rhs.shape[1:], platform=target())


def _processors() -> int:
    """Multiprocessors of the device, or of an H100 where there is none."""
    if jax.default_backend() == "gpu":
        return getattr(jax.devices()[0], "core_count", 132)
    return 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of one run: hashable. Tiles of the product, of its gradients."""

    transpose: bool
    forward: Tiles
    inputs: Tiles
    matrices: Tiles
    processors: int = 132
    interpret: bool = False

    @property
    def where(self) -> dict:
        return {"processors": self.processors, "interpret": self.interpret}


def _padded(x: jax.Array) -> jax.Array:
    """Rows up to a whole number of units."""
    short = -x.shape[0] % UNIT
    return jnp.pad(x, ((0, short), (0, 0))) if short else x


def _product(x, matrices, sizes, plan: Plan, *, transpose: bool, tiles: Tiles) -> jax.Array:
    """A product as an operation that may be vmapped."""

    @sequential_vmap
    def call(x, matrices, sizes):
        rows = x.shape[0]
        x = _padded(x)
        bounds = group_bounds(sizes, rows)
        tables = row_tiles(bounds, x.shape[0], tile=tiles.span[0], band=tiles.band)
        out = product(x, matrices, tables, transpose=transpose, tiles=tiles, **plan.where)
        return out[:rows]

    return call(x, matrices, sizes)


def _outer(left, right, sizes, plan: Plan) -> jax.Array:
    @sequential_vmap
    def call(left, right, sizes):
        bounds = group_bounds(sizes, left.shape[0])
        left, right = _padded(left), _padded(right)
        return outer(left, right, bounds, tiles=plan.matrices, **plan.where)

    return call(left, right, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def run(lhs, rhs, sizes, plan: Plan) -> jax.Array:
    """The product by a plan; differentiable."""
    return _forward(lhs, rhs, sizes, plan)[0]


def _forward(lhs, rhs, sizes, plan: Plan):
    out = _product(lhs, rhs, sizes, plan, transpose=plan.transpose, tiles=plan.forward)
    return out, (lhs, rhs, sizes)


def _backward(plan: Plan, residuals, dout):
    lhs, rhs, sizes = residuals
    dlhs = _product(dout, rhs, sizes, plan, transpose=not plan.transpose, tiles=plan.inputs)
    both = (dout, lhs) if plan.transpose else (lhs, dout)
    drhs = _outer(*both, sizes, plan)
    return dlhs, drhs, np.zeros(sizes.shape, jax.dtypes.float0)


run.defvjp(_forward, _backward)


def grouped(lhs, rhs, sizes, *, transpose_rhs: bool = False) -> jax.Array:
    """As `reference`."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    plan = Plan(
        transpose=transpose_rhs,
        forward=row_tiles_for(rows, groups),
        inputs=row_tiles_for(rows, groups),
        matrices=group_tiles_for(rhs.shape[2]),
        processors=2 if interpreting() else _processors(),
        interpret=interpreting(),
    )
    return run(lhs, rhs, sizes, plan)
