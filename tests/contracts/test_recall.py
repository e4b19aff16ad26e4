"""The tasks and models of scripts/mqar.py and scripts/passkey.py, and that they are learned."""

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

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str, patch: pytest.MonkeyPatch):
    """A script as a module; what it imports lies beside it."""
    patch.syspath_prepend(str(SCRIPTS))
    found = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    patch.setitem(sys.modules, name, module)  # its dataclass asks for it
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def mqar(patch):
    return script("mqar", patch)


@pytest.fixture(scope="module")
def passkey(patch):
    return script("passkey", patch)


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
        assert mqar.train("gated DeltaNet", 0, last=250)[250] > 0.9


def test_the_key_that_is_asked_for_stands_in_the_row_once(passkey):
    ids, wanted, marks = passkey.rows(np.random.default_rng(0), 32, 64)
    for row, values, marked in zip(ids, wanted, marks, strict=True):
        (place,) = np.flatnonzero(row == passkey.KEY)
        (ask,) = np.flatnonzero(row == passkey.ASK)
        digits = row[place + 1 : place + 5]
        assert ask == 59 and place + 4 < ask and min(digits) >= passkey.DIGITS[0]
        assert values[ask : ask + 4].tolist() == digits.tolist() == row[ask + 1 :].tolist()
        assert (values >= 0).sum() == 4 and np.flatnonzero(marked).tolist() == [
            *range(place, place + 5)
        ]


def test_a_rope_scaled_by_one_is_the_rope_that_was_trained(passkey, patch):
    """What the table compares at the trained length is one model."""
    logits = script("learning", patch).logits
    ids, wanted, _ = passkey.rows(np.random.default_rng(0), 4, 64)
    spec = passkey.model(passkey.KINDS["full"])
    params = api.init(spec, jax.random.key(0))
    whole = logits(spec, params, ids)
    for name, scaling in passkey.scalings(64).items():
        found = logits(passkey.model(passkey.KINDS["full"], scaling), params, ids)
        np.testing.assert_allclose(found, whole, atol=2e-5, err_msg=name)
        other = passkey.scalings(256)[name]
        if other is not None and name != "dynamic":  # which follows the length at hand
            moved = logits(passkey.model(passkey.KINDS["full"], other), params, ids)
            assert np.abs(moved - whole).max() > 1e-3, name
    assert (wanted >= 0).sum() == 16


@pytest.mark.slow
def test_a_marked_key_is_found_beyond_the_window_and_the_trained_length(passkey):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        (found,) = passkey.train(f"window {passkey.WINDOW} + marked", 0, steps=800).values()
    assert found[64] > 0.95 and found[256] > 0.6
