"""The grouped product on the CPU: reference, arguments, tables; its kernels interpreted,
lowered for a GPU and compiled for TPUs."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.grouped_matmul import explain, grouped_matmul
from pallas_kernels.grouped_matmul.derivative import run
from pallas_kernels.grouped_matmul.hopper import Hopper
from pallas_kernels.grouped_matmul.mosaic_tpu import Tpu
from pallas_kernels.grouped_matmul.shapes import CASES as TIMED
from pallas_kernels.grouped_matmul.tables import GROUP, ROW, START, STOP, group_bounds, row_tiles
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES
from tests.kernels.grouped import (
    CASES,
    FORMS,
    arguments,
    by_hand,
    case,
    failures,
    interpreted,
    patterns,
    results,
)


def named(implementation: str, transpose: bool = False):
    """The product by name, for its own platform."""
    platform = "gpu" if implementation == "mosaic_gpu" else "cpu"
    how = {"transpose_rhs": transpose, "implementation": implementation}

    def run(lhs, rhs, sizes):
        with targeting(platform):
            return grouped_matmul(lhs, rhs, sizes, **how)

    return run


@pytest.mark.parametrize("name", CASES)
def test_reference_is_what_the_words_say(name: str) -> None:
    one = CASES[name]
    lhs, rhs, sizes, pull = arguments(one, jnp.float32)
    found = results(named("reference", one.transpose), lhs, rhs, sizes, pull)
    assert failures(found, by_hand(one, lhs, rhs, pull), jnp.float32) == {}


@pytest.mark.parametrize("tile", [64, 128, 256])
def test_tiles_cover_every_row_once_in_any_pattern_of_groups(tile: int) -> None:
    rows, band = 328, 2
    tables = jax.jit(
        jax.vmap(lambda sizes: row_tiles(group_bounds(sizes, rows), rows, tile=tile, band=band))
    )(jnp.asarray(patterns(), jnp.int32))
    table_of, count_of = np.asarray(tables.table), np.asarray(tables.count)
    for sizes, table, (count,) in zip(patterns(), table_of, count_of, strict=True):
        seen = np.full(rows, -1)
        for group, row, start, stop in table[[GROUP, ROW, START, STOP], :count].T:
            assert row % 8 == 0
            own = slice(max(row, start), min(row + tile, stop))
            assert own.start < own.stop
            assert (seen[own] == -1).all()
            seen[own] = group
        want = np.append(np.repeat(np.arange(8), sizes), np.full(rows - sum(sizes), 8))
        np.testing.assert_array_equal(seen, want)


def test_bands_are_walked_once() -> None:
    sizes = jnp.asarray([700, 0, 64, 129], jnp.int32)
    tables = row_tiles(group_bounds(sizes, 1000), 1000, tile=64, band=3)
    first, height = np.asarray(tables.table)[4:]
    walked = []
    for index in range(2 * int(tables.count[0])):
        some = index // 2
        within = index - first[some] * 2
        walked.append((first[some] + within % height[some], within // height[some]))
    assert sorted(walked) == [(i, j) for i in range(int(tables.count[0])) for j in range(2)]


def test_sizes_on_the_device_may_be_wrong() -> None:
    lhs, rhs, *_ = arguments(case(40, 10, 10, 10), jnp.float32)
    lhs = jnp.nan_to_num(lhs)
    run = jax.jit(named("reference"))
    np.testing.assert_array_equal(
        run(lhs, rhs, jnp.asarray([-3, 10, 10])), run(lhs, rhs, jnp.asarray([0, 10, 10]))
    )
    np.testing.assert_array_equal(
        run(lhs, rhs, jnp.asarray([10, 90, 7])), run(lhs, rhs, jnp.asarray([10, 30, 0]))
    )


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def interpret(one, tiles) -> dict:
    lhs, rhs, sizes, pull = arguments(one, jnp.bfloat16)
    found = results(interpreted(one, tiles), lhs, rhs, sizes, pull)
    return failures(found, by_hand(one, lhs, rhs, pull), jnp.bfloat16)


@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("form", ["pair of rows"])
def test_kernels_in_the_interpreter(form: str) -> None:
    one = case(72, 17, 0, 40, inputs=64, outputs=64)
    assert interpret(one, FORMS[form]) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_form_of_the_kernels_in_the_interpreter(name: str, form: str) -> None:
    assert interpret(CASES[name], FORMS[form]) == {}


@pytest.mark.parametrize("name", ["anywhere", pytest.param("transposed", marks=pytest.mark.slow)])
def test_tpu_kernels_in_the_interpreter(name: str) -> None:
    one = dataclasses.replace(CASES[name], outputs=256)
    kernel = Tpu(most=128, interpret=True)
    lhs, rhs, sizes, pull = arguments(one, jnp.bfloat16)
    found = results(lambda *a: run(*a, kernel, one.transpose), lhs, rhs, sizes, pull)
    assert failures(found, by_hand(one, lhs, rhs, pull), jnp.bfloat16) == {}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_every_timed_case_compiles_for_a_tpu(topology: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_grouped_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 kernels") == len(TIMED) - 1  # sides of 2880 are no multiple of 128


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


LOWERED = [
    pytest.param(name, marks=() if "64 experts" in name else pytest.mark.slow) for name in TIMED
]


@pytest.mark.parametrize("name", LOWERED)
def test_forward_and_gradient_lower_for_cuda(name: str) -> None:
    one = TIMED[name]
    lhs = jax.ShapeDtypeStruct((one.rows, one.inputs), jnp.bfloat16)
    rhs = jax.ShapeDtypeStruct((one.groups, one.inputs, one.outputs), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((one.groups,), jnp.int32)

    def loss(lhs, rhs, sizes):
        return jnp.sum(named("mosaic_gpu")(lhs, rhs, sizes).astype(jnp.float32))

    assert lowered(jax.grad(loss, argnums=(0, 1)), lhs, rhs, sizes).count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", [False, True])
def test_every_form_lowers_for_cuda(form: str, transpose: bool) -> None:
    one, tiles = case(200, 100, 0, 33, transpose=transpose), FORMS[form]
    kernel = Hopper(rows=tiles, matrices=tiles)

    def both(lhs, rhs, sizes, pull):
        return results(lambda *a: run(*a, kernel, transpose), lhs, rhs, sizes, pull)

    assert lowered(both, *arguments(one, jnp.float16)).count("mosaic_gpu_v2") == 3


def test_transforms_keep_the_shapes() -> None:
    lhs, rhs, sizes, _ = arguments(case(64, 10, 20), jnp.bfloat16)
    many = tuple(jnp.stack([x, x]) for x in (lhs, rhs, sizes))

    def loss(lhs, rhs, sizes):
        return jnp.sum(named("mosaic_gpu")(lhs, rhs, sizes).astype(jnp.float32))

    step = jax.vmap(jax.checkpoint(jax.grad(loss, argnums=(0, 1))))
    assert [x.shape for x in jax.eval_shape(step, *many)] == [x.shape for x in many[:2]]


def test_a_mesh_lowers_for_cuda() -> None:
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        named("mosaic_gpu"),
        mesh=mesh,
        in_specs=(spec("expert"), spec("expert"), spec("expert")),
        out_specs=spec("expert"),
        check_vma=False,
    )
    lhs, rhs, sizes, _ = arguments(case(128, 10, 20), jnp.bfloat16)

    def loss(lhs, rhs, sizes):
        return jnp.sum(run(lhs, rhs, sizes).astype(jnp.float32))

    text = lowered(jax.grad(loss, argnums=(0, 1)), lhs, rhs, sizes)
    assert text.count("mosaic_gpu_v2") == 2


def test_an_export_for_cuda_holds_the_kernel() -> None:
    lhs, rhs, sizes, _ = arguments(case(64, 10, 20), jnp.bfloat16)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    made = jax.export.export(
        jax.jit(named("mosaic_gpu")), platforms=["cuda"], disabled_checks=checks
    )(lhs, rhs, sizes)
    assert "mosaic_gpu_v2" in made.mlir_module()


def test_sizes_that_can_be_seen_are_checked_inside_of_jit() -> None:
    lhs, rhs, sizes, _ = arguments(case(64, 10, 20), jnp.bfloat16)
    plain = grouped_matmul(lhs, rhs, sizes)
    within = jax.jit(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes))(lhs, rhs)
    assert jnp.array_equal(within, plain)
    wrong = jnp.asarray([60, 5])
    with pytest.raises(ShapeError, match="more than the 64 rows"):
        jax.jit(lambda lhs, rhs: grouped_matmul(lhs, rhs, wrong))(lhs, rhs)


def test_wrong_arguments_are_named() -> None:
    lhs, rhs, sizes, _ = arguments(case(64, 10, 20), jnp.bfloat16)
    with pytest.raises(ShapeError, match="do not fit"):
        grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)
    with pytest.raises(ShapeError, match="do not fit"):
        grouped_matmul(lhs, rhs, sizes[:1])
    with pytest.raises(ShapeError, match="dtype"):
        grouped_matmul(lhs.astype(jnp.float32), rhs, sizes)
    with pytest.raises(ShapeError, match="integers"):
        grouped_matmul(lhs, rhs, sizes.astype(jnp.float32))
    with pytest.raises(ShapeError, match="more than the 64 rows"):
        grouped_matmul(lhs, rhs, jnp.asarray([60, 5]))
    with pytest.raises(ShapeError, match="from 0 on"):
        grouped_matmul(lhs, rhs, jnp.asarray([-1, 5]))
    with pytest.raises(UnsupportedError, match="did you mean 'ragged_dot'"):
        grouped_matmul(lhs, rhs, sizes, implementation="raged_dot")
    with pytest.raises(UnsupportedError, match="multiples of 64"):
        named("mosaic_gpu")(lhs, rhs[..., :80], sizes)
    with pytest.raises(UnsupportedError, match="bfloat16 and float16"):
        named("mosaic_gpu")(*(x.astype(jnp.float32) for x in (lhs, rhs)), sizes)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        grouped_matmul(lhs, rhs, sizes, implementation="mosaic_gpu")
    assert explain(lhs, rhs).name == "ragged_dot"
    with targeting("gpu"):
        assert explain(lhs, rhs).name == "mosaic_gpu"
