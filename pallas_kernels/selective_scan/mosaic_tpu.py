"""The selective scan on a TPU (Pallas, Mosaic TPU backend): a loop over tokens.

A grid goes over sequences, tiles of channels and pieces of tokens, in order; the states of a tile,
a row a state and a column a channel, stay in scratch memory in float32. What a token has a channel
is a row; what it has a state is a column, of groups of eight. The backward pass goes over the
pieces from the last on, makes the states of each again, then goes back over them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.once import lowered_once

__all__ = ["CHANNELS", "TOKENS", "backward", "forward"]

CHANNELS, TOKENS = 128, 128
"""Of a program at least, whose channels are a multiple; of a piece."""
_GROUP = 8  # tokens of a step: the rows of a register


def _wide(channels: int) -> int:
    return next(n for n in (512, 256, 128) if channels % n == 0)


def _rows(ref, group):
    """What the tokens of a group have a channel: rows [1, I]."""
    block = ref[pl.ds(pl.multiple_of(group * _GROUP, _GROUP), _GROUP), :]
    return [block[k : k + 1] for k in range(_GROUP)]


def _columns(ref, group, width: int):
    """What the tokens of a group have a state: [M, I], repeated."""
    block = ref[group]
    shape = (block.shape[0], width)
    return [jnp.broadcast_to(block[:, k : k + 1], shape) for k in range(_GROUP)]


def _kept(begin, h):
    """States that a token finds; begin: a row, not 0 where a sequence begins."""
    return jnp.where(jnp.broadcast_to(begin, h.shape) != 0.0, 0.0, h)


def _store(ref, group, rows):
    ref[pl.ds(pl.multiple_of(group * _GROUP, _GROUP), _GROUP), :] = jnp.concatenate(rows, axis=0)


def _forward_body(*refs):
    x, dt, b, c, begin, a, initial, y, final, *rest = refs
    *states, held = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        held[...] = initial[...]

    for ref in states:
        ref[...] = held[...]
    rate, width = a[...], x.shape[1]

    def some(j, h):
        rows = zip(_rows(x, j), _rows(dt, j), _rows(begin, j), strict=True)
        columns = zip(_columns(b, j, width), _columns(c, j, width), strict=True)
        found = []
        for (x_t, dt_t, begin_t), (b_t, c_t) in zip(rows, columns, strict=True):
            h = jnp.exp(rate * dt_t) * _kept(begin_t, h) + b_t * (dt_t * x_t)
            found.append(jnp.sum(h * c_t, axis=0, keepdims=True))
        _store(y, j, found)
        return h

    h = lax.fori_loop(0, TOKENS // _GROUP, some, held[...])
    held[...] = h
    final[...] = h


def _backward_body(*refs):
    inputs, (dx, ddt, db, dc, da, dinitial, before, pulled) = refs[:9], refs[9:]
    x, dt, dy, b, c, begin, a, states, dfinal = inputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        pulled[...] = dfinal[...]
        da[...] = jnp.zeros_like(da)

    rate, width = a[...], x.shape[1]

    def forth(j, h):
        rows = zip(_rows(x, j), _rows(dt, j), _rows(begin, j), strict=True)
        for k, ((x_t, dt_t, begin_t), b_t) in enumerate(
            zip(rows, _columns(b, j, width), strict=True)
        ):
            before[j * _GROUP + k] = h
            h = jnp.exp(rate * dt_t) * _kept(begin_t, h) + b_t * (dt_t * x_t)
        return h

    groups = TOKENS // _GROUP
    after = lax.fori_loop(0, groups, forth, states[...])

    def back(i, carry):
        after, pull, total = carry
        j = groups - 1 - i
        rows = list(zip(_rows(x, j), _rows(dt, j), _rows(dy, j), _rows(begin, j), strict=True))
        columns = list(zip(_columns(b, j, width), _columns(c, j, width), strict=True))
        found = []
        for k in reversed(range(_GROUP)):
            (x_t, dt_t, dy_t, begin_t), (b_t, c_t) = rows[k], columns[k]
            dc_t = jnp.sum(dy_t * after, axis=1, keepdims=True)
            pull = pull + dy_t * c_t
            db_t = jnp.sum(pull * (dt_t * x_t), axis=1, keepdims=True)
            entered = jnp.sum(pull * b_t, axis=0, keepdims=True)
            after = before[j * _GROUP + k]
            pull = _kept(begin_t, pull * jnp.exp(rate * dt_t))
            change = pull * _kept(begin_t, after)
            total = total + change * dt_t
            own = x_t * entered + jnp.sum(change * rate, axis=0, keepdims=True)
            found.insert(0, (dt_t * entered, own, db_t, dc_t))
        by_row, by_column = list(zip(*found, strict=True))[:2], list(zip(*found, strict=True))[2:]
        _store(dx, j, by_row[0])
        _store(ddt, j, by_row[1])
        db[j] = jnp.concatenate(by_column[0], axis=1)
        dc[j] = jnp.concatenate(by_column[1], axis=1)
        return after, pull, total

    _, pull, total = lax.fori_loop(0, groups, back, (after, pulled[...], da[...]))
    pulled[...] = pull
    dinitial[...] = pull
    da[...] = total


def _laid(x, dt, b, c, keep, *more):
    """(arrays by channel [B, T, I], arrays by state [B, T / 8, M, 8], begins [B, T, 1]), float32,
    in whole pieces."""
    short = -x.shape[1] % TOKENS

    def pad(z):
        return jnp.pad(z.astype(jnp.float32), ((0, 0), (0, short), (0, 0)))

    def columns(z):
        z = pad(z)
        return z.reshape(z.shape[0], -1, _GROUP, z.shape[2]).swapaxes(2, 3)

    begin = jnp.zeros(x.shape[:2], jnp.float32) if keep is None else 1 - keep
    by_channel = [pad(z) for z in (x, dt, *more)]
    return by_channel, [columns(z) for z in (b, c)], pad(begin[..., None])


def _specs(width: int, state: int, at) -> dict[str, pl.BlockSpec]:
    """Blocks over (sequence, tile, piece) by kind."""
    groups = TOKENS // _GROUP
    return {
        "rows": pl.BlockSpec((None, TOKENS, width), lambda s, n, i: (s, at(i), n)),
        "columns": pl.BlockSpec((None, groups, state, _GROUP), lambda s, n, i: (s, at(i), 0, 0)),
        "parts": pl.BlockSpec(
            (None, None, groups, state, _GROUP), lambda s, n, i: (s, n, at(i), 0, 0)
        ),
        "begin": pl.BlockSpec((None, TOKENS, 1), lambda s, n, i: (s, at(i), 0)),
        "rate": pl.BlockSpec((state, width), lambda s, n, i: (0, n)),
        "matrix": pl.BlockSpec((None, state, width), lambda s, n, i: (s, 0, n)),
        "states": pl.BlockSpec((None, None, state, width), lambda s, n, i: (s, at(i), 0, n)),
    }


def _call(body, grid, specs, outputs, scratch, *, name: str, interpret: bool):
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs[0],
        out_specs=specs[1],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name=name,
        interpret=interpret,
    )


def _forward(x, dt, a, b, c, initial, keep, *, keep_states: bool, interpret: bool):
    by_channel, by_state, begin = _laid(x, dt, b, c, keep)
    (batch, length, channels), state = by_channel[0].shape, a.shape[1]
    width, pieces = _wide(channels), length // TOKENS
    spec = _specs(width, state, lambda i: i)
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs, out_specs = [like(by_channel[0].shape)], [spec["rows"], spec["matrix"]]
    outputs.append(like((batch, state, channels)))
    if keep_states:
        outputs.append(like((batch, pieces, state, channels)))
        out_specs.append(spec["states"])
    names = ("rows", "rows", "columns", "columns", "begin", "rate", "matrix")
    specs = [spec[name] for name in names], out_specs
    grid = (batch, channels // width, pieces)
    how = {"name": "selective_scan", "interpret": interpret}
    run = _call(_forward_body, grid, specs, outputs, [(state, width)], **how)
    return run(*by_channel, *by_state, begin, a.T, initial.swapaxes(1, 2))


@lowered_once("interpret")
def forward(x, dt, a, b, c, initial, keep, *, interpret: bool = False):
    """(y [B, T, I] in x's dtype, the last states float32 [B, I, M]).

    Args:
      x, dt: [B, T, I]; I is a multiple of CHANNELS.
      a: float32 [I, M]; M is a multiple of 8.
      b, c: [B, T, M].
      initial: float32 [B, I, M].
      keep: float32 [B, T], 0 where a sequence begins, or None.
    """
    how = {"keep_states": False, "interpret": interpret}
    y, final = _forward(x, dt, a, b, c, initial, keep, **how)
    return y[:, : x.shape[1]].astype(x.dtype), final.swapaxes(1, 2)


@lowered_once("interpret")
def backward(inputs, gradients, *, interpret: bool = False):
    """Gradients of x, dt, a, b, c and the first states; in float32 but that of x.

    Args:
      inputs: x, dt, a, b, c, initial and keep as of `forward`.
      gradients: of y and of the last states.
    """
    x, dt, a, b, c, _, keep = inputs
    dy, dfinal = gradients
    _, _, states = _forward(*inputs, keep_states=True, interpret=interpret)
    by_channel, by_state, begin = _laid(x, dt, b, c, keep, dy)
    (batch, length, channels), state = by_channel[0].shape, a.shape[1]
    width, pieces = _wide(channels), length // TOKENS
    spec = _specs(width, state, lambda i: pieces - 1 - i)
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    part = like((batch, channels // width, *by_state[0].shape[1:]))
    matrix = like((batch, state, channels))
    outputs = [like(by_channel[0].shape)] * 2 + [part] * 2 + [matrix] * 2
    names = ("rows", "rows", "rows", "columns", "columns", "begin", "rate", "states", "matrix")
    results = ("rows", "rows", "parts", "parts", "matrix", "matrix")
    specs = [spec[name] for name in names], [spec[name] for name in results]
    grid = (batch, channels // width, pieces)
    scratch = [(TOKENS, state, width), (state, width)]
    how = {"name": "selective_scan_back", "interpret": interpret}
    run = _call(_backward_body, grid, specs, outputs, scratch, **how)
    dx, ddt, db, dc, da, dinitial = run(
        *by_channel, *by_state, begin, a.T, states, dfinal.swapaxes(1, 2)
    )

    def tokens(z):
        z = jnp.sum(z, axis=1).swapaxes(2, 3)
        return z.reshape(batch, -1, state)[:, : x.shape[1]]

    dx, ddt = (z[:, : x.shape[1]] for z in (dx, ddt))
    return (
        dx.astype(x.dtype),
        ddt,
        jnp.sum(da, 0).T,
        tokens(db),
        tokens(dc),
        dinitial.swapaxes(1, 2),
    )
