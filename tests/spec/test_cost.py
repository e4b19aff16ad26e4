"""Counts of a spec against the arrays themselves, and attention pair by pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm.core.tree import flatten
from jaxllm.nn import api
from jaxllm.spec.cost import (
    attended_pairs,
    flops,
    kv_bytes_per_token,
    num_active_params,
    num_params,
    recurrent_bytes,
    weight_bytes,
)
from jaxllm.spec.mask import And, Blocks, Causal, Full, Global, Or, Random, Row, Window, allowed
from jaxllm.spec.model import Head
from jaxllm.spec.op_table import op_table
from jaxllm.spec.ops import MoE
from jaxllm.spec.table import model_table
from jaxllm.state.dense import dense_state
from jaxllm.zoo.families import PRESETS
from tests.contracts.specs import SPECS, params
from tests.oracle.mutate import change
from tests.spec.test_model import masks


@pytest.mark.parametrize("name", SPECS)
def test_num_params_is_what_init_makes(name):
    spec = SPECS[name]
    made = jax.eval_shape(lambda: api.init(spec, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(made))
    assert num_params(spec) == count == sum(x.size for _, x in flatten(params(name)))
    assert weight_bytes(spec, 2) == 2 * count


def test_num_params_of_published_models():
    """Of their model cards: 1.23B and 8.03B."""
    assert num_params(PRESETS["llama-3.2-1b"]) == 1_235_814_400
    assert num_params(PRESETS["llama-3.1-8b"]) == 8_030_261_248


def pairs(mask, tokens, past):
    total = past + tokens
    query, key = np.arange(past, total)[:, None], np.arange(total)[None]
    seen = allowed(mask, query, key, Row(length=total))
    return int(np.sum(np.broadcast_to(seen, (tokens, total))))


@settings(max_examples=80, deadline=None)
@given(masks)
def test_pairs_are_counted_one_by_one(mask):
    for tokens, past in ((1, 0), (5, 0), (1, 7), (6, 3)):
        assert attended_pairs(mask, tokens, past) == pairs(mask, tokens, past)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Full(),
        Window(left=3, right=2),
        And(first=Causal(), second=Window(left=4)),
        And(first=Window(left=4, right=3), second=Causal()),
        Or(first=Causal(), second=Window(left=0, right=1)),
    ],
)
def test_flops(mask):
    """Two for each multiply-add: every matrix, every admitted pair of every head, the head."""
    base = SPECS["mha"]
    attn = dataclasses.replace(base.blocks[0].subs[0].ops[0].op, mask=mask)
    first = dataclasses.replace(
        base.blocks[0].subs[0], ops=(dataclasses.replace(base.blocks[0].subs[0].ops[0], op=attn),)
    )
    block = dataclasses.replace(base.blocks[0], subs=(first, base.blocks[0].subs[1]))
    spec = dataclasses.replace(base, blocks=(block,))
    found = flops(spec, 5, past=2)
    matrices = 32 * 8 * (4 + 4 + 4 + 4) + 3 * 32 * 48
    assert found["matmul"] == 3 * 2 * matrices * 5
    assert found["attention"] == 3 * 2 * 2 * 4 * 8 * pairs(mask, 5, 2)
    assert found["head"] == 2 * 32 * 64 * 5
    assert found["total"] == found["matmul"] + found["attention"] + found["head"]
    assert flops(spec, 5, past=2, logits=1)["head"] == 2 * 32 * 64


def used(op, width=32):
    """Values of an op that one token meets: of experts those that are chosen, all others whole."""
    if isinstance(op, MoE):
        width = op.latent or 32
        own = 32 * op.experts + op.active * used(op.mlp, width)
        return own if op.latent is None else own + 2 * 32 * width
    return sum(d.size for d in op_table(op, width).values() if d.inputs)


def test_a_memory_costs_its_lookups_and_a_token_uses_what_it_reads():
    spec = SPECS["memory"]
    scores, sums = 2 * 6 * 8 + 3 * 4 * 6, 2 * 3 * 12 + 3 * 5 * 32  # of one layer of each kind
    assert flops(spec, 5)["memory"] == 2 * 2 * 5 * (scores + sums)
    table = dict(flatten(model_table(spec)))
    assert table["shared.pool.values"].size == 36 * 12
    values = [d for path, d in table.items() if path.endswith("values")]
    idle = sum(d.size - round(d.size * d.active) for d in values)
    assert num_params(spec) - num_active_params(spec) == idle > 0


@pytest.mark.parametrize("name", SPECS)
def test_flops_of_matrices_count_each_weight_once_a_token(name):
    spec = SPECS[name]
    layers = [s for i in range(spec.num_layers) for s in spec.block(i).subs]
    matrices = sum(used(named.op, part.width_in(32)) for part in layers for named in part.ops)
    assert flops(spec, 3)["matmul"] == 2 * 3 * matrices


def test_active_parameters():
    """All but the experts that a token does not go to."""
    spec = SPECS["moe"]
    idle = 3 * 32 * 24 * (4 - 2) + 2 * 3 * 32 * 16 * (8 - 3)
    assert num_params(spec) - num_active_params(spec) == idle
    assert num_active_params(SPECS["mha"]) == num_params(SPECS["mha"])


@pytest.mark.parametrize("name", SPECS)
def test_bytes_are_those_of_the_state(name):
    spec = SPECS[name]
    state = dense_state(spec, 2, 5, dtype=np.float32)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert 2 * (5 * kv_bytes_per_token(spec, 4) + recurrent_bytes(spec, 4)) == held
    half = dense_state(spec, 2, 5, dtype=jnp.bfloat16)  # recurrences stay in float32
    held = sum(x.nbytes for x in jax.tree.leaves(half))
    assert 2 * (5 * kv_bytes_per_token(spec, 2) + recurrent_bytes(spec, 2)) == held


def test_a_recurrence_costs_the_same_at_every_token():
    spec, op = SPECS["dual"], SPECS["dual"].blocks[0].subs[0].ops[0].op
    alone = dataclasses.replace(spec, layers="M*2")
    state = 6 * op.heads * op.head_dim * op.state
    convolutions = 2 * op.conv * (op.heads * op.head_dim + 2 * op.groups * op.state)
    assert flops(alone, 7)["recurrence"] == 2 * 7 * (state + convolutions)
    found = flops(spec, 7, past=3)
    assert found["total"] == sum(v for k, v in found.items() if k != "total")
    assert flops(alone, 7) == flops(alone, 7, past=100)


def test_pairs_of_draws_are_counted_head_by_head():
    """A block sees three, the two ends and one by draw; the ends see all: 10 blocks of 2."""
    mask = Blocks(
        size=2,
        mask=Or(
            first=Or(first=Window(left=1, right=1), second=Global(first=1, last=1)),
            second=Random(count=1),
        ),
    )
    seen = 2 * 10 + 2 * 5 + 6 * 6  # the ends; the second and the last but one; the others
    assert attended_pairs(mask, 20, heads=3) == 3 * 4 * seen
    spec = SPECS["bigbird"]
    draws = 10 * 1  # a block is a token there
    op = spec.block(0).subs[0].ops[0].op
    wanted = op.heads * (2 * 12 + 2 * 4 + 8 * 5 + draws)
    assert flops(spec, 12)["attention"] == 2 * 4 * op.head_dim * wanted


def test_flops_of_a_length_projection():
    """Scores and sums over the rows; and the sums of keys and of values."""
    spec = SPECS["linformer"]
    rows, tokens, heads = 5, 12, 4 * 8
    assert flops(spec, tokens)["attention"] == 2 * (
        4 * heads * tokens * rows + 4 * tokens * rows * heads
    )


def test_flops_of_heads():
    assert flops(SPECS["bert"], 3)["head"] == 3 * 2 * 32 * (64 + 32)
    body = dataclasses.replace(SPECS["bert"], head=Head(logits=False))
    assert flops(body, 3)["head"] == 0
    assert num_params(body) == num_params(SPECS["bert"]) - 64 - 32 * 32 - 3 * 32


def test_projections_of_marked_tokens_are_not_counted():
    base = SPECS["longformer"]
    op = base.block(0).subs[0].ops[0].op
    marked = change(base, type(op), mask=Or(first=op.mask.first, second=Global()))
    assert flops(base, 3)["matmul"] - flops(marked, 3)["matmul"] == 2 * 3 * 2 * 3 * 32 * 32
