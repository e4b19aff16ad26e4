"""Marks on the ops of a traced function, by which `fused` finds those that one kernel can make."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ["MARK", "marked", "marking"]

MARK = Primitive("mark")
"""An op of arrays as one equation: `kind`, the `function` and its `static` arguments."""

_marking = jax.make_user_context(False)  # part of jit's cache keys: no trace is used for another


def _call(*arrays: Any, kind: str, function: Any, static: Any) -> Any:
    del kind
    return function(*arrays, **dict(static))


MARK.def_impl(_call)


def _batched(arrays: Any, dims: Any, **params: Any) -> Any:
    return jax.vmap(functools.partial(_call, **params), dims)(*arrays), 0


batching.primitive_batchers[MARK] = _batched


@MARK.def_abstract_eval
def _abstract(*arrays: Any, **params: Any) -> Any:
    kinds = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    with _marking(False):
        found = jax.eval_shape(functools.partial(_call, **params), *kinds)
    return ShapedArray(found.shape, found.dtype)


mlir.register_lowering(MARK, mlir.lower_fun(_call, multiple_results=False))


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Ops that are traced inside of the scope leave their marks."""
    with _marking(True):
        yield


def marked(kind: str) -> Callable[..., Any]:
    """A decorator for a function (*arrays, **static) -> array: inside of `marking`, a call is one
    equation of its trace; elsewhere nothing changes."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def run(*arrays: Any, **static: Any) -> Any:
            if not _marking.value:
                return function(*arrays, **static)
            options = tuple(sorted(static.items()))
            return MARK.bind(*arrays, kind=kind, function=function, static=options)

        return run

    return wrap
