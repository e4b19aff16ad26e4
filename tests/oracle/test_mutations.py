"""Each feature flipped moves the logits far beyond the tolerance: the goldens tell them apart."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.tree import flatten, map_leaves, partition
from jaxllm.errors import WeightsError
from jaxllm.nn import api
from jaxllm.spec.mask import Causal, Full
from jaxllm.spec.ops import MLP
from jaxllm.spec.rope import LinearScaling, Llama3Scaling
from jaxllm.state.step import training_step
from tests.oracle.checks import check_moved
from tests.oracle.golden import TOLERANCE, golden, relative
from tests.oracle.mutate import FACTOR, POLICY, attn, change, logits, part, rope, window


def eps(factor):
    """All norms with a larger epsilon."""

    def mutate(spec):
        norm = dataclasses.replace(spec.final_norm, eps=spec.final_norm.eps * factor)
        blocks = tuple(
            dataclasses.replace(b, subs=tuple(dataclasses.replace(s, norm_in=norm) for s in b.subs))
            for b in spec.blocks
        )
        return dataclasses.replace(spec, blocks=blocks, final_norm=norm)

    return mutate


def llama3(**changes):
    """The scaling of `llama_gqa_scaled` with some of its numbers changed."""
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16
    }  # fmt: skip
    return rope(scaling=Llama3Scaling(**scaling | changes))


MUTATIONS = {
    ("llama_mha", "rope theta x 50"): rope(theta=5e5),
    ("llama_mha", "rope pairs 2i, 2i + 1"): rope(layout="interleaved"),
    ("llama_mha", "rope on half the dims"): rope(fraction=0.5),
    ("llama_mha", "no rope"): attn(rope=None),
    ("llama_mha", "rope scaled"): rope(scaling=LinearScaling(factor=2.0)),
    ("llama_mha", "the score's scale"): attn(scale=8**-0.5 * 1.05),
    ("llama_mha", "no mask"): attn(mask=Full()),
    ("llama_mha", "eps x 100"): eps(100),
    ("llama_mha", "norms act as 1 + w"): part("final_norm", offset=1.0),
    ("llama_mha", "a tied head"): part("head", tied=True),
    ("llama_mha", "the head's scale"): part("head", scale=1.01),
    ("llama_mha", "a soft cap on logits"): part("head", softcap=5.0),
    ("llama_mha", "the embedding's scale"): part("embedding", scale=32**0.5),
    ("llama_mha", "gelu"): lambda s: change(s, MLP, activation="gelu"),
    ("llama_mha", "relu"): lambda s: change(s, MLP, activation="relu"),
    ("llama_linear", "no scaling"): rope(scaling=None),
    ("llama_linear", "factor 4 -> 5"): rope(scaling=LinearScaling(factor=5.0)),
    ("llama_gqa_scaled", "no scaling"): rope(scaling=None),
    ("llama_gqa_scaled", "linear in place of it"): rope(scaling=LinearScaling(factor=8.0)),
    ("llama_gqa_scaled", "factor 8 -> 9"): llama3(factor=9.0),
    ("llama_gqa_scaled", "low_freq_factor 1 -> 1.25"): llama3(low_freq_factor=1.25),
    ("llama_gqa_scaled", "high_freq_factor 4 -> 5"): llama3(high_freq_factor=5.0),
    ("llama_gqa_scaled", "original context 16 -> 20"): llama3(original_context=20),
    ("mistral_window", "window 8 -> 9"): window(9),
    ("mistral_window", "window 8 -> 7"): window(7),
    ("mistral_window", "no window"): attn(mask=Causal()),
    ("mistral_full", "a window of 27 of 28 keys"): window(27),
    ("llama_bias", "gelu -> silu"): lambda s: change(s, MLP, activation="silu"),
    ("llama_odd", "gelu by tanh -> silu"): lambda s: change(s, MLP, activation="silu"),
}


@pytest.mark.parametrize("name", sorted({name for name, _ in MUTATIONS}))
def test_the_unchanged_spec_gives_the_golden_logits(name, models):
    model, want = models(name), golden(name)
    assert relative(logits(model.spec, model.params, want.ids), want.logits) < TOLERANCE


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    check_moved(models(name), MUTATIONS[name, what], name, what)


def test_the_two_gelus_are_told_apart(models):
    """They differ by less than 5e-4 anywhere, so this feature alone moves less than the others."""
    model, want = models("llama_odd"), golden("llama_odd")
    assert model.spec.block(0).subs[1].ops[0].op.activation == "gelu_tanh"
    spec = change(model.spec, MLP, activation="gelu")
    assert relative(logits(spec, model.params, want.ids), want.logits) > 20 * TOLERANCE


BIASES = {
    ("qwen2", "qkv"): (attn(qkv_bias=False), "qkv"),
    ("llama_bias", "qkv"): (attn(qkv_bias=False), "qkv"),
    ("llama_bias", "o"): (attn(out_bias=False), "o"),
    ("llama_bias", "mlp"): (lambda s: change(s, MLP, bias=False), ("gate", "up", "down")),
}


@pytest.mark.parametrize(("name", "which"), BIASES)
def test_a_bias_counts(name, which, models):
    model, want = models(name), golden(name)
    mutate, stems = BIASES[name, which]
    ends = tuple(f".{stem}_bias" for stem in stems)
    spec, (_, rest) = mutate(model.spec), partition(model.params, lambda p: p.endswith(ends))
    dropped = logits(spec, rest, want.ids)
    zeroed = map_leaves(lambda p, x: x * 0 if p.endswith(ends) else x, model.params)
    assert np.array_equal(dropped, logits(model.spec, zeroed, want.ids))
    assert relative(dropped, want.logits) > FACTOR * TOLERANCE
    with pytest.raises(WeightsError, match="is missing"):
        logits(model.spec, rest, want.ids)
    with pytest.raises(WeightsError, match="_bias"):
        logits(spec, model.params, want.ids)  # a leaf that the spec does not have


def test_every_vector_counts(models):
    """No norm or bias is left out: each of them moved a little moves the logits."""
    model, want = models("llama_bias"), golden("llama_bias")

    def moved(path):
        params = map_leaves(lambda p, x: x * 1.05 if p == path else x, model.params)
        return relative(logits(model.spec, params, want.ids), want.logits)

    paths = [path for path, _ in flatten(model.params) if path.endswith(("scale", "bias"))]
    assert len(paths) == 2 * (2 + 7) + 1
    # A key's bias shifts all scores of a query alike but for the rotation: the least of them.
    assert {p: m for p in paths if (m := moved(p)) < 10 * TOLERANCE} == {}


def test_queries_keep_to_their_keys(models):
    """Query head n reads key head n // G; n % K in its place is told apart."""
    model, want = models("llama_gqa_scaled"), golden("llama_gqa_scaled")
    op = model.spec.block(0).subs[0].ops[0].op
    order = np.arange(op.heads).reshape(op.kv_heads, -1).T.reshape(-1)
    axis = {"q": 1, "o": 0}

    def permute(path, leaf):
        dim = axis.get(path.rpartition("attn.")[2])
        return leaf if dim is None else jnp.take(leaf, order, axis=dim)

    moved = logits(model.spec, map_leaves(permute, model.params), want.ids)
    assert relative(moved, want.logits) > FACTOR * TOLERANCE


def test_positions_are_those_of_the_row(models):
    """Rows that start later give the same logits: rope sees differences alone."""
    model, want = models("llama_linear"), golden("llama_linear")
    ids = jnp.asarray(want.ids)
    shifted = jnp.broadcast_to(jnp.arange(5, 5 + ids.shape[1], dtype=jnp.int32), ids.shape)
    step = training_step(*ids.shape, positions=shifted)
    hidden, _, _ = api.apply(model.spec, model.params, ids, step, policy=POLICY)
    found = api.unembed(model.spec, model.params, hidden, policy=POLICY)
    assert relative(found, want.logits) < TOLERANCE
