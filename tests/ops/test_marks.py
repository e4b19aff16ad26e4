"""Marked ops: one equation each where marks are wanted, and the same numbers by any way."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.marks import MARK, marked, marking


@marked("scaled")
def scaled(x, y, *, by):
    return x * y.sum() * by


def names(function, *args):
    return [e.primitive for e in jax.make_jaxpr(function)(*args).eqns]


def test_marks_stand_only_where_they_are_wanted():
    x, y = jnp.arange(3.0), jnp.ones(2)
    call = lambda x, y: scaled(x, y, by=2.0)  # noqa: E731
    assert MARK not in names(call, x, y)
    with marking():
        assert names(call, x, y) == [MARK]
        (equation,) = jax.make_jaxpr(call)(x, y).eqns
        assert equation.params["kind"] == "scaled" and dict(equation.params["static"]) == {"by": 2}
    assert MARK not in names(call, x, y)


def test_a_mark_that_nobody_takes_is_its_function():
    """Called, compiled, and over a batch."""
    x, y = jnp.arange(3.0), jnp.ones(2)
    call = lambda x: scaled(x, y, by=2.0)  # noqa: E731
    with marking():
        for way in (call, jax.jit(call)):
            np.testing.assert_array_equal(way(x), 4 * x)
        many = jax.jit(jax.vmap(call))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(many, jnp.stack([4 * x, 8 * x]))
