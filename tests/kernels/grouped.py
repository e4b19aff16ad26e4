"""Cases of the grouped product, drawn inputs, and the rule that a kernel is held to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.derivative import run
from pallas_kernels.grouped_matmul.hopper import Hopper
from pallas_kernels.grouped_matmul.mosaic_gpu import Tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; rows past the groups' end hold NaN, in the cotangent too."""

    rows: int
    sizes: tuple[int, ...]
    inputs: int = 128
    outputs: int = 192
    transpose: bool = False


def case(rows: int, *sizes: int, **more) -> Case:
    return Case(rows=rows, sizes=sizes, **more)


CASES = {
    "aligned": case(256, 128, 128),
    "anywhere": case(300, 70, 0, 5, 130, 95),
    "rows of no group": case(333, 100, 33, 0),
    "no rows at all": case(96, 0, 0, 0),
    "one row each": case(8, 1, 1, 1, 1, 1, 1, 1, 1),
    "one group": case(264, 0, 264, 0, 0),
    "transposed": case(300, 70, 0, 5, 130, 95, transpose=True),
    "odd rows": case(37, 3, 11, 0, 20, inputs=64, outputs=64),
    "ends inside of eight": case(128, 9, 1, 6, 8, 7, 2, 95),
    "first groups empty": case(200, 0, 0, 0, 129, 1, 0),
}
FORMS = {
    "128 x 128": Tiles(columns=128, stages=2),
    "64 x 128, split by columns": Tiles(rows=64, columns=128, split="columns"),
    "pair of rows": Tiles(columns=128, stages=2, pair="rows", band=2),
    "pair of columns": Tiles(columns=128, stages=3, pair="columns", slots=1),
}


def patterns(groups: int = 8) -> list[tuple[int, ...]]:
    """Sizes of every pattern of empty groups: 2 to the power of `groups` of them."""
    shown = (17, 64, 3, 128, 40, 8, 1, 59)
    return [
        tuple(n if bits >> i & 1 else 0 for i, n in enumerate(shown[:groups]))
        for bits in range(2**groups)
    ]


def arguments(one: Case, dtype, seed: int = 0) -> tuple:
    """(lhs, rhs, sizes, cotangent) of a case."""
    random = np.random.default_rng(seed)
    matrix = (one.inputs, one.outputs)[:: -1 if one.transpose else 1]
    shapes = ((one.rows, one.inputs), (len(one.sizes), *matrix), (one.rows, one.outputs))
    lhs, rhs, pull = (random.standard_normal(s).astype(np.float32) for s in shapes)
    lhs[sum(one.sizes) :] = pull[sum(one.sizes) :] = np.nan
    lhs, rhs, pull = (jnp.asarray(x, dtype) for x in (lhs, rhs, pull))
    return lhs, rhs, jnp.asarray(one.sizes, jnp.int32), pull


def by_hand(one: Case, lhs, rhs, pull) -> dict[str, np.ndarray]:
    """Result and gradients, group by group in float64."""
    lhs, rhs, pull = (np.asarray(x, np.float64) for x in (lhs, rhs, pull))
    out, dlhs, drhs = np.zeros(pull.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    start = 0
    for group, size in enumerate(one.sizes):
        own = slice(start, start + size)
        matrix = rhs[group].T if one.transpose else rhs[group]
        out[own], dlhs[own] = lhs[own] @ matrix, pull[own] @ matrix.T
        change = lhs[own].T @ pull[own]
        drhs[group] = change.T if one.transpose else change
        start += size
    return {"out": out, "dlhs": dlhs, "drhs": drhs}


def results(function, lhs, rhs, sizes, pull) -> dict[str, jax.Array]:
    """Result and gradients of function(lhs, rhs, sizes) under a cotangent."""
    out, back = jax.vjp(lambda lhs, rhs: function(lhs, rhs, sizes), lhs, rhs)
    dlhs, drhs = back(pull)
    return {"out": out, "dlhs": dlhs, "drhs": drhs}


def interpreted(one: Case, tiles: Tiles):
    """The Hopper kernels in the interpreter, all of the same tiles."""
    kernel = Hopper(rows=tiles, matrices=tiles, processors=2, interpret=True)
    return lambda lhs, rhs, sizes: run(lhs, rhs, sizes, kernel, one.transpose)


def failures(found: dict, want: dict[str, np.ndarray], dtype) -> dict[str, float]:
    """Results that miss the true ones by more than a rounding to `dtype` and float32 sums allow.

    A product in `dtype` with float32 sums errs by half a unit in the last place of its result:
    twice that is allowed.
    """
    unit = float(jnp.finfo(dtype).eps)
    missed = {}
    for name, true in want.items():
        got = np.asarray(found[name], np.float64)
        assert got.shape == true.shape
        allowed = unit * np.abs(true) + 2e-4
        worst = float(np.max(np.abs(got - true) - allowed, initial=-1.0))
        if not worst <= 0:
            missed[name] = worst
    return missed
