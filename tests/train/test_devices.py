"""FLOPs of a training step counted by hand; peaks only of devices that are known."""

import dataclasses

import numpy as np
import pytest

from jaxllm.data.batch import Batch
from jaxllm.spec.mask import And, Causal, Window
from jaxllm.spec.model import Head
from jaxllm.train.devices import peak_flops, row_flops, step_flops
from tests.train.runs import small


@pytest.fixture
def spec(tmp_path):
    return small(tmp_path).spec


def test_flops_of_a_row_by_hand(spec):
    """Two layers: q 16x16, k and v 16x8, o 16x16, three of 16x24; 15 pairs of 5 tokens a head."""
    matrices = 2 * (256 + 128 + 128 + 256 + 3 * 16 * 24)
    head = 16 * 40
    scores_and_values = 2 * 2 * 8 * 2 * 15
    forward = 2 * (matrices + head) * 5 + 2 * scores_and_values
    assert row_flops(spec, 5) == 3 * forward


def test_an_untied_head_costs_the_same_and_its_embedding_nothing(spec):
    untied = dataclasses.replace(spec, head=Head(tied=False))
    assert row_flops(untied, 5) == row_flops(spec, 5)


def test_a_window_costs_less(spec):
    named = spec.blocks[0].subs[0].ops[0]
    mask = And(first=Causal(), second=Window(left=1))
    attention = dataclasses.replace(named.op, mask=mask)
    first = dataclasses.replace(
        spec.blocks[0].subs[0], ops=(dataclasses.replace(named, op=attention),)
    )
    block = dataclasses.replace(spec.blocks[0], subs=(first, spec.blocks[0].subs[1]))
    narrow = dataclasses.replace(spec, blocks=(block,))
    # 9 pairs instead of 15, two layers of two heads of width 8, four FLOPs each, three passes.
    assert row_flops(spec, 5) - row_flops(narrow, 5) == 3 * 4 * 2 * 2 * 8 * (15 - 9)


def batch(segments):
    ids = None if segments is None else np.asarray(segments, np.int32)
    shape = (2, 5) if ids is None else ids.shape
    whole = np.zeros(shape, np.int32)
    return Batch(whole, whole, np.ones(shape, np.float32), ids)


def test_packed_documents_see_only_their_own(spec):
    assert step_flops(spec, batch(None), rows=2) == 2 * row_flops(spec, 5)
    packed = step_flops(spec, batch([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]), rows=2)
    assert packed == row_flops(spec, 3) + row_flops(spec, 2) + row_flops(spec, 5)
    # A segment ends with its row, whatever the next row's number is.
    assert step_flops(spec, batch([[1] * 5, [1] * 5]), rows=2) == 2 * row_flops(spec, 5)


def test_rows_of_other_hosts_count_like_these(spec):
    assert step_flops(spec, batch(None), rows=8) == 8 * row_flops(spec, 5)
    packed = batch([[1, 1, 1, 2, 2]])
    assert step_flops(spec, packed, rows=4) == 4 * (row_flops(spec, 3) + row_flops(spec, 2))


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v6 lite", "bfloat16", 918.0),
    ],
)
def test_known_peaks(kind, dtype, tera):
    assert peak_flops(kind, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA L40", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float8"),
        ("TPU v5 lite", "float32"),
        ("TPU v5 lite", "float16"),
        ("TPU v3", "bfloat16"),
    ],
)
def test_what_is_unknown_has_no_peak(kind, dtype):
    assert peak_flops(kind, dtype) is None
