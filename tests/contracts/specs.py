"""Toy models that together use every feature of a spec, and how tests run them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.policy import Matrices, Policy
from jaxllm.core.tree import Segment, map_leaves, restack
from jaxllm.nn import api
from jaxllm.spec.linear_attention import ConstantDecay, GatedDecay, OutNorm
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import (
    MLP,
    Convolution,
    InfiniAttention,
    LatentAttention,
    Linear,
    Memory,
    MoE,
    Norm,
    QKNorm,
    Router,
    Temperature,
)
from jaxllm.spec.rope import Rope
from jaxllm.spec.table import model_table
from jaxllm.state.step import training_step
from tests.contracts.encoders import ENCODERS
from tests.contracts.toys import (
    BARE,
    CHUNKS,
    CLAMPED,
    DUAL,
    GROUPED,
    INTERLEAVED,
    LAYER,
    LLAMA3,
    LOCAL,
    MLP48,
    NEAR,
    OFFSET,
    PARTIAL,
    PLAIN48,
    RMS,
    SEGMENTS,
    SELECTIVE,
    SOFTMAX,
    STREAMING,
    experts,
    heads,
    linear,
    model,
    pre,
)

SPECS: dict[str, ModelSpec] = {
    "mha": model(pre("G", heads(4, 4, rope=INTERLEAVED), MLP48), layers="G*3"),
    # Prefix, a unit of two repeated, suffix; a window; query/key/value biases.
    "gqa": model(
        pre("A", heads(4, 4, rope=None), MLP(width=32, activation="gelu_tanh")),
        pre("G", heads(4, 2, rope=LLAMA3, qkv_bias=True), MLP48),
        pre("L", heads(4, 2, mask=LOCAL, qkv_bias=True), MLP48),
        layers="A (L G)*2 L",
        head=Head(tied=True),
    ),
    "mqa_sandwich": model(
        Block(
            name="G",
            subs=(
                sub("attn", heads(4, 1, rope=PARTIAL, qkv_bias=True, out_bias=True, scale=0.5),
                    norm_in=OFFSET, norm_out=OFFSET),
                sub("mlp", MLP(width=48, gated=True, bias=True, activation="gelu"),
                    norm_in=OFFSET, norm_out=OFFSET),
            ),
        ),
        layers="G*2",
        final_norm=OFFSET,
        embedding=Embedding(scale=5.0),
        head=Head(tied=True, softcap=3.0),
    ),
    "post_layernorm": model(
        Block(
            name="G",
            subs=(
                sub("attn", heads(4, 4), norm_after=LAYER),
                sub("mlp", PLAIN48, norm_after=LAYER),
            ),
        ),
        layers="G*2",
        embedding=Embedding(positions=64),
        final_norm=None,
    ),
    # Attention and feed-forward in one residual update, then a second, scaled, with a norm an op.
    "parallel": model(
        Block(
            name="P",
            subs=(
                Sub(ops=(NamedOp(name="attn", op=heads(4, 2)), NamedOp(name="mlp", op=MLP48)),
                    norm_in=LAYER),
                Sub(
                    ops=(NamedOp(name="more", op=MLP(width=16, gated=False, activation="relu2"),
                                 norm_in=RMS),
                         NamedOp(name="other", op=MLP(width=8), norm_in=LAYER)),
                    scale=0.5,
                ),
            ),
        ),
        layers="P*2",
        head=Head(scale=0.25, softcap=5.0),
    ),
    "output_norm": model(
        Block(
            name="G",
            subs=(
                sub("attn", heads(4, 2), norm_out=RMS),
                sub("mlp", MLP(width=48, activation="relu"), norm_out=RMS),
            ),
        ),
        layers="G G*2",
        final_norm=Norm(type="layer"),
    ),
    # Norms of queries and keys (a head alone, all heads together), soft-cap, sinks, gate, chunks.
    "capped_gated": model(
        pre("L", heads(4, 2, qk_norm=QKNorm(offset=1.0), softcap=2.0, mask=LOCAL), MLP48),
        pre("G", heads(4, 2, qk_norm=QKNorm(over="full"), sinks=True, gate=True, mask=CHUNKS),
            MLP48),
        layers="(L G)*2",
        head=Head(tied=True),
    ),
    "l2_after_rope": model(
        pre("N", heads(4, 1, rope=None, qk_norm=QKNorm(type="layer", over="heads")), MLP48),
        pre("G", heads(4, 2, qk_norm=QKNorm(scale=False, after_rope=True), out_bias=True,
                       temperature=Temperature(scale=0.5, period=3.0)), MLP48),
        layers="N G*2",
    ),
    # Gated DeltaNet with convolutions and grouped keys, KDA with decays a channel.
    "delta": model(
        pre("K", linear(decay=GatedDecay(), delta=True, conv=4, activation="silu", l2_eps=1e-6,
                        out_norm=OutNorm(eps=1e-2), gate="silu"), MLP48),
        pre("C", linear(key_heads=4, decay=GatedDecay(over="channel", rank=3), delta=True,
                        beta_max=2.0, conv=2, l2_eps=1e-6, out_norm=OutNorm(eps=1e-2),
                        gate="sigmoid", gate_rank=5), MLP48),
        layers="K*2 C",
    ),
    # Performer, RetNet, linear transformer, GLA, and attention after them.
    "kernels": model(
        pre("P", linear(feature="favor", features=24, normalizer=1e-20), MLP48),
        # What goes past its ops is normed, and weighed.
        Block(
            name="R",
            subs=(
                sub("attn", linear(decay=ConstantDecay(), rope=NEAR, out_norm=OutNorm(over="full")),
                    norm_in=RMS, skip_normed=True, skip_scale=1.5, scale=0.5),
                sub("mlp", MLP48, norm_in=OFFSET, skip_scale=0.5),
            ),
        ),
        pre("E", linear(feature="elu1", normalizer=1e-6, scale=1.0, conv=3), MLP48),
        pre("A", linear(key_heads=1, decay=GatedDecay(over="channel", form="sigmoid",
                                                      temperature=2.0)), MLP48),
        pre("G", heads(4, 2), MLP48),
        layers="P R E A G",
    ),
    # Softmax over all and renormalised; sigmoid in groups with a balance bias, beside a gated MLP
    # that all tokens share.
    "moe": model(
        experts("E", SOFTMAX, norm=RMS),
        experts("S", GROUPED, shared=MLP(width=24, out_gate=True)),
        layers="E S*2",
    ),
    # Latent attention: queries from a short vector or not; a rope of pairs side by side, not, none.
    "latent": model(
        pre("A", LatentAttention(heads=4, kv_rank=12, q_rank=10, nope_dim=6, rope_dim=4, v_dim=5,
                                 bias=True, rope=Rope(theta=100.0, layout="interleaved")), MLP48),
        pre("B", LatentAttention(heads=2, kv_rank=16, nope_dim=8, rope_dim=6, v_dim=8, scale=0.4,
                                 rope=NEAR, mask=LOCAL), MLP48),
        pre("N", LatentAttention(heads=2, kv_rank=8, nope_dim=3, rope_dim=5, v_dim=4, rope=None),
            MLP48),
        layers="A B*2 N",
    ),
    # Softmax over the chosen; clamps, gain, offset and biases; weights on what goes in, and
    # a latent width.
    "moe_clamped": model(
        experts("E", CLAMPED),
        experts("I", MoE(experts=4, active=2, mlp=MLP(width=16, gated=False, activation="relu2"),
                         router=Router(score="sigmoid", weigh_inputs=True), latent=20,
                         latent_bias=True)),
        layers="(E I)*2",
        head=Head(tied=True),
    ),
    # Recurrences beside attention, norms inside, and layers of one op each.
    "selective": model(
        Block(
            name="S",
            subs=(sub("ssm", SELECTIVE, norm_in=RMS), sub("mlp", MLP(width=24), norm_in=RMS)),
        ),
        Block(name="A", subs=(sub("attn", heads(4, 2, rope=None), norm_in=RMS),)),
        Block(name="C", subs=(sub("conv", Convolution(channels=32, bias=True), norm_in=RMS),)),
        layers="(S A)*2 C",
    ),
    "dual": model(
        Block(name="M", subs=(sub("ssm", DUAL, norm_in=RMS),)),
        Block(
            name="P",
            subs=(
                Sub(ops=(NamedOp(name="ssm", op=BARE, scale=0.5),
                         NamedOp(name="attn", op=heads(4, 2), scale_in=1.5)), norm_in=RMS),
                sub("mlp", MLP(width=24, gate_scale=0.5), norm_in=RMS),
            ),
        ),
        layers="M*2 P",
        head=Head(tied=True),
    ),
    # Memories of product keys: one table for two layers, gated; and one of a layer's own.
    "memory": model(
        Block(
            name="M",
            subs=(
                sub("attn", heads(4, 2), norm_in=RMS),
                sub("mem", Memory(heads=2, keys=6, active=3, key_dim=8, value_dim=12, gated=True,
                                  share="pool"), norm_in=RMS),
            ),
        ),
        Block(name="P", subs=(sub("mem", Memory(heads=3, keys=4, active=5, key_dim=6,
                                                query_norm=False), norm_in=RMS),)),
        layers="(M P)*2",
    ),
    # Attention and MLP that read the embedding too and go into what the recurrence reads: two sets
    # of parameters, each for two layers, which have adapters of their own.
    "shared": model(
        Block(name="M", subs=(sub("ssm", BARE, norm_in=RMS),)),
        *(
            Block(
                name=name,
                subs=(
                    sub("attn", heads(4, 4, out_width=32, adapter_rank=3, scale=0.5), norm_in=RMS,
                        reads="embedded", aside=True, share=name),
                    sub("mlp", MLP(width=24, activation="gelu", adapter_rank=2), norm_in=OFFSET,
                        reads="aside", aside=True, share=name),
                    sub("linear", Linear(), reads="aside", aside=True, scale=0.5),
                    sub("ssm", BARE, norm_in=RMS, reads="sum"),
                ),
            )
            for name in ("A", "B")
        ),
        layers="M (A M B)*2",
        head=Head(tied=True),
    ),
    # Segments of 4 and 5 tokens beside a memory of those before, with the delta rule and without.
    "infini": model(
        Block(name="D", subs=(sub("attn", InfiniAttention(local=heads(4, 2, mask=SEGMENTS)),
                                  norm_in=RMS),)),
        Block(name="N", subs=(sub("attn", InfiniAttention(local=heads(2, 2, mask=CHUNKS),
                                                          delta=False), norm_in=RMS),)),
        layers="(D N)*2",
    ),
    # The first tokens stay in sight of a window.
    "streaming": model(pre("G", heads(4, 2, mask=STREAMING), MLP48), layers="G*2"),
    **ENCODERS,
}  # fmt: skip
NAMES = tuple(SPECS)
DECODERS = tuple(name for name in NAMES if name not in ENCODERS)
# No attention: quick to compile where the layers' work does not matter. Prefix and a unit of two.
SMALL = model(
    *(Block(name=n, subs=(sub("mlp", PLAIN48, norm_in=RMS, norm_out=OFFSET),)) for n in "AB"),
    layers="A (A B)*2",
)
BATCH, LENGTH = 4, 12


def redraw(spec: ModelSpec, seed: int = 0) -> dict[str, Any]:
    """Canonical parameters in which everything bites: no norm stays at 1 and no bias at 0."""
    random = np.random.default_rng(seed)

    def leaf(_: str, d: Any) -> Any:
        noise = random.standard_normal(d.shape).astype(np.float32)
        return noise * np.float32(d.std) if d.std else np.float32(d.fill) + 0.3 * noise

    return map_leaves(leaf, model_table(spec))


@functools.cache
def params(name: str) -> Any:
    """Canonical parameters of a toy, on the host: taking them apart compiles nothing."""
    return redraw(SPECS[name])


def tokens(name: str, batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    """Token ids [B, T]."""
    random = np.random.default_rng(7)
    return random.integers(0, SPECS[name].vocab, (batch, length), dtype=np.int32)


def quick(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit`, compiled without LLVM's optimiser: these programs run a few times only."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def forward(spec: ModelSpec, policy: Policy | None = None) -> Callable[..., Any]:
    """(params, ids or `Inputs`, step or None) -> (logits, aux) of whole sequences."""
    policy = policy or Policy()

    def run(weights: Any, inputs: Any, step: Any = None) -> Any:
        if step is None:
            step = training_step(*getattr(inputs, "ids", inputs).shape)
        hidden, _, aux = api.apply(spec, weights, inputs, step, policy=policy)
        adapters = step.adapter_ids
        return api.unembed(spec, weights, hidden, policy=policy, adapter_ids=adapters), aux

    return run


def loss(spec: ModelSpec, policy: Policy | None = None) -> Callable[..., Any]:
    """(params, ids) -> (mean next-token loss, logits)."""
    run = forward(spec, policy)

    def mean(weights: Any, ids: jax.Array) -> Any:
        logits, _ = run(weights, ids)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean(), logits

    return mean


@functools.cache
def runner(name: str) -> Callable[..., Any]:
    """`forward` of a toy, compiled once a layout for all tests of a process."""
    return quick(forward(SPECS[name]))


@functools.cache
def full(name: str) -> np.ndarray:
    """Logits [B, T, V] of the toy's tokens: one canonical forward pass."""
    logits, _ = runner(name)(params(name), tokens(name))
    return np.asarray(logits)


@functools.cache
def gradient(name: str) -> tuple[float, np.ndarray, Any]:
    """(loss, logits, gradient) of the toy's tokens on one device."""
    step = quick(jax.value_and_grad(loss(SPECS[name]), has_aux=True))
    (value, logits), grads = step(params(name), tokens(name))
    return float(value), np.asarray(logits), jax.tree.map(np.asarray, grads)


def held(spec: ModelSpec, weights: Any, matrices: Matrices = "out_in") -> Any:
    """Parameters with their matrices held as a run may want them, on the host again."""
    policy = Policy(matrices=matrices)
    return jax.tree.map(np.asarray, quick(lambda w: api.hold(spec, w, policy))(weights))


def single(weights: Any, layers: int) -> Any:
    """The same parameters, one entry a layer."""
    return restack(weights, tuple(Segment(i, i + 1, 1, stacked=False) for i in range(layers)))


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` relative to the largest magnitude of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        limit = tolerance * max(1.0, np.abs(b).max(initial=0.0))
        assert np.abs(a - b).max(initial=0.0) <= limit


def assert_equal(found: Any, wanted: Any) -> None:
    """Bit for bit the same trees."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(np.asarray(a), np.asarray(b))
