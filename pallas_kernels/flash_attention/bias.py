"""A bias by function: what it may hold, and its values for a block of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval

from pallas_kernels.errors import ShapeError

__all__ = ["Bias", "check", "dense", "evaluate", "unserved"]

# (query's position, key's position, head) -> what is added to the score. The positions are int32
# arrays of one shape, the head is an int32 scalar, the result is float32 of the positions' shape.
Bias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_INLINED = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
# What both kinds of kernels can do element by element.
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp"),
    *("exp", "exp2", "log", "log2", "logistic", "tanh", "sin", "cos"),
    *("sqrt", "rsqrt", "square", "integer_pow"),
    *("eq", "ne", "ge", "gt", "le", "lt", "and", "or", "xor", "not", "select_n"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical"),
    *("broadcast_in_dim", "convert_element_type"),
}


def _traced(bias: Any, shape: tuple[int, ...]) -> Any:  # a ClosedJaxpr
    at, head = (jax.ShapeDtypeStruct(x, jnp.int32) for x in (shape, ()))
    return jax.make_jaxpr(bias)(at, at, head)


def check(bias: Any) -> None:
    """Checks a function that was given as a bias.

    Raises:
      ShapeError: it is no function that can be hashed, holds arrays, or gives something else than
        float32 of the positions' shape.
    """
    if not callable(bias):
        raise ShapeError(
            "flash_attention: bias must be a function of (query_position, key_position, head), "
            f"not {type(bias).__name__}"
        )
    try:
        hash(bias)
    except TypeError:
        raise ShapeError(
            f"flash_attention: bias must be hashable, {type(bias).__name__} is not: give a "
            "function, or a frozen dataclass with __call__"
        ) from None
    shape = (8, 16)
    found = _traced(bias, shape)
    if held := [x for x in found.consts if jnp.ndim(x) or isinstance(x, Tracer)]:
        kinds = ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in held)
        raise ShapeError(
            f"flash_attention: bias holds arrays or traced values ({kinds}); it may hold plain "
            "numbers only, and compute the rest from positions and head"
        )
    outs = [f"{x.dtype}{list(x.shape)}" for x in found.out_avals]
    if outs != [f"float32{list(shape)}"]:
        raise ShapeError(
            f"flash_attention: bias must give float32{list(shape)} for positions {list(shape)}, "
            f"not {', '.join(outs)}"
        )


def _names(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _INLINED:
            yield from _names(equation.params[_INLINED[name]].jaxpr)
        else:
            yield name


def unserved(bias: Bias | None) -> str | None:
    """Why kernels cannot compute a bias, or None."""
    if bias is None:
        return None
    others = sorted(set(_names(_traced(bias, (8, 16)).jaxpr)) - _ELEMENTWISE)
    return f"its bias may not use {', '.join(others)}" if others else None


def dense(bias: Bias, rows: jax.Array, columns: jax.Array, heads: int) -> jax.Array:
    """The bias of all pairs: float32 [B or 1, N, T, S].

    Args:
      rows: positions of the queries, int32 [B or 1, T, 1].
      columns: of the keys, int32 [1, 1, S].
      heads: N.
    """
    rows, columns = jnp.broadcast_arrays(rows, columns)
    each = jax.vmap(lambda head: bias(rows, columns, head), out_axes=1)
    return each(jnp.arange(heads, dtype=jnp.int32))


def evaluate(bias: Bias, shape: tuple[int, int], inputs: tuple[Callable[[], Any], ...]):
    """The bias of a block inside of a kernel.

    Only what the result needs is computed: layout inference does not end on what nothing uses.

    Args:
      shape: of the block.
      inputs: each gives one argument of the function.
    """
    closed = _traced(bias, shape)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
    given = [make() for make, is_used in zip(inputs, used, strict=True) if is_used]
    return _run(jaxpr, closed.consts, given)[0]


def _sign(x):
    """Mosaic's own for TPUs asks which TPU is at hand."""
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    return jnp.where(x > zero, one, jnp.where(x < zero, -one, zero))


def _not(x):
    """Mosaic for GPUs makes a constant of a boolean's width, which has no register."""
    return x != jnp.ones_like(x) if x.dtype == jnp.bool_ else ~x


def _select(which, *cases):
    """Mosaic for GPUs does not repeat a scalar choice."""
    return jax.lax.select_n(jnp.broadcast_to(which, cases[0].shape), *cases)


_INSTEAD = {"sign": _sign, "not": _not, "select_n": _select}


def _run(jaxpr: Jaxpr, consts, inputs) -> list:
    """The outputs of a jaxpr, calls inside of it opened."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
    for equation in jaxpr.eqns:
        arguments = [read(x) for x in equation.invars]
        name = equation.primitive.name
        if name in _INLINED:
            inner = equation.params[_INLINED[name]]
            outs = _run(inner.jaxpr, inner.consts, arguments)
        elif name in _INSTEAD:
            outs = [_INSTEAD[name](*arguments)]
        else:
            outs = equation.primitive.bind(*arguments, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
        values |= dict(zip(equation.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]
