"""Taps: inputs of matrices, and their Gram matrices, by unstacked path in any layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.ops.norm import rms_norm
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step
from tests.contracts.specs import (
    SPECS,
    assert_close,
    assert_equal,
    forward,
    full,
    params,
    quick,
    single,
    tokens,
)

NAME = "gqa"
SPEC = SPECS[NAME]
PATHS = ("layers.0.attn.q", "layers.1.attn.o", "layers.3.mlp.down", "layers.4.mlp.up")
GRAMS = tuple(f"gram:{path}" for path in PATHS)
POLICY = Policy(taps=frozenset(PATHS + GRAMS))


@functools.cache
def tapped(layout):
    weights = params(NAME) if layout == "scan" else single(params(NAME), SPEC.num_layers)
    logits, aux = quick(forward(SPEC, POLICY))(weights, tokens(NAME))
    return np.asarray(logits), aux.taps


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_taps_bring_what_was_asked_and_change_nothing(layout):
    logits, taps = tapped(layout)
    assert set(taps) == POLICY.taps
    assert_close(logits, full(NAME), 1e-6)
    width = {"q": (32,), "o": (4, 8), "down": (48,), "up": (32,)}
    for path in PATHS:
        shape = width[path.split(".")[-1]]
        size = int(np.prod(shape))
        assert taps[path].shape == (4, 12, *shape)
        assert taps[f"gram:{path}"].shape == (size, size)


def test_layouts_bring_the_same_taps():
    assert_close(tapped("scan")[1], tapped("unrolled")[1])


def test_the_first_taps_by_hand():
    weights, ids = params(NAME), tokens(NAME)
    x = jnp.asarray(weights["embed"]["table"][ids])
    x = rms_norm(x, weights["layers"]["0"]["attn_norm"]["scale"], eps=1e-5)
    assert_close(tapped("scan")[1]["layers.0.attn.q"], x)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_later_taps_by_what_the_model_makes_of_them(layout):
    """The tapped input times its matrix is the sub's update: replaying layers 3 and 4 by hand."""
    taps = tapped(layout)[1]
    alone = single(params(NAME), SPEC.num_layers)["layers"]
    up_input = np.asarray(taps["layers.4.mlp.up"])
    norm = np.asarray(alone["4"]["mlp_norm"]["scale"])
    # An RMS-normed row, its weight taken off, has mean square 1.
    assert np.allclose(np.square(up_input / norm).mean(-1), 1, atol=1e-3)
    run = quick(forward(SPEC, Policy(taps=frozenset({"layers.3.mlp.up", "layers.3.mlp.down"}))))
    found = run(params(NAME), tokens(NAME))[1].taps
    mlp = alone["3"]["mlp"]
    x = found["layers.3.mlp.up"]
    gate, up = (jnp.einsum("BTD,DF->BTF", x, mlp[n], precision="highest") for n in ("gate", "up"))
    hidden = gate / (1 + jnp.exp(-gate)) * up
    assert_close(found["layers.3.mlp.down"], hidden)
    assert_close(taps["layers.3.mlp.down"], hidden)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_gram_is_the_product_of_all_tokens_inputs(layout):
    taps = tapped(layout)[1]
    for path in PATHS:
        flat = np.asarray(taps[path], np.float64).reshape(48, -1)
        gram = flat.T @ flat
        assert_close(taps[f"gram:{path}"], gram)
        assert_equal(taps[f"gram:{path}"], taps[f"gram:{path}"].T)


def test_taps_come_from_decoding_too():
    ids, weights = tokens(NAME)[:, :1], params(NAME)
    state = dense_state(SPEC, 4, 4, dtype=np.float32)
    step = dense_step(jnp.zeros((4,), jnp.int32), 1)
    _, _, aux = quick(lambda w, s: api.apply(SPEC, w, ids, step, s, policy=POLICY))(weights, state)
    for path in PATHS:
        assert_close(aux.taps[path], tapped("scan")[1][path][:, :1])


@pytest.mark.parametrize("tap", ["layers.6.mlp.down", "layers.0.mlp.downs", "mlp.down", "gram:x"])
def test_a_tap_of_nothing_is_an_error(tap):
    run = forward(SPEC, Policy(taps=frozenset({tap})))
    with pytest.raises(ConfigError, match=tap):
        jax.eval_shape(run, params(NAME), tokens(NAME))


def test_taps_of_fused_projections_are_refused():
    with pytest.raises(ConfigError, match="fused"):
        Policy(taps=frozenset(PATHS), fused=True)
