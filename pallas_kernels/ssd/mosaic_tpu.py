"""The scan on a TPU (Pallas, Mosaic TPU backend): grids run in order, states stay in memory.

A grid goes over sequences, groups, chunks and heads of a group. The states of a group's heads stay
in scratch memory from chunk to chunk; what heads share (b, c and their gradients) is brought and
written once a chunk. The backward pass goes over the chunks from the last to the first, with the
state before each, which the forward keeps where it is asked to.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.chunks import Chunks, padded

__all__ = ["SIZE", "backward", "forward"]

SIZE = 128  # tokens of a chunk: what a register holds in a row


def _dot(left, right, contract: tuple[int, int]):
    """The product over a dim of each, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _down(row):
    """A row [1, Q] as a column, repeated: [Q, Q]."""
    return jnp.broadcast_to(row, (SIZE, SIZE)).T


def _across(row):
    return jnp.broadcast_to(row, (SIZE, SIZE))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What a chunk's decays are for one head: matrices [i, j] and rows [1, Q]."""

    stats: jax.Array  # [4, Q]
    number: jax.Array  # [1, Q]

    @property
    def step(self):
        return self.stats[3:4]

    @property
    def last(self):
        """What is left at the chunk's end of what a token gave."""
        return self.stats[2:3]

    @property
    def reach(self):
        """What is left of the state before the chunk when a token reads it."""
        return jnp.where(self.number == 0, jnp.exp2(self.stats[:1]), 0.0)

    @property
    def held(self):
        """[1, 1]: what is left of it at the chunk's end."""
        return self.reach[:, SIZE - 1 :]

    def left(self):
        """[i, j]: what is left of token j when token i reads it."""
        sums = self.stats[:1]
        order = [lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), dim) for dim in (0, 1)]
        number = self.number.astype(jnp.float32)
        keep = (order[0] >= order[1]) & (_down(number) == _across(number))
        return jnp.where(keep, jnp.exp2(_down(sums) - _across(sums)), 0.0)

    def rows(self, row, width: int):
        """A row as a column, repeated `width` times: [Q, width]."""
        return _down(row)[:, :width] if width <= SIZE else jnp.broadcast_to(row, (width, SIZE)).T


def _without(factor, x):
    """x times a factor; zeros where that is 0, be x NaN."""
    return jnp.where(factor == 0.0, 0.0, x * factor)


def _forward_body(x, b, c, stats, number, initial, y, final, *rest):
    *before, states = rest
    chunk, head = pl.program_id(2), pl.program_id(3)
    about = _Chunk(stats[...], number[...])
    dtype, width = x.dtype, x.shape[1]

    @pl.when(chunk == 0)
    def _():
        states[head] = initial[...]

    state = states[head]
    narrow = state.astype(dtype)
    for ref in before:
        ref[...] = narrow
    inside = _dot(c[...], b[...], (1, 1)) * about.left() * _across(about.step)
    out = _dot(inside.astype(dtype), x[...], (1, 0))
    past = _dot(c[...], narrow, (1, 0))
    y[...] = (out + _without(about.rows(about.reach, width), past)).astype(dtype)
    ending = about.rows(about.step * about.last, width) * x[...].astype(jnp.float32)
    new = _without(about.held, state) + _dot(b[...], ending.astype(dtype), (0, 0))
    states[head] = new
    final[...] = new


def _backward_body(x, b, c, stats, number, before, dy, dfinal, dx, db, dc, facts, dinitial, states):
    chunk, head = pl.program_id(2), pl.program_id(3)
    about = _Chunk(stats[...], number[...])
    dtype, width = x.dtype, x.shape[1]

    @pl.when(chunk == 0)
    def _():
        states[head] = dfinal[...]

    @pl.when(head == 0)
    def _():
        db[...] = jnp.zeros_like(db)
        dc[...] = jnp.zeros_like(dc)

    after, narrow = states[head], states[head].astype(dtype)
    left = about.left()
    seen = _dot(c[...], b[...], (1, 1))
    rise = _dot(dy[...], x[...], (1, 1)) * left
    share = rise * seen
    reach = about.rows(about.reach, width)
    # Readers: c.
    rise = (rise * _across(about.step)).astype(dtype)
    reaching = (dy[...].astype(jnp.float32) * reach).astype(dtype)
    dc[...] += _dot(rise, b[...], (1, 0)) + _dot(reaching, before[...], (1, 1))
    past = _without(reach, _dot(c[...], before[...], (1, 0))) * dy[...].astype(jnp.float32)
    # Those that are read: b and x.
    step, last = about.rows(about.step, width), about.rows(about.last, width)
    wide = x[...].astype(jnp.float32)
    ending = (wide * (step * last)).astype(dtype)
    db[...] += _dot(rise, c[...], (0, 0)) + _dot(ending, narrow, (1, 1))
    later = _dot(b[...], narrow, (1, 0)) * last
    within = _dot((left * seen).astype(dtype), dy[...], (0, 0))
    dx[...] = ((later + within) * step).astype(dtype)
    overlap = before[...].astype(jnp.float32) * after
    whole = jnp.sum(jnp.sum(overlap, axis=1, keepdims=True), axis=0, keepdims=True)

    def row(columns):
        """Sums of rows [Q, ...] as a row."""
        return _across(jnp.sum(columns, axis=1, keepdims=True)).T[:1]

    facts[0:1] = row(share * _across(about.step)) + row(past)
    facts[1:2] = jnp.broadcast_to(whole * (1.0 / SIZE), (1, SIZE))
    facts[2:3] = jnp.sum(share, axis=0, keepdims=True)
    facts[3:4] = row(wide * later)
    new = _without(about.held, after) + _dot(c[...], reaching, (0, 0))
    states[head] = new
    dinitial[...] = new


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Blocks of arrays that are laid out by head, [B, N, T, ...], and by group."""

    batch: int
    groups: int
    chunks: int
    heads: int  # of a group
    reverse: bool

    def at(self, i):
        return self.chunks - 1 - i if self.reverse else i

    def tokens(self, width: int, *, shared: bool = False):
        """[B, N or K, C Q, width]."""
        return pl.BlockSpec(
            (None, None, SIZE, width),
            lambda s, k, i, n: (s, k if shared else k * self.heads + n, self.at(i), 0),
        )

    def stats(self, count: int):
        """[B, N, count, C Q]."""
        return pl.BlockSpec(
            (None, None, count, SIZE), lambda s, k, i, n: (s, k * self.heads + n, 0, self.at(i))
        )

    def number(self):
        """[B, 1, C Q]."""
        return pl.BlockSpec((None, 1, SIZE), lambda s, k, i, n: (s, 0, self.at(i)))

    def state(self, shape: tuple[int, int], *, first: bool):
        """[B, N, M, H], read at the first of the grid's chunks or written at the last: at others
        the block stays where it was, and nothing is moved."""

        def place(s, k, i, n):
            rest = self.heads - 1 if first else 0
            here = i == (0 if first else self.chunks - 1)
            return s, k * self.heads + jnp.where(here, n, rest), 0, 0

        return pl.BlockSpec((None, None, *shape), place)

    def states(self, shape: tuple[int, int]):
        """[B, N, C, M, H]."""
        return pl.BlockSpec(
            (None, None, None, *shape),
            lambda s, k, i, n: (s, k * self.heads + n, self.at(i), 0, 0),
        )

    def call(self, body, arguments, specs, outputs, *, name: str, state, interpret: bool):
        """Runs a body over (sequence, group, chunk, head)."""
        return pl.pallas_call(
            body,
            grid=(self.batch, self.groups, self.chunks, self.heads),
            in_specs=specs[0],
            out_specs=specs[1],
            out_shape=outputs,
            scratch_shapes=[pltpu.VMEM((self.heads, *state), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
            ),
            name=name,
            interpret=interpret,
        )(*arguments)


def _laid(x, b, c, about: Chunks, *more):
    """Arrays by head or group first, in whole chunks; numbers are zeros where none are."""
    turned = [padded(z, 1, SIZE).transpose(0, 2, 1, 3) for z in (x, b, c, *more)]
    number = about.number
    if number is None:
        number = jnp.zeros((x.shape[0], turned[0].shape[2]), jnp.int32)
    return turned, number[:, None]


def _forward(x, b, c, about: Chunks, initial, *, keep: bool, interpret: bool):
    batch, length, heads, width = x.shape
    groups, state = b.shape[2:]
    (xs, bs, cs), number = _laid(x, b, c, about)
    chunks = xs.shape[2] // SIZE
    grid = _Grid(batch, groups, chunks, heads // groups, reverse=False)
    shape = (state, width)
    if initial is None:
        initial = jnp.zeros((batch, heads, *shape), jnp.float32)
    outputs = [
        jax.ShapeDtypeStruct(xs.shape, x.dtype),
        jax.ShapeDtypeStruct(initial.shape, jnp.float32),
    ]
    out_specs = [grid.tokens(width), grid.state(shape, first=False)]
    if keep:
        outputs.append(jax.ShapeDtypeStruct((batch, heads, chunks, *shape), x.dtype))
        out_specs.append(grid.states(shape))
    shared = grid.tokens(state, shared=True)
    in_specs = [grid.tokens(width), shared, shared, grid.stats(4), grid.number()]
    in_specs.append(grid.state(shape, first=True))
    arguments = (xs, bs, cs, about.stats, number, initial)
    how = {"name": "ssd", "state": shape, "interpret": interpret}
    y, final, *before = grid.call(_forward_body, arguments, (in_specs, out_specs), outputs, **how)
    return y.transpose(0, 2, 1, 3)[:, :length], final, *before


@functools.partial(jax.jit, static_argnames="interpret")
def forward(
    x, b, c, about: Chunks, initial, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As the forward of `mosaic_gpu`, for chunks of SIZE and any number of heads."""
    return _forward(x, b, c, about, initial, keep=False, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def backward(x, b, c, about: Chunks, initial, gradients, *, interpret: bool = False):
    """As the backward of `mosaic_gpu_backward`."""
    batch, length, heads, width = x.shape
    groups, state = b.shape[2:]
    dy, dfinal = gradients
    _, _, before = _forward(x, b, c, about, initial, keep=True, interpret=interpret)
    (xs, bs, cs, dys), number = _laid(x, b, c, about, dy)
    chunks = xs.shape[2] // SIZE
    grid = _Grid(batch, groups, chunks, heads // groups, reverse=True)
    shape = (state, width)
    like = lambda z, dtype: jax.ShapeDtypeStruct(z.shape, dtype)  # noqa: E731
    outputs = [
        like(xs, x.dtype),
        like(bs, jnp.float32),
        like(cs, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, 4, chunks * SIZE), jnp.float32),
        like(dfinal, jnp.float32),
    ]
    tokens, shared = grid.tokens(width), grid.tokens(state, shared=True)
    in_specs = [tokens, shared, shared, grid.stats(4), grid.number(), grid.states(shape)]
    in_specs += [tokens, grid.state(shape, first=True)]
    out_specs = [tokens, shared, shared, grid.stats(4), grid.state(shape, first=False)]
    arguments = (xs, bs, cs, about.stats, number, before, dys, dfinal)
    how = {"name": "ssd_backward", "state": shape, "interpret": interpret}
    dx, db, dc, facts, dinitial = grid.call(
        _backward_body, arguments, (in_specs, out_specs), outputs, **how
    )
    dx, db, dc = (z.transpose(0, 2, 1, 3)[:, :length].astype(x.dtype) for z in (dx, db, dc))
    return dx, db, dc, facts.reshape(batch, heads, 2, 2, -1), dinitial
