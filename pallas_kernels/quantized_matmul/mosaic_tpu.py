"""x times packed integers on a TPU (Pallas, Mosaic TPU backend).

A step brings a block of codes into vector memory, widens it there and multiplies group by group:
what goes through the memory of the device are the packed codes. As on Hopper the sums of a group
are scaled, not the values; outputs lie along lanes, so scales come as [groups, outputs].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.once import lowered_once

__all__ = ["run", "unfit"]

LANES = 128
_TYPES = ("int4", "int8")
_ROWS = 256  # of x at a time, at most
_INPUTS = 2048  # of a step, at most


def unfit(*, dtype: str, kind: str, sizes: tuple[int, int, int]) -> str | None:
    """Why this kernel cannot serve a kind of call, or None; see `unfit` of the package."""
    outputs, _, group = sizes
    if kind not in _TYPES:
        return f"it takes {' and '.join(_TYPES)}, not {kind}"
    if dtype != "bfloat16":
        return f"it takes activations in bfloat16, not {dtype}"
    if outputs % LANES or group % LANES:
        return (
            f"it takes outputs and groups that are multiples of {LANES}, not {outputs} outputs "
            f"and groups of {group}"
        )
    return None


def _groups_of_a_step(groups: int, group: int) -> int:
    """All of them, or a multiple of eight that divides them: what a block of scales may have."""
    fitting = [n for n in range(8, groups, 8) if groups % n == 0 and n * group <= _INPUTS]
    return max(fitting, default=groups)


def _body(x, values, scale, out, total, *, group: int):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    for g in range(scale.shape[0]):
        part = pl.ds(g * group, group)
        w = values[:, part].astype(jnp.float32).astype(x.dtype)
        contract = (((1,), (1,)), ((), ()))
        sums = lax.dot_general(x[:, part], w, contract, preferred_element_type=jnp.float32)
        total[...] += sums * scale[pl.ds(g, 1), :]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


@lowered_once("out_dtype", "interpret")
def run(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """[M, O] of x [M, K] times values [O, K] under scales [O, G]; see `unfit`."""
    (count, inputs), (outputs, groups) = x.shape, scale.shape
    group = inputs // groups
    rows = min(-(-count // 16) * 16, _ROWS)
    padded = -(-count // rows) * rows
    x = jnp.pad(x, ((0, padded - count), (0, 0)))
    at_once = _groups_of_a_step(groups, group)
    wide = next(n for n in (512, 256, 128) if outputs % n == 0)
    width = at_once * group
    y = pl.pallas_call(
        functools.partial(_body, group=group),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), out_dtype),
        grid=(padded // rows, outputs // wide, inputs // width),
        in_specs=[
            pl.BlockSpec((rows, width), lambda i, j, k: (i, k)),
            pl.BlockSpec((wide, width), lambda i, j, k: (j, k)),
            pl.BlockSpec((at_once, wide), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((rows, wide), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, wide), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="quantized_matmul",
        interpret=interpret,
    )(x, values, scale.astype(jnp.float32).T)
    return y[:count]
