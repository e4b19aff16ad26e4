"""Decoding steps in fused kernels: the model's logits and tokens, how many kernels, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.choices import taken
from jaxllm.core.policy import Policy
from jaxllm.core.weights import Scheme
from jaxllm.errors import UnsupportedError
from jaxllm.infer.open import run_policy, run_segments
from jaxllm.infer.programs import Setup
from jaxllm.infer.steps import decode_steps
from jaxllm.nn import api
from jaxllm.ops.fused import AUTO_ROWS, fused, obstacle
from jaxllm.quant.apply import quantize_params
from jaxllm.serve.programs import Memory, Shape, step
from jaxllm.spec.model import Head
from jaxllm.spec.ops import MLP
from jaxllm.state.step import dense_step
from pallas_kernels import decode_matmul
from pallas_kernels.target import targeting
from tests.contracts.specs import heads, model, pre
from tests.kernels.lowered import kernel_calls

WIDE = heads(8, 2, head_dim=64)
SPECS = {
    # All products of a layer and the head fuse; the head's norm goes with it.
    "llama": (model(pre("G", WIDE, MLP(width=512, gated=True)), layers="G*2", head=Head(tied=True),
                    width=512, vocab=128), 9, 0),
    # Biases part a product from its residual, an activation that kernels lack from its gate; 80
    # outputs and 48 inputs are none of the kernel's: fewer kernels, the same numbers.
    "odd": (model(pre("G", heads(6, 2, head_dim=8, qkv_bias=True, out_bias=True),
                      MLP(width=512, gated=True, activation="relu2")), layers="G*2",
                  head=Head(softcap=5.0), width=512, vocab=192), 5, 2),
    # Weights of four bits, and a head in bfloat16, which no kernel multiplies beside them.
    "packed": (model(pre("G", heads(16, 4, head_dim=64), MLP(width=1024, gated=True)),
                     layers="G*2", head=Head(tied=True), width=1024, vocab=128), 9, 0),
}  # fmt: skip
POLICY = run_policy("bfloat16", platform="gpu", attention="reference")


def setup_of(name: str, **changes) -> tuple[Setup, dict]:
    spec = SPECS[name][0]
    policy = dataclasses.replace(POLICY, **changes)
    segments = run_segments(spec, policy)
    drawn = api.init(spec, jax.random.key(0), dtype=jnp.bfloat16, segments=segments, fused=True)
    params = api.hold(spec, drawn, policy)
    if name == "packed":
        scheme = Scheme(format="int4", group=128)
        params = quantize_params(spec, params, scheme, policy=policy)
    setup = Setup(spec=spec, policy=policy, params=params, segments=segments, mesh=None, options=())
    return setup, params


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("rows", "decode"), [(1, "fused"), (3, "chained")])
def test_steps_in_fused_kernels_are_the_models(name, rows, decode, monkeypatch):
    """Our kernel's stand-in is its reference: itself it is tested where it lives."""
    whole, links = decode_matmul.decode_chain, []

    def stand_in(x, given, **options):
        links.append(given)
        return whole(x, given, implementation="reference", **options)

    monkeypatch.setattr(decode_matmul, "decode_chain", stand_in)
    setup, params = setup_of(name)
    spec, policy = setup.spec, setup.policy
    ids = jnp.arange(rows, dtype=jnp.int32)[:, None] * 7

    def step(params, positions, state):
        hidden, state, _ = api.apply(
            spec, params, ids, dense_step(positions, 1), state, policy=policy
        )
        return api.unembed(spec, params, hidden, policy=policy), state

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), setup.state(rows, 8))
    arguments = params, jnp.zeros(rows, jnp.int32), zeros
    plain, plain_state = jax.jit(step)(*arguments)
    with targeting("interpreter"), taken() as heard:
        other = dataclasses.replace(policy, decode=decode)
        call = fused(step, policy=other, rows=rows)
        found, state = jax.jit(call)(*arguments)
    assert heard["decode"] == {decode}
    made = [link for some in links for link in some]
    assert len(made) == SPECS[name][1]
    if name == "packed":
        packed = [isinstance(link.w, decode_matmul.Packed) for link in made]
        assert packed == [True] * 8 + [False]
        assert [len(some) for some in links] == ([1] * 9 if decode == "fused" else [1, 4, 3, 1])
    if name == "llama":
        # Queries first; then a layer's other products, with the queries of the next or the head.
        assert [len(some) for some in links] == ([1] * 9 if decode == "fused" else [1, 4, 4])
        assert sum(link.residual is not None for link in made) == 4
        assert sum(link.norm is not None for link in made) == 5
        assert sum(link.gate is not None for link in made) == 2
    scale = np.abs(np.asarray(plain)).max()
    assert np.abs(np.asarray(found) - np.asarray(plain)).max() < 0.03 * scale
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.05, rtol=0.05
        ),
        state,
        plain_state,
    )


@pytest.mark.parametrize("name", SPECS)
def test_a_step_lowers_to_few_kernels(name):
    setup, params = setup_of(name)
    state, tail = setup.state(1, 64), setup.tail(1, "greedy")

    def text(decode: str) -> str:
        other = dataclasses.replace(setup, policy=dataclasses.replace(setup.policy, decode=decode))
        with targeting("gpu"):
            traced = jax.jit(decode_steps(other, mode="greedy", tokens=2))
            lowered = traced.trace(params, state, tail, None).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    few, plain = text("fused"), text("plain")
    packed = name == "packed"  # op by op each packed product is a kernel of its own
    assert kernel_calls(few) == SPECS[name][1] and kernel_calls(plain) == 8 * packed
    if packed:  # queries; the rest of a layer with the next queries; the last one's; the head
        assert kernel_calls(text("chained")) == 4
    # By itself: chains of products in bfloat16, a kernel for each of packed weights.
    by_itself = {"llama": 3, "packed": SPECS[name][1]}
    assert kernel_calls(text("auto")) == by_itself.get(name, kernel_calls(text("chained")))
    assert plain.count("stablehlo.rsqrt") == 5
    assert few.count("stablehlo.rsqrt") == SPECS[name][2]


def test_what_does_not_fit_runs_op_by_op_and_a_name_is_refused():
    same = lambda x: x  # noqa: E731
    assert fused(same, policy=POLICY, rows=1) is same  # this is a CPU
    named = dataclasses.replace(POLICY, decode="fused")
    with pytest.raises(UnsupportedError, match="for Hopper GPUs, this is cpu; use 'auto'"):
        fused(same, policy=named, rows=1)
    with targeting("gpu"):
        assert obstacle(POLICY) is None
        assert "bfloat16, not float32" in str(obstacle(Policy()))
        stacked = dataclasses.replace(POLICY, layout="scan")
        assert "array a layer" in str(obstacle(stacked))
        plain = dataclasses.replace(POLICY, decode="plain")
        assert fused(same, policy=plain, rows=1) is same
        assert fused(same, policy=POLICY, rows=AUTO_ROWS + 1) is same
        with taken() as heard:
            assert fused(same, policy=POLICY, rows=AUTO_ROWS) is not same
        assert heard["decode"] == {"chained"}
        assert fused(same, policy=named, rows=8) is not same
        assert fused(same, policy=named, rows=9) is same  # no step of few tokens


@pytest.mark.parametrize(("tokens", "kernels"), [(2, 11), (16, 2)])  # two of attention
def test_a_serving_step_of_few_tokens_lowers_to_few_kernels(tokens, kernels):
    setup, _ = setup_of("llama", decode="fused")
    memory = Memory(page_size=64, pages={"all": 4}, windows={"all": None}, slots=tokens)
    shape = Shape(tokens=tokens, rows=tokens, longest=1, context=128)
    program = step(setup, memory, shape)
    with targeting("gpu"):
        traced = jax.jit(program.build()).trace(*program.args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == kernels
