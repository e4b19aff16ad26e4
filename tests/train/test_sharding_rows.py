"""What each row of `ROWS` shards, in bytes: of the state, of gradients, of gathered layers."""

import math

import jax
import optax
import pytest

from jaxllm.core.sharding import DEFAULT_RULES, ROWS, mesh_axes, with_axes
from jaxllm.core.tree import flatten
from jaxllm.errors import ConfigError
from jaxllm.spec.cost import num_params
from jaxllm.train.layout import make_row
from tests.train.meshes import collectives, compiled_step, many_heads

WIDE = many_heads(width=256, layers=4, ffn=1024, vocab=64)
"""Parameters dwarf the activations of 8 rows of 8 tokens."""
ROWS_OF_EIGHT = ["replicated", "zero1", "zero2", "zero3"]
PARAMETERS = 4 * num_params(WIDE)
BATCH = 3 * 4 * 8 * 8


def step_of(row, mesh="fsdp=8", spec=WIDE):
    return compiled_step(mesh, spec, batch=8, length=8, sharding=row)


def scalars(step):
    """Bytes of the key and of all counts and scales: whole on every device."""
    leaves = jax.tree.leaves(step.compiled.args_info[0][0])
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves if math.prod(x.shape) <= 2)


def predicted(row, sizes):
    """Bytes of parameters and Adam's moments a device: the formula of docs/training.md."""
    data, fsdp = sizes.get("data", 1), sizes.get("fsdp", 1)
    of = {"replicated": (1, 1), "zero1": (1, fsdp), "zero2": (1, fsdp), "zero3": (fsdp, fsdp)}
    params, moments = (of | {"hybrid": (fsdp, data * fsdp)})[row]
    return PARAMETERS / params + 2 * PARAMETERS / moments


def shares(shapes, shardings):
    """Path -> the share of an array that a device holds."""
    held = dict(flatten(shardings))
    return {
        path: math.prod(held[path].shard_shape(x.shape)) / math.prod(x.shape)
        for path, x in flatten(shapes)
    }


@pytest.mark.parametrize("row", ROWS_OF_EIGHT)
def test_the_state_lies_as_the_row_says(row):
    step = step_of(row)
    shapes, shardings = step.compiled.args_info[0][0], step.compiled.input_shardings[0][0]
    rules = (ROWS[row].params, ROWS[row].moments)
    params, moments = ({1 / 8 if mesh_axes(r, "width") else 1.0} for r in rules)
    assert set(shares(shapes.params, shardings.params).values()) == params
    for name in ("mu", "nu"):
        adam, held = (optax.tree.get(x.opt_state, name) for x in (shapes, shardings))
        assert set(shares(adam, held).values()) == moments
    assert step.compiled.input_shardings[0][0] == step.compiled.output_shardings[0]


@pytest.mark.parametrize(
    ("row", "mesh"),
    [
        *((row, "fsdp=8") for row in ROWS_OF_EIGHT),
        pytest.param("hybrid", "data=2,fsdp=4", marks=pytest.mark.slow),
    ],
)
def test_the_report_says_what_the_formula_does(row, mesh):
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    step = step_of(row, mesh)
    batch = BATCH / math.prod(sizes.values())
    assert step.report.argument_bytes == predicted(row, sizes) + batch + scalars(step)


def test_gradients_are_whole_in_zero1_and_an_eighth_in_zero2():
    """Of all that differs between the two programs, 7/8 of the gradients are the most."""
    whole, split = (step_of(row).report.temporary_bytes for row in ("zero1", "zero2"))
    assert whole > PARAMETERS > split
    assert 0.75 * PARAMETERS < whole - split < PARAMETERS


def test_zero3_gathers_one_layer_at_a_time():
    """More layers take a share of their own size, not all of it; no stack is gathered."""
    deep = many_heads(width=256, layers=12, ffn=1024, vocab=64)
    few, many = step_of("zero3"), step_of("zero3", spec=deep)
    more = many.report.temporary_bytes - few.report.temporary_bytes
    weights = 4 * num_params(deep) - PARAMETERS
    assert more < 0.3 * weights
    gathered = collectives(many, "all-gather")
    assert (256, 1024) in gathered
    assert [shape for shape in gathered if math.prod(shape) > 256 * 1024] == []


def test_parameters_are_gathered_once_after_the_update():
    for row in ("zero1", "zero2"):
        gathered = collectives(step_of(row), "all-gather")
        for shape, times in {(4, 256, 1024): 2, (4, 1024, 256): 1, (64, 256): 1}.items():
            assert gathered.count(shape) == times, (row, shape)


def test_rows_are_one_table_each():
    with pytest.raises(ConfigError, match="no logical axis is called with"):
        with_axes(DEFAULT_RULES, **{"with": None})
    split = make_row("zero2", sequence_parallel=True)
    assert dict(split.params)["sequence"] == "tensor"
    assert split.moments == ROWS["zero2"].moments == DEFAULT_RULES
