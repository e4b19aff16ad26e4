"""Nothing crosses the border of two documents in a row, with any implementation of attention."""

import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.ops.attention import IMPLEMENTATIONS
from jaxllm.spec.mask import And, Causal, Window
from tests.contracts.packed import check_no_gradient_crosses, documents, losses, served
from tests.contracts.specs import MLP48, heads, model, pre

SPECS = {
    "gqa": model(pre("G", heads(4, 2), MLP48), layers="G*2"),
    "window": model(
        pre("L", heads(4, 1, mask=And(first=Causal(), second=Window(left=4))), MLP48),
        layers="L*2",
    ),
}
ON_CPU = served("cpu", "float32", 8)


def test_every_implementation_is_covered():
    """Here, or in tests/device on a GPU, which asks `served` with that platform."""
    assert set(ON_CPU) | set(served("gpu", "bfloat16", 64)) == set(IMPLEMENTATIONS)


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
