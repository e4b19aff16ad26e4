# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The gated norm on Hopper (Pallas, Mosaic GPU backend): each array is read once.

A program is one warpgroup that takes row after row of one group of channels; the next rows come by
TMA meanwhile. All of a row lies in the registers of the warpgroup. In the backward pass the sums
over rows stay in registers until the program ends.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import LOG2E

__all__ = ["BOX", "Tiles", "backward", "forward"]

BOX = 256  # numbers of a dimension that TMA copies at once
_LANES = 128  # of a warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the rows are dealt out; any choice gives the same result up to the order of sums.

    Attributes:
      programs: of each group of channels; a divisor of the rows.
      stages: rows in flight.
    """

    programs: int
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What both passes share; arrays are [rows, groups, W / 256, 256]."""

    shape: tuple[int, int, int, int]
    tiles: Tiles
    eps: float
    before_gate: bool
    interpret: bool

    @property
    def part(self) -> tuple[int, int]:
        """A row of one group."""
        return self.shape[2:]

    @property
    def width(self) -> int:
        return self.part[0] * self.part[1]

    def load(self, ref) -> jax.Array:
        """A row in float32."""
        if self.interpret:
            return ref[...].astype(jnp.float32)
        vector = next(n for n in (8, 4, 2) if self.width % (_LANES * n) == 0)
        layout = plgpu.Layout.WG_STRIDED(self.part, vec_size=vector)
        found = plgpu.load(ref, layout=layout, optimized=False)
        return found.astype(jnp.float32)

    def total(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x.reshape(self.width))

    def gates(self, z):
        """(silu(z), its derivative)."""
        sigmoid = 1.0 / (1.0 + jnp.exp2(z * -LOG2E))
        return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))

    def walk(self, step, arrays, carry=None):
        """step(row, refs of the arrays' row, carry) over the rows of a program."""
        each = self.shape[0] // self.tiles.programs
        start, group = lax.axis_index("program") * each, lax.axis_index("group")

        def one(at, *refs):
            return step(
                start + at[0], [ref.at[0, 0] for ref in refs[: len(arrays)]], *refs[len(arrays) :]
            )

        pipeline = plgpu.emit_pipeline(
            one,
            grid=(each,),
            in_specs=[plgpu.BlockSpec((1, 1, *self.part), lambda k: (start + k, group, 0, 0))]
            * len(arrays),
            max_concurrent_steps=min(self.tiles.stages, each),
            init_carry=carry,
        )
        return pipeline(*arrays)


@dataclasses.dataclass(frozen=True)
class Forward(_Kernel):
    """Gives the result."""

    def body(self, y, x, z, d, scale, out):
        group = lax.axis_index("group")
        d, scale = self.load(d.at[group]), self.load(scale.at[group])

        def step(row, inputs):
            y, x, z = (self.load(ref) for ref in inputs)
            u, (gate, _) = y + d * x, self.gates(z)
            u = u if self.before_gate else u * gate
            r = lax.rsqrt(self.total(u * u) / self.width + self.eps)
            result = u * r * scale
            result = result * gate if self.before_gate else result
            out.at[row, group][...] = result.astype(out.dtype)

        self.walk(step, (y, x, z))


@dataclasses.dataclass(frozen=True)
class Backward(_Kernel):
    """Gives the gradients of y and z, and what each program found of those of d and scale."""

    def body(self, y, x, z, pull, d, scale, to_y, to_z, dd, dscale):
        program, group = lax.axis_index("program"), lax.axis_index("group")

        def parts(inputs, first: jax.Array | int = 0):
            """(x, y with d x, gradient of the result, scale, gate, its slope, u, gradient of n)."""
            part = pl.ds(first, self.part[0])
            y, x, z, pull = (self.load(ref.at[part]) for ref in inputs)
            wide, (gate, slope) = y + self.load(d.at[group]) * x, self.gates(z)
            own = self.load(scale.at[group])
            if self.before_gate:
                return x, wide, pull, own, gate, slope, wide, pull * own * gate
            return x, wide, pull, own, gate, slope, wide * gate, pull * own

        def step(row, inputs, sums):
            *_, u, dn = parts(inputs)
            r = lax.rsqrt(self.total(u * u) / self.width + self.eps)
            c = self.total(dn * u) / self.width * (r * r * r)
            # Once more from shared memory, since all of it does not fit into registers; the place,
            # always 0, depends on a sum lest the compiler find that it has been loaded.
            first = (r < 0).astype(jnp.int32)
            x, wide, pull, own, gate, slope, u, dn = parts(inputs, first)
            du, normed = dn * r - u * c, pull * u * r
            if self.before_gate:
                dy, dz, of_scale = du, normed * own * slope, normed * gate
            else:
                dy, dz, of_scale = du * gate, du * wide * slope, normed
            to_y.at[row, group][...] = dy.astype(y.dtype)
            to_z.at[row, group][...] = dz.astype(z.dtype)
            return sums[0] + dy * x, sums[1] + of_scale

        zeros = jnp.zeros_like(self.load(d.at[group]))
        sums = self.walk(step, (y, x, z, pull), (zeros, zeros))
        dd.at[program, group][...], dscale.at[program, group][...] = sums


def _call(kernel, name, out_type, arguments):
    return plgpu.kernel(
        kernel.body,
        out_type=out_type,
        grid=(kernel.tiles.programs, kernel.shape[1]),
        grid_names=("program", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if kernel.interpret else False,
    )(*arguments)


@lowered_once("tiles", "eps", "before_gate", "interpret")
def forward(y, x, z, d, scale, *, tiles: Tiles, eps: float, before_gate: bool, interpret: bool):
    """[rows, groups, W / 256, 256] from arrays of this shape, and d and scale [groups, ...]."""
    kernel = Forward(y.shape, tiles, eps, before_gate, interpret)
    out_type = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return _call(kernel, "gated_norm", out_type, (y, x, z, d, scale))


@lowered_once("tiles", "eps", "before_gate", "interpret")
def backward(
    arrays, d, scale, *, tiles: Tiles, eps: float, before_gate: bool, interpret: bool
) -> tuple[jax.Array, ...]:
    """Gradients (dy, dz, dd, dscale); `arrays` are y, x, z and the gradient of the result."""
    y, _, z, _ = arrays
    kernel = Backward(y.shape, tiles, eps, before_gate, interpret)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (y, z)]
    part = jax.ShapeDtypeStruct((tiles.programs, *y.shape[1:]), jnp.float32)
    dy, dz, dd, dscale = _call(
        kernel, "gated_norm_backward", (*like, part, part), (*arrays, d, scale)
    )
    return dy, dz, jnp.sum(dd, axis=0), jnp.sum(dscale, axis=0)
