"""Toy programs of the AOT tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.aot.program import Program

ARGS = ({"w": jax.ShapeDtypeStruct((8, 4), np.float32)}, jax.ShapeDtypeStruct((2, 8), np.float32))


def build() -> Any:
    """params, x -> tanh(x w) in a tree."""
    return lambda params, x: {"y": jnp.tanh(x @ params["w"])}


def program(**changes: Any) -> Program:
    """A small program of a name, arguments and dependence of its own."""
    base = {"name": "toy", "build": build, "args": ARGS, "depends": {"spec": 1}}
    return Program(**(base | changes))


def inputs() -> tuple[Any, np.ndarray]:
    """Arguments and what the program makes of them, in numpy."""
    random = np.random.default_rng(0)
    w, x = (random.standard_normal(s).astype(np.float32) for s in ((8, 4), (2, 8)))
    return ({"w": w}, x), np.tanh(x @ w)


def must_not_build() -> Any:
    """A builder for programs that have to come from the store."""
    raise AssertionError("this program was to be loaded, not built")
