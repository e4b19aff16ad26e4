"""Models of the goldens, loaded once a module."""

import pytest

import jaxllm
from tests.oracle.golden import golden
from tests.oracle.mutate import POLICY


@pytest.fixture(scope="module")
def models():
    """name -> loaded model, each loaded once."""
    held = {}

    def get(name):
        if name not in held:
            held[name] = jaxllm.load(golden(name).source, policy=POLICY, store=False)
        return held[name]

    return get
