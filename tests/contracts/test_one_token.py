"""A decoding step whose attention is one kernel: the model's logits and state, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.choices import taken
from jaxllm.core.mesh import make_mesh
from jaxllm.core.tree import single_segments
from jaxllm.infer.open import run_policy, run_segments
from jaxllm.infer.programs import Setup
from jaxllm.nn import api
from jaxllm.ops.flat import Flat
from jaxllm.ops.pages import PageTable
from jaxllm.ops.rope import apply_rope, rope_turns
from jaxllm.spec.mask import Full, Window
from jaxllm.spec.model import Head
from jaxllm.spec.ops import MLP, QKNorm, Temperature
from jaxllm.spec.rope import LongRopeScaling, Rope, YarnScaling
from jaxllm.state.dense import DenseKV
from jaxllm.state.one_token import obstacle
from jaxllm.state.paged import PagedKV, groups, paged_state
from jaxllm.state.step import dense_step, flat_step
from pallas_kernels.decode_attention.reference import turned
from pallas_kernels.target import targeting
from tests.contracts.specs import heads, model, pre

HEADS = heads(4, 2, head_dim=64)
OPS = {
    "plain": HEADS,
    "window": dataclasses.replace(HEADS, mask=Window(left=2, right=0), softcap=20.0, scale=0.2),
    "norms": dataclasses.replace(HEADS, qk_norm=QKNorm(), gate=True, qkv_bias=True),
    "no rope": dataclasses.replace(HEADS, rope=None),
    "yarn": dataclasses.replace(
        HEADS, rope=Rope(scaling=YarnScaling(factor=4.0, original_context=64))
    ),
}
POLICY = run_policy("bfloat16", platform="gpu", attention="reference")
BY_NAME = dataclasses.replace(POLICY, attention="mosaic_gpu")


def setup_of(op):
    spec = model(
        pre("G", op, MLP(width=128, gated=True)), layers="G*2", head=Head(tied=True), width=128,
        vocab=64,
    )  # fmt: skip
    segments = run_segments(spec, POLICY)
    drawn = api.init(spec, jax.random.key(0), dtype=jnp.bfloat16, segments=segments, fused=True)
    params = api.hold(spec, drawn, POLICY)
    setup = Setup(spec=spec, policy=POLICY, params=params, segments=segments, mesh=None, options=())
    return setup, params


def decoded(setup, params, policy, rows: int, tokens: int):
    """Logits [T, B, V] of steps of a token, whose rows stand at other places, and the state."""

    @jax.jit
    def step(ids, positions, state):
        hidden, state, _ = api.apply(
            setup.spec, params, ids, dense_step(positions, 1), state, policy=policy
        )
        return api.unembed(setup.spec, params, hidden, policy=policy), state

    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), setup.state(rows, 64))
    first, found = jnp.arange(rows, dtype=jnp.int32), []
    for i in range(tokens):
        logits, state = step((7 * first[:, None] + 5 * i) % 64, 3 * first + i, state)
        found.append(np.asarray(logits, np.float32))
    return np.stack(found), state


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_steps_are_the_models(name, rows):
    setup, params = setup_of(OPS[name])
    wanted, state = decoded(setup, params, POLICY, rows, 5)
    with targeting("interpreter"), taken() as heard:
        found, other = decoded(setup, params, BY_NAME, rows, 5)
    assert heard["attention"] == {"decode_attention"}
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        np.testing.assert_allclose(two, one, atol=0.02, rtol=0.02)


def paged(setup, params, policy, tokens: int):
    """Logits [T, 2, V] of steps of two sequences and a row that is not used, and their pages."""
    (group,) = groups(setup.spec)
    table = PageTable(jnp.asarray([[5, 2, 9], [9, 9, 9], [0, 7, 3]]), jnp.zeros(3, jnp.int32))
    shapes = paged_state(
        setup.spec, {group: 9}, 3, page_size=16, dtype=jnp.bfloat16, segments=setup.segments
    )
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.jit
    def step(ids, starts, state):
        flat = Flat(jnp.asarray([1, 0, 1]), starts, jnp.asarray([0, 3, 1]), 1)
        hidden, state, _ = api.apply(
            setup.spec, params, ids, flat_step(flat, 3, {group: table}), state, policy=policy
        )
        return api.unembed(setup.spec, params, hidden, policy=policy), state

    found = []
    for i in range(tokens):
        ids = jnp.asarray([[i % 64, 63, 5 * i % 64]])
        logits, state = step(ids, jnp.asarray([i, 0, 28 + i]), state)
        found.append(np.asarray(logits, np.float32)[0, ::2])
    return np.stack(found), state


@pytest.mark.parametrize("name", ["plain", "window", "norms"])
def test_steps_over_pages_are_the_models(name):
    setup, params = setup_of(OPS[name])
    wanted, state = paged(setup, params, POLICY, 6)
    with targeting("interpreter"), taken() as heard:
        found, other = paged(setup, params, BY_NAME, 6)
    assert heard["attention"] == {"decode_attention"} and "paged attention" not in heard
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        np.testing.assert_allclose(two, one, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("longest", "kv_dtype", "page", "reason"),
    [(2, "auto", 16, "one token"), (1, "int8", 16, "no pages of 8 bits"), (1, "auto", 8, "not 8")],
)
def test_steps_over_pages_that_it_cannot_serve_go_op_by_op(longest, kv_dtype, page, reason):
    spec = setup_of(HEADS)[0].spec
    how = {"page_size": page, "dtype": jnp.bfloat16, "kv_dtype": kv_dtype}
    shapes = paged_state(spec, {"all": 4}, 2, segments=single_segments(2), **how)
    held = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, PagedKV))[0]
    flat = Flat(jnp.ones(2, jnp.int32), jnp.zeros(2, jnp.int32), jnp.arange(2), longest)
    q = jnp.zeros((1, 2, 4, 64), jnp.bfloat16)
    with targeting("interpreter"):
        said = obstacle(state, q, step=flat_step(flat, 2), op=HEADS, policy=BY_NAME)
    assert reason in said


@pytest.mark.parametrize("rope", [Rope(), OPS["yarn"].rope])
def test_turns_rotate_as_the_rope_does(rope):
    x = jax.random.normal(jax.random.key(1), (3, 1, 2, 64), jnp.float32)
    places = jnp.asarray([[0], [5], [1000]])
    found = turned(x[:, 0], rope_turns(64, places, rope)[:, 0])
    wanted = apply_rope(x, places, rope)[:, 0]
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-6, atol=1e-6)


def test_turns_of_a_rope_that_follows_the_length_are_those_of_the_length():
    long = LongRopeScaling(
        short_factor=(1.0,) * 32, long_factor=(4.0,) * 32, factor=2.0, original_context=16
    )
    rope, x = Rope(scaling=long), jnp.ones((2, 1, 1, 64))
    places, lengths = jnp.asarray([[10], [40]]), jnp.asarray([[11], [41]])
    found = turned(x[:, 0], rope_turns(64, places, rope, lengths=lengths)[:, 0])
    wanted = apply_rope(x, places, rope, lengths=lengths)[:, 0]
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-6, atol=1e-6)


def why(op=HEADS, *, length=1, slots=64, policy=BY_NAME, dtype="bfloat16", cache="bfloat16", **at):
    """What `obstacle` says of a step."""
    kind = jnp.zeros((1, slots, op.kv_heads, op.head_dim), cache)
    q = jnp.zeros((1, length, op.heads, op.head_dim), dtype)
    step = dataclasses.replace(dense_step(jnp.zeros(1, jnp.int32), length), **at)
    return obstacle(DenseKV(kind, kind), q, step=step, op=op, policy=policy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 2}, "one token"),
        ({"fresh": True}, "one token"),
        ({"lengths": jnp.ones(1, jnp.int32)}, "whole sequences"),
        ({"slots": 60}, "a multiple of 8 slots"),
        ({"policy": POLICY}, "another implementation is named"),
        ({"dtype": "float32"}, "cache of the queries' dtype"),
        ({"dtype": "float32", "cache": "float32"}, "bfloat16 and float16"),
        ({"op": heads(4, 2, head_dim=32)}, "heads of 64 or 128"),
        ({"op": dataclasses.replace(HEADS, sinks=True)}, "no sinks"),
        (
            {"op": dataclasses.replace(HEADS, temperature=Temperature(period=8192.0, scale=0.1))},
            "no temperatures",
        ),
        ({"op": dataclasses.replace(HEADS, mask=Full())}, "causal masks"),
        ({"op": dataclasses.replace(HEADS, rope=Rope(fraction=0.5))}, "whole heads"),
        ({"op": dataclasses.replace(HEADS, rope=Rope(layout="interleaved"))}, "by halves"),
        (
            {"op": dataclasses.replace(HEADS, qk_norm=QKNorm(after_rope=True))},
            "it rotates last",
        ),
    ],
)
def test_steps_that_the_kernel_cannot_serve_go_op_by_op(change, reason):
    with targeting("interpreter"):
        assert why() is None
        assert reason in why(**change)


def test_auto_takes_it_on_a_gpu_alone():
    auto = dataclasses.replace(POLICY, attention="auto")
    said = {"interpreter": "by name only", "cpu": "this is cpu", "tpu": "this is tpu"}
    for platform, reason in said.items():
        with targeting(platform):
            assert reason in why(policy=auto)
    with targeting("gpu"):
        assert why(policy=auto) is None
    with targeting("interpreter"), jax.set_mesh(make_mesh({"tensor": 2})):
        assert why() == "it runs on one device"
