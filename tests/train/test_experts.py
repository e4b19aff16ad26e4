"""Experts in training: their losses, the rule that moves the balance bias, what a run says."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import flatten
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import Block, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, Router
from jaxllm.state.step import training_step
from jaxllm.train.config import Optimizer
from jaxllm.train.loop import train
from jaxllm.train.show import line
from jaxllm.train.step import batch_loss, init_state, train_step
from tests.contracts.specs import quick
from tests.train.runs import config_of, random_batch, small

NORM = Norm()
BIASED = MoE(
    experts=4,
    active=2,
    mlp=MLP(width=8),
    router=Router(score="sigmoid", renormalize=True, balance_bias=True),
)


def spec_of(moe=BIASED, layers="E*2"):
    attn = sub("attn", Attention(heads=2, kv_heads=1, head_dim=8), norm_in=NORM)
    mixture = Sub(ops=(NamedOp(name="moe", op=moe),), norm_in=NORM)
    return ModelSpec(
        vocab=40,
        width=16,
        blocks=(Block(name="E", subs=(attn, mixture)),),
        layers=layers,
        context=32,
        final_norm=NORM,
        head=Head(tied=True),
    )


SPEC = spec_of()
CONFIG = config_of(spec=SPEC)


def test_the_loss_adds_what_layers_lose():
    params, batch = api.init(SPEC, jax.random.key(0)), random_batch(CONFIG, 0)
    batch.weights[1] = 0  # the sums of a loss are by weight
    batch = jax.tree.map(jnp.asarray, batch)
    weights = {"load_balance": 0.5, "sequence_balance": 0.25, "router_z": 0.125}
    run = lambda params, **w: batch_loss(  # noqa: E731
        SPEC, params, batch, policy=Policy(), options=LossOptions(**w), key=None
    )
    both = quick(lambda p: (run(p, **dict.fromkeys(weights, 0.0)), run(p, **weights)))
    none, found = both(params)
    assert none.loss == none.nll == found.nll
    step = training_step(*batch.tokens.shape)
    apply = quick(lambda p: api.apply(SPEC, p, batch.tokens, step, policy=Policy())[2])
    losses = apply(params).losses
    wanted = sum(w * losses[name] for name, w in weights.items()) * batch.weights.sum()
    assert abs((found.loss - none.loss) / wanted - 1) < 1e-5
    assert losses["load_balance"] > 1.9  # at least 1 a layer
    assert sorted(found.stats) == [
        f"layers.{i}.moe.{what}" for i in (0, 1) for what in ("dropped", "load")
    ]
    for i in (0, 1):
        assert found.stats[f"layers.{i}.moe.load"].sum() == 2 * batch.tokens.size


def steps(count, *, parts=1, optimizer=None, **changes):
    """Parameters before and after some steps, and the metrics of the last."""
    make = optimizer or optax.adamw(1e-2, weight_decay=0.5)
    step = quick(
        train_step(
            SPEC,
            make,
            policy=Policy(),
            options=LossOptions(),
            schedule=optax.constant_schedule(1e-2),
            parts=parts,
            **({"balance_rate": 0.01} | changes),
        )
    )
    state = init_state(SPEC, make, np.uint32(3), policy=Policy())
    first, metrics = state.params, None
    for i in range(count):
        state, metrics = step(state, random_batch(CONFIG, i))
    return first, state.params, metrics


def bias_of(params):
    return params["layers"]["0:2"]["moe"]["balance_bias"]


def loads_of(params, batch):
    step = training_step(*batch.tokens.shape)
    apply = quick(lambda p: api.apply(SPEC, p, batch.tokens, step, policy=Policy())[2])
    stats = apply(params).stats
    return np.stack([stats[f"layers.{i}.moe.load"] for i in (0, 1)])


@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_bias_moves_by_its_rule_alone(parts):
    """From all rows of a step together, in whatever parts they were taken."""
    first, last, metrics = steps(1, parts=parts)
    load = loads_of(first, random_batch(CONFIG, 0))
    wanted = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
    assert np.array_equal(bias_of(last), wanted.astype(np.float32))
    assert np.abs(wanted).max() > 0
    share = load / load.sum(-1, keepdims=True)
    entropy = -(share * np.log(share)).sum(-1).mean()
    assert abs(metrics.router["load_entropy"] - entropy) < 1e-5
    assert abs(metrics.router["max_violation"] - (4 * share.max() - 1)) < 1e-5
    assert metrics.router["dropped"] == 0


def test_no_optimizer_touches_the_bias():
    """One that adds 1 to every parameter moves all others; decay does not pull at it either."""
    every = optax.GradientTransformation(
        lambda params: None, lambda g, s, p: (jax.tree.map(jnp.ones_like, g), s)
    )
    first, last, _ = steps(1, optimizer=every)
    assert np.abs(bias_of(last)).max() == np.float32(0.01)
    after = dict(flatten(last))
    still = {path for path, x in flatten(first) if np.abs(after[path] - x).min() < 0.5}
    assert still == {"layers.0:2.moe.balance_bias"}
    _, last, _ = steps(3, balance_rate=0.0)
    assert not np.any(bias_of(last))


@pytest.mark.slow
def test_a_step_that_is_not_taken_moves_no_bias():
    bad = optax.GradientTransformation(lambda p: None, lambda g, s, p: (g, s))
    step = quick(
        train_step(
            SPEC,
            bad,
            policy=Policy(),
            options=LossOptions(),
            schedule=optax.constant_schedule(1.0),
            balance_rate=0.01,
        )
    )
    state = init_state(SPEC, bad, np.uint32(3), policy=Policy())
    batch = random_batch(CONFIG, 0)
    batch = dataclasses.replace(batch, weights=np.full_like(batch.weights, np.nan))
    after, _ = step(state, batch)
    assert not np.any(bias_of(after.params))
    assert after.skipped == 1


def rows(folder):
    found = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, found) if "loss" in row]


RUN = {
    # One that a public config can say, for the files at the end of a run.
    "spec": spec_of(dataclasses.replace(BIASED, router=Router(renormalize=True))),
    "optimizer": Optimizer(learning_rate=1e-2, warmup_steps=2),
    "steps": 6,
    "eval_every": 6,
    "checkpoint_every": 3,
    "accumulate": 2,
    "balance_rate": 0.02,
}


def test_a_run_says_how_even_experts_are_and_resumes(tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 3, it goes on bit for bit: losses and loads alike."""
    from jaxllm.train import loop

    config = small(tmp_path, **RUN)
    train(config, quiet=True)
    whole = rows(config.out)
    assert all(0 < row["load_entropy"] <= np.log(4) + 1e-6 for row in whole)
    assert all(row["dropped"] == 0 and row["max_violation"] >= 0 for row in whole)
    said = line(whole[0], 6)
    assert f"load entropy {whole[0]['load_entropy']:.3f}" in said
    assert "max violation" in said
    again, stop = dataclasses.replace(config, out=str(tmp_path / "again")), loop._Run._write

    def stopping(self, step, metrics, params=None):
        stop(self, step, metrics, params)
        if step == 4:
            raise InterruptedError

    monkeypatch.setattr(loop._Run, "_write", stopping)
    with pytest.raises(InterruptedError):
        train(again, quiet=True)
    monkeypatch.undo()
    train(again, quiet=True)
    keys = ("step", "loss", "load_entropy", "max_violation")
    assert [[r[k] for k in keys] for r in rows(again.out)] == [[r[k] for k in keys] for r in whole]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2", "data=2,expert=4"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(tmp_path, mesh):
    plain, spread = (small(tmp_path, **RUN, batch=8), small(tmp_path, **RUN, batch=16, mesh=mesh))
    plain = dataclasses.replace(plain, batch=16)
    spread = dataclasses.replace(spread, out=str(tmp_path / "spread"))
    train(plain, quiet=True)
    train(spread, quiet=True)
    for one, other in zip(rows(plain.out), rows(spread.out), strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4
        assert abs(one["load_entropy"] - other["load_entropy"]) < 1e-3


@pytest.mark.slow
def test_a_capacity_counts_what_it_drops(tmp_path):
    config = small(tmp_path, **RUN, expert_capacity=0.5)
    train(config, quiet=True)
    assert all(row["dropped"] > 0 for row in rows(config.out))


WRONG = {
    "6 experts are no multiple of expert=4": {
        "spec": spec_of(dataclasses.replace(BIASED, experts=6)),
        "mesh": "expert=4",
    },
    "the model has no experts": {"mesh": "expert=2"},
    "data x fsdp x expert = 8": {"spec": SPEC, "mesh": "data=2,expert=4"},
    "is 9 wide, no multiple of tensor=2": {
        "spec": spec_of(dataclasses.replace(BIASED, mlp=MLP(width=9))),
        "mesh": "tensor=2",
    },
    "balance_rate is ≥ 0": {"balance_rate": -1.0},
    "expert_capacity is ≥ 0": {"expert_capacity": -0.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictions(message):
    with pytest.raises(ConfigError, match=message):
        config_of(**WRONG[message])


def test_the_bias_is_float32_in_narrow_runs():
    params = api.init(SPEC, jax.random.key(0), dtype=jnp.bfloat16)
    wide = {p for p, x in flatten(params) if x.dtype == np.float32}
    assert wide == {"layers.0:2.moe.balance_bias"}
