"""The walks on a TPU (Pallas, Mosaic TPU backend): a grid runs in order, matrices stay in memory.

A grid goes over sequences, heads and chunks; the matrix of a head stays in scratch memory, in
float32, from chunk to chunk. The names are those of `walk`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.within import SIZE, Inside
from pallas_kernels.once import lowered_once

__all__ = ["COLUMNS", "backward", "forward", "states"]

COLUMNS = 64  # the width of values is a multiple of it


def _dot(left, right, contract: tuple[int, int] = (1, 0)):
    """The product over a dim of each, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _left(held, state):
    """What is left of a matrix; zeros where that is nothing, be it NaN. held: [1, M]."""
    rows, width = state.shape
    column = jnp.broadcast_to(held, (max(width, 8), rows)).T[:, :width]
    return jnp.where(column == 0.0, 0.0, state * column)


def _reaching(refs, x):
    """Zeros where the state before the chunk is not what tokens read."""
    if "reach" not in refs:
        return x
    begun = refs["reach"][...].astype(jnp.float32)  # [1, Q]
    column = jnp.broadcast_to(begun, (max(x.shape[1], 8), SIZE)).T[:, : x.shape[1]]
    return jnp.where(column == 0.0, x, 0.0)


def _forward_body(refs):
    state = refs["state"]
    narrow = state[...].astype(refs["given"].dtype)
    u = refs["given"][...]
    if "erased" in refs:
        written = _dot(refs["erased"][...], narrow)
        u = (u.astype(jnp.float32) + _reaching(refs, written)).astype(u.dtype)
    if "seen" in refs:
        past = _reaching(refs, _dot(refs["reads"][...], narrow))
        refs["o"][...] = (past + _dot(refs["seen"][...], u)).astype(u.dtype)
    else:
        refs["states"][...] = narrow
        refs["u"][...] = u
    state[...] = _left(refs["held"][...], state[...]) + _dot(refs["writes"][...], u, (0, 0))


def _backward_body(refs):
    state, do = refs["state"], refs["do"][...]
    narrow = state[...].astype(do.dtype)
    du = _dot(refs["seen"][...], do, (0, 0)) + _dot(refs["writes"][...], narrow)
    du = du.astype(do.dtype)
    refs["after"][...], refs["du"][...] = narrow, du
    new = _left(refs["held"][...], state[...]) + _dot(refs["reads"][...], do, (0, 0))
    if "erased" in refs:
        new = new + _dot(refs["erased"][...], du, (0, 0))
    state[...] = new


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One call over (sequence, head, chunk)."""

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.ShapeDtypeStruct]
    reverse: bool = False

    def spec(self, name: str, shape: tuple[int, ...]):
        """A chunk's block of an array."""
        chunks = self.inputs["held"].shape[2]

        def at(i):
            return chunks - 1 - i if self.reverse else i

        if name == "reach":  # [B, 1, C Q]: whole rows of 64 lanes as [B, C, 1, Q]
            return pl.BlockSpec((None, None, 1, SIZE), lambda s, n, i: (s, at(i), 0, 0))
        if name == "held":  # [B, N, C, 1, M]
            block = (None, None, None, 1, shape[-1])
            return pl.BlockSpec(block, lambda s, n, i: (s, n, at(i), 0, 0))
        if name in ("start", "last"):  # [B, N, M, H]
            return pl.BlockSpec((None, None, *shape[2:]), lambda s, n, i: (s, n, 0, 0))
        if name in ("states", "after"):  # [B, N, C, M, H]
            block = (None, None, None, *shape[3:])
            return pl.BlockSpec(block, lambda s, n, i: (s, n, at(i), 0, 0))
        block = (None, None, SIZE, shape[-1])
        return pl.BlockSpec(block, lambda s, n, i: (s, n, at(i), 0))

    def __call__(self, body, *, name: str, interpret: bool):
        inputs, names = dict(self.inputs), (*self.inputs, *self.outputs, "state")
        batch, heads, chunks, state = inputs["held"].shape
        inputs["held"] = inputs["held"][..., None, :]
        if "reach" in inputs:
            inputs["reach"] = inputs["reach"].reshape(batch, chunks, 1, SIZE)

        def run(*refs):
            refs = dict(zip(names, refs, strict=True))

            @pl.when(pl.program_id(2) == 0)
            def _():
                refs["state"][...] = refs["start"][...]

            body(refs)
            refs["last"][...] = refs["state"][...]

        return pl.pallas_call(
            run,
            grid=(batch, heads, chunks),
            in_specs=[self.spec(key, x.shape) for key, x in inputs.items()],
            out_specs=[self.spec(key, x.shape) for key, x in self.outputs.items()],
            out_shape=list(self.outputs.values()),
            scratch_shapes=[pltpu.VMEM((state, inputs["start"].shape[-1]), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=name,
            interpret=interpret,
        )(*inputs.values())


@lowered_once("interpret")
def forward(inside: Inside, reach, initial, *, interpret: bool = False):
    """As the forward of `mosaic_gpu`."""
    like = inside.kinds()
    inputs = inside.there(reach=reach, start=initial)
    walk = _Walk(inputs, {"o": like["tokens"], "last": like["last"]})
    return walk(_forward_body, name="linear_attention", interpret=interpret)


@lowered_once("interpret")
def states(inside: Inside, reach, initial, *, interpret: bool = False):
    """As that of `mosaic_gpu`."""
    like = inside.kinds()
    inputs = inside.there(reach=reach, start=initial, seen=None, reads=None)
    outputs = {"states": like["states"], "u": like["tokens"], "last": like["last"]}
    walk = _Walk(inputs, outputs)
    return walk(_forward_body, name="linear_attention_states", interpret=interpret)[:2]


@lowered_once("interpret")
def backward(inside: Inside, do, dlast, *, interpret: bool = False):
    """As that of `mosaic_gpu`."""
    like = inside.kinds()
    inputs = inside.there(do=do, given=None, start=dlast)
    outputs = {"du": like["tokens"], "after": like["states"], "last": like["last"]}
    walk = _Walk(inputs, outputs, reverse=True)
    return walk(_backward_body, name="linear_attention_back", interpret=interpret)
