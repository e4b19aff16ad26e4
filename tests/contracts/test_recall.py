"""The models of scripts/mqar.py: tokens outlast their first layer, and recall is learned."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.nn import api
from jaxllm.state.step import training_step

PATH = Path(__file__).resolve().parents[2] / "scripts" / "mqar.py"


@pytest.fixture(scope="module")
def mqar():
    found = importlib.util.spec_from_file_location("mqar", PATH)
    module = importlib.util.module_from_spec(found)
    sys.modules["mqar"] = module  # its dataclass asks for it
    found.loader.exec_module(module)
    yield module
    del sys.modules["mqar"]


def test_every_asked_key_was_named_with_the_value_wanted(mqar):
    ids, wanted = mqar.rows(np.random.default_rng(0), 16)
    for row, values in zip(ids, wanted, strict=True):
        named = dict(zip(row[:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        asked = np.flatnonzero(values >= 0)
        assert len(named) == len(asked) == 8 and asked.min() >= 16
        assert {row[i]: values[i] for i in asked} == named


def test_a_token_is_not_drowned_by_the_first_layers_update(mqar):
    """The cause of a run that stayed at chance: updates of size 1 on embeddings of size 1/8."""
    whole = mqar.model(mqar.MIXERS["gated DeltaNet"])
    spec = dataclasses.replace(whole, layers="G", final_norm=None)
    params = api.init(spec, jax.random.key(0))
    ids, _ = mqar.rows(np.random.default_rng(0), 4)
    hidden, _, _ = api.apply(spec, params, ids, training_step(*ids.shape), policy=Policy())
    token = np.asarray(params["embed"]["table"])[ids]
    alike = (hidden * token).sum(-1) / np.linalg.norm(hidden, axis=-1)
    assert np.mean(alike / np.linalg.norm(token, axis=-1)) > 0.7


@pytest.mark.slow
def test_gated_delta_net_recalls(mqar):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        assert mqar.train("gated DeltaNet", 0)[500] > 0.95
