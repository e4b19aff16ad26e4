"""Nothing crosses the border of two documents in a row, whatever attends or carries states."""

import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.ops import linear_chunks, selective, ssd
from jaxllm.ops.attention import IMPLEMENTATIONS
from jaxllm.spec.mask import And, Causal, Window
from jaxllm.spec.model import Block, sub
from jaxllm.spec.ops import Convolution
from tests.contracts.packed import check_no_gradient_crosses, documents, losses, served
from tests.contracts.specs import DUAL, MLP48, RMS, SELECTIVE, heads, model, pre
from tests.contracts.specs import SPECS as TOYS

SPECS = {
    "gqa": model(pre("G", heads(4, 2), MLP48), layers="G*2"),
    "window": model(
        pre("L", heads(4, 1, mask=And(first=Causal(), second=Window(left=4))), MLP48),
        layers="L*2",
    ),
}
RECURRENT = model(
    Block(name="S", subs=(sub("ssm", SELECTIVE, norm_in=RMS),)),
    Block(name="M", subs=(sub("ssm", DUAL, norm_in=RMS),)),
    Block(name="C", subs=(sub("conv", Convolution(channels=32), norm_in=RMS),)),
    layers="S M C",
)
ON_CPU = served("cpu", "float32", 8)


def test_every_implementation_is_covered():
    """Here, in tests/device on a GPU, which asks `served` with that platform, or as an op alone."""
    elsewhere = served("gpu", "bfloat16", 64) + served("tpu", "bfloat16", 64)
    assert {*ON_CPU, *elsewhere} == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("name", SPECS)
def test_no_gradient_crosses_a_document_boundary(name, implementation, tmp_path):
    policy = Policy(attention=implementation)
    check_no_gradient_crosses(SPECS[name], documents(tmp_path), policy)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("name", SPECS)
def test_a_packed_document_has_the_loss_it_has_alone(name, implementation, tmp_path):
    found = np.array(losses(SPECS[name], documents(tmp_path), Policy(attention=implementation)))
    assert len(found) == 9 and (found > 1).all()
    assert np.abs(found[:, 0] / found[:, 1] - 1).max() < 1e-5


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks shorter than a row, so that documents begin, end and go on in several."""
    monkeypatch.setattr(selective, "CHUNK", 6)
    monkeypatch.setattr(ssd, "CHUNK", 6)
    monkeypatch.setattr(linear_chunks, "CHUNK", 6)
    monkeypatch.setattr(linear_chunks, "BLOCK", 3)


RECURRENCES = {"state space": RECURRENT, "delta": TOYS["delta"], "kernels": TOYS["kernels"]}


@pytest.mark.parametrize("name", RECURRENCES)
def test_no_recurrence_crosses_a_document_boundary(name, tmp_path, small_chunks):
    check_no_gradient_crosses(RECURRENCES[name], documents(tmp_path), Policy())


@pytest.mark.parametrize("scan", ["reference", "chunked"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_a_packed_document_in_a_recurrence_has_the_loss_it_has_alone(
    name, scan, tmp_path, small_chunks
):
    found = np.array(losses(RECURRENCES[name], documents(tmp_path), Policy(scan=scan)))
    assert len(found) == 9 and (found > 1).all()
    assert np.abs(found[:, 0] / found[:, 1] - 1).max() < 1e-5
