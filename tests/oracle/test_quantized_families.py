"""Every kind of model with its matrices in int8: each reader and writer knows the leaf."""

import pytest

import jaxllm
from jaxllm.core.qarray import QArray
from jaxllm.core.tree import flatten
from tests.oracle.golden import golden, relative

KINDS = (
    "mamba2",
    "jamba",
    "deepseek_v3",
    "gpt_oss",
    "falcon_h1",
    "lfm2",
    "cohere2",
    "phi3_partial",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_int8_is_its_dequantized_file(tmp_path, name):
    """Packed in memory, and expanded from the file that it was saved to."""
    held = golden(name)
    model = jaxllm.load(held.source, dtype="float32", store=False)
    small = model.quantize("int8")
    leaves = [path for path, leaf in flatten(small.params) if isinstance(leaf, QArray)]
    assert leaves and not any("router" in path or "norm" in path for path in leaves)
    small.save(tmp_path / "small")
    dense = jaxllm.load(tmp_path / "small", dtype="float32", store=False, packed=False)
    again = jaxllm.load(tmp_path / "small", dtype="float32", store=False)
    found = small.logits(held.ids)
    assert relative(found, dense.logits(held.ids)) < 1e-4
    assert relative(again.logits(held.ids), found) < 1e-5
    assert relative(found, model.logits(held.ids)) > 1e-4
