# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Inverses of unit lower triangular matrices on Hopper, by products (Pallas, Mosaic GPU backend).

As `pallas_kernels.triangular.inverse`, blocks on the diagonal double until they are the whole; all
of it stays on a processor. Products take each number as a sum of two narrow ones, of which the
product of the two rests is left out: 16 bits are right in bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.within import SIZE
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import SQUARE, iota, multiply, swizzled

__all__ = ["inverse"]

_SHAPE = (SIZE, SIZE)


@dataclasses.dataclass(frozen=True)
class Inverse:
    """One compiled kernel: a program is one warpgroup and some matrices, one after the other."""

    count: int  # of a program
    dtype: jnp.dtype
    interpret: bool

    def body(self, below, out):
        part = swizzled(_SHAPE, self.dtype)
        names = ("high", "low", "found", "rest", *(("stage",) if self.interpret else ()))
        smem = dict.fromkeys(names, part)
        pl.run_scoped(lambda smem: self.program(below, out, smem), smem)

    def program(self, below, out, smem):
        first = lax.axis_index("program") * self.count

        def one(i, _):
            given = plgpu.load(below.at[first + i], layout=SQUARE, optimized=False)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            found = self.solve(given, smem)
            smem["found"][...] = found.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["found"], out.at[first + i])

        lax.fori_loop(0, self.count, one, None)
        plgpu.wait_smem_to_gmem(0)

    def solve(self, given, smem):
        """The inverse in registers; keeps what products read in shared memory."""
        row, column = iota(_SHAPE, 0), iota(_SHAPE, 1)

        def joined(level: int):
            block = row >> level
            return ((block & 1) == 1) & (block == (column >> level) + 1)

        smem["high"][...], smem["low"][...] = self.split(given)
        one = jnp.where(row == column, 1.0, 0.0)
        found = one - jnp.where(joined(0), given, 0.0)
        for level in range(1, SIZE.bit_length() - 1):
            smem["found"][...], smem["rest"][...] = self.split(found)
            plgpu.commit_smem()
            step = self.product(found, (smem["high"], smem["low"]), smem)
            step = self.product(step, (smem["found"], smem["rest"]), smem)
            found = found - jnp.where(joined(level), step, 0.0)
            plgpu.commit_smem()  # waits for all warps: what products read is written next
        return found

    def split(self, x):
        """A narrow number and what it misses, narrow too."""
        high = x.astype(self.dtype)
        return high, (x - high.astype(jnp.float32)).astype(self.dtype)

    def product(self, left, right, smem):
        """left @ (right[0] + right[1])."""
        high, low = self.split(left)
        stage = smem.get("stage")

        def run(acc):
            multiply(acc, high, right[0], stage)
            multiply(acc, high, right[1], stage)
            multiply(acc, low, right[0], stage)
            return plgpu.wgmma_accumulator_load(acc, wait_n=0)

        return pl.run_scoped(run, plgpu.ACC(_SHAPE, jnp.float32))


@lowered_once("dtype", "interpret")
def _run(below: jax.Array, *, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    flat = below.reshape(-1, *_SHAPE)
    count = next(n for n in (8, 4, 2, 1) if flat.shape[0] % n == 0)
    out = plgpu.kernel(
        Inverse(count, dtype, interpret).body,
        out_type=jax.ShapeDtypeStruct(flat.shape, dtype),
        grid=(flat.shape[0] // count,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="triangular_inverse",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(flat)
    return out.reshape(below.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def inverse(below: jax.Array, dtype: jnp.dtype, interpret: bool) -> jax.Array:
    """(I + below)^-1 in a narrow dtype.

    Args:
      below: float32 [..., 64, 64], zeros on and above the diagonal.
      dtype: bfloat16 or float16, of the result and of products.
      interpret: on a CPU.
    """
    return _run(below, dtype=dtype, interpret=interpret)


@inverse.defjvp
def _inverse_jvp(dtype, interpret: bool, primals, tangents):
    found: Any = inverse(*primals, dtype, interpret)
    left = jnp.matmul(found, tangents[0].astype(dtype), preferred_element_type=jnp.float32)
    both = jnp.matmul(left.astype(dtype), found, preferred_element_type=jnp.float32)
    return found, -both.astype(dtype)
