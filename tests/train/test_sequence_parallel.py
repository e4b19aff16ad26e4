"""Tokens split over `tensor` between ops: collectives, memory; inference is as it was."""

import pytest

from jaxllm.core.sharding import DEFAULT_RULES, partition_spec
from jaxllm.train.layout import make_row
from tests.train.meshes import collectives, compiled_step, many_heads

LAYERS = 6
SPEC = many_heads(width=64, layers=LAYERS, ffn=64, vocab=64)
ROWS, LENGTH, WIDTH = 8, 256, 64
HIDDEN = (ROWS, LENGTH, WIDTH)
HIDDEN_BYTES = 4 * ROWS * LENGTH * WIDTH


def step_of(split, remat="none"):
    changes = {"batch": ROWS, "length": LENGTH, "remat": remat, "sequence_parallel": split}
    return compiled_step("tensor=8", SPEC, **changes)


@pytest.mark.parametrize(
    ("remat", "kept"), [("none", 4), pytest.param("full", 1, marks=pytest.mark.slow)]
)
def test_hidden_states_between_ops_take_an_eighth(remat, kept):
    """Of the hidden states that a layer keeps for its backward pass, 7/8 are gone."""
    split, whole = step_of(True, remat), step_of(False, remat)
    assert HIDDEN not in collectives(whole, "all-gather")
    # Forward before qkv and gate/up; backward the gradients of what o and down gave.
    assert collectives(split, "all-gather").count(HIDDEN) >= 4
    assert collectives(split, "all-to-all") == []
    saved = whole.report.temporary_bytes - split.report.temporary_bytes
    assert saved > kept * LAYERS * 7 / 8 * HIDDEN_BYTES


def test_inference_keeps_its_layout():
    axes, hidden, mesh = ("batch", "sequence", None), (8, 256, 64), {"tensor": 8}
    assert partition_spec(axes, DEFAULT_RULES, mesh, hidden)[1] is None
    trains = make_row("zero3", sequence_parallel=True).params
    assert partition_spec(axes, trains, mesh, hidden)[1] == "tensor"
    assert partition_spec(axes, trains, mesh, (8, 1, 64))[1] is None
