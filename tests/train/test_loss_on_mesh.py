"""The loss on a mesh: each device keeps to the rows that it has."""

import math

import pytest

from jaxllm.ops.loss import LossOptions
from tests.train.meshes import collectives, compiled_step, many_heads

VOCAB, WIDTH, ROWS, LENGTH = 4096, 32, 16, 64


@pytest.mark.parametrize(
    "mesh", ["fsdp=8", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)]
)
def test_no_logits_and_no_rows_travel(mesh):
    """What goes between devices is the head, its gradient and the embedded tokens once each way,
    never tokens x vocabulary."""
    spec = many_heads(width=WIDTH, vocab=VOCAB)
    options = LossOptions(chunk_tokens=32)  # 256 on 8 devices: 4 chunks
    step = compiled_step(mesh, spec, batch=ROWS, length=LENGTH, loss=options)
    kinds = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    found = [shape for kind in kinds for shape in collectives(step, kind)]
    sizes = (VOCAB, VOCAB // 2)
    assert [shape for shape in found if shape[:1] in ((VOCAB,), (VOCAB // 2,))]  # the head
    assert [shape for shape in found if shape and shape[-1] in sizes] == []  # logits
    rows = ROWS * LENGTH * WIDTH // 8
    assert [shape for shape in found if LENGTH in shape and math.prod(shape) > 4 * rows] == []
    assert collectives(step, "collective-permute") == []
    if mesh == "fsdp=8":
        # The embedding's lookup and its gradient exchange the tokens' rows once each, and the table
        # is summed over devices once, for the head.
        assert sum(math.prod(shape) for shape in collectives(step, "all-to-all")) == 2 * rows
        summed = [*collectives(step, "all-reduce"), *collectives(step, "reduce-scatter")]
        assert [s for s in summed if s[:1] == (VOCAB,)] == [(VOCAB, WIDTH)]
