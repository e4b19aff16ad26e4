"""Routers, balance losses and grouped products against float64, in value and gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.ops.grouped import grouped_product
from jaxllm.ops.moe import Dispatch, mix, plan
from jaxllm.ops.routing import (
    Routing,
    balance_step,
    load_balance,
    load_entropy,
    loads,
    max_violation,
    route,
    router_z,
)
from jaxllm.spec.ops import MLP, MoE, Router
from tests.ops.routing_oracle import alone, choose

RANDOM = np.random.default_rng(11)
OP = MoE(experts=8, active=3, mlp=MLP(width=4))
ROUTERS = {
    "softmax": {},
    "renormalised": {"renormalize": True, "scale": 2.5},
    "chosen": {"over_chosen": True},
    "sigmoid": {"score": "sigmoid"},
    "groups by two": {"score": "sigmoid", "groups": 4, "groups_kept": 2, "renormalize": True},
    "groups by one": {"groups": 4, "groups_kept": 2, "group_score": "one", "scale": 16.0},
    "bias": {"score": "sigmoid", "groups": 2, "balance_bias": True, "renormalize": True},
    "bias on softmax": {"balance_bias": True},
}


def draw(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ROUTERS)
def test_choices_and_weights_are_those_of_the_oracle(name):
    op, logits, bias = alone(OP, **ROUTERS[name]), draw(5, 7, 8), draw(8) / 4
    found = route(jnp.asarray(logits), op, bias if op.router.balance_bias else None)
    for place in np.ndindex(5, 7):
        chosen, weights = choose(op, logits[place].astype(np.float64), bias)
        order, wanted = np.argsort(found.experts[place]), np.argsort(chosen)
        assert found.experts[place][order].tolist() == chosen[wanted].tolist()
        assert np.abs(found.weights[place][order] - weights[wanted]).max() < 1e-6 * weights.max()
    assert np.abs(np.sum(found.shares, axis=-1) - 1).max() < 1e-6


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_have_the_slope_of_the_oracle(name):
    op, logits, bias = alone(OP, **ROUTERS[name]), draw(1, 1, 8), draw(8) / 4
    use = bias if op.router.balance_bias else None
    pull = draw(8)

    def value(x):
        routing = route(x, op, use)
        return jnp.sum(routing.weights * jnp.asarray(pull)[routing.experts])

    def wide(x):
        chosen, weights = choose(op, x, bias)
        return weights @ pull[chosen].astype(np.float64)

    found, x = jax.grad(value)(jnp.asarray(logits))[0, 0], logits[0, 0].astype(np.float64)
    for i, step in enumerate(np.eye(8) * 1e-6):
        slope = (wide(x + step) - wide(x - step)) / 2e-6
        assert abs(found[i] - slope) < 1e-5 * max(1.0, abs(op.router.scale))


def test_the_balance_bias_has_no_gradient():
    op = alone(OP, balance_bias=True)
    total = lambda bias: jnp.sum(route(jnp.asarray(draw(2, 3, 8)), op, bias).weights)  # noqa: E731
    assert not np.any(jax.grad(total)(jnp.asarray(draw(8))))


def balanced(count, active, tokens):
    """Choices that are spread evenly, with equal shares."""
    experts = (np.arange(tokens * active) % count).reshape(1, tokens, active).astype(np.int32)
    shares = np.full((1, tokens, count), 1 / count, np.float32)
    return Routing(jnp.asarray(experts), None, jnp.asarray(shares))


def test_scale_of_the_balance_loss():
    """1 where all is even, E where one expert has all, whatever A is."""
    assert abs(load_balance(balanced(8, 3, 16)) - 1) < 1e-6
    shares = np.zeros((2, 5, 8), np.float32)
    shares[..., 2] = 1
    one = Routing(jnp.full((2, 5, 1), 2), None, jnp.asarray(shares))
    assert abs(load_balance(one) - 8) < 1e-6


@pytest.mark.parametrize("by_row", [False, True])
def test_balance_loss_in_float64(by_row):
    """By hand, padding out; the gradient goes through the shares alone."""
    op, logits = alone(OP), draw(3, 6, 8)
    real = np.arange(6)[None] < np.array([[6], [4], [0]])

    def wide(logits):
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.argsort(-LOGITS, axis=-1)[..., :3]
        rows = [(r,) for r in (0, 1)] if by_row else [(0, 1)]
        each = []
        for group in rows:
            mine = [(r, t) for r in group for t in range(6) if real[r, t]]
            f = np.bincount(np.concatenate([chosen[i] for i in mine]), minlength=8) / 3 / len(mine)
            each.append(8 * f @ np.mean([shares[i] for i in mine], axis=0))
        return np.mean(each)

    LOGITS = logits.astype(np.float64)
    loss = lambda x: load_balance(route(x, op), jnp.asarray(real), by_row=by_row)  # noqa: E731
    found, slope = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert abs(found - wide(LOGITS)) < 1e-6
    assert not np.any(slope[2]) and not np.any(slope[1, 4:])
    for place in ((0, 0, 0), (1, 3, 7), (0, 5, 2)):
        step = np.zeros_like(LOGITS)
        step[place] = 1e-5
        wanted = (wide(LOGITS + step) - wide(LOGITS - step)) / 2e-5
        assert abs(slope[place] - wanted) < 1e-6


def test_router_z_in_float64():
    logits, real = draw(2, 4, 8), np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    log_sum = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    found, slope = jax.value_and_grad(router_z)(jnp.asarray(logits), jnp.asarray(real))
    assert abs(found - (log_sum**2)[real].mean()) < 1e-5
    share = np.exp(logits - log_sum[..., None])
    assert (
        np.abs(slope - np.where(real[..., None], 2 * log_sum[..., None] * share / 5, 0)).max()
        < 1e-6
    )


def test_statistics():
    experts = jnp.asarray([[[0, 1], [0, 2], [0, 3]]], jnp.int32)
    found = loads(experts, 4, jnp.asarray([[True, True, False]]))
    assert found.tolist() == [[2, 1, 1, 0]]
    assert abs(load_entropy(jnp.full(4, 5.0)) - math.log(4)) < 1e-6
    assert abs(load_entropy(jnp.asarray([0.0, 7, 0, 0]))) < 1e-6
    assert abs(max_violation(jnp.asarray([6.0, 1, 1, 0])) - 2) < 1e-6
    assert max_violation(jnp.zeros(4)) == -1


def test_the_balance_bias_moves_towards_even_loads():
    moved = balance_step(jnp.zeros(4), jnp.asarray([5.0, 2, 2, 3]), 1e-3)
    assert np.allclose(moved, [-1e-3, 1e-3, 1e-3, 0])
    op = alone(OP, score="sigmoid", balance_bias=True)
    logits = jnp.asarray(draw(4, 64, 8) + 2 * draw(8))
    bias, step = jnp.zeros(8), jax.jit(lambda b: jnp.sum(loads(route(logits, op, b).experts, 8), 0))
    first = float(max_violation(step(bias)))
    for _ in range(200):
        bias = balance_step(bias, step(bias), 5e-3)
    assert first > 0.5
    assert float(max_violation(step(bias))) < 0.1


@pytest.mark.parametrize("sizes", [(5, 0, 9, 26), (0, 0, 0, 0), (40, 0, 0, 0), (1, 70, 3, 6)])
def test_grouped_products_and_their_gradients(sizes):
    rows = max(sum(sizes), 40)
    x, w, pull = draw(rows, 6), draw(4, 6, 5), draw(rows, 5)
    counts = jnp.asarray(sizes, jnp.int32)
    owner = np.repeat(np.arange(4), sizes)
    used = len(owner)

    def value(x, w):
        return jnp.sum(grouped_product(x, w, counts, precision="highest") * pull)

    y = grouped_product(jnp.asarray(x), jnp.asarray(w), counts, precision="highest")
    wanted = np.zeros((rows, 5))
    wanted[:used] = np.einsum("ri,rio->ro", x[:used].astype(np.float64), w[owner])
    assert np.abs(y - wanted).max() < 1e-5
    d_x, d_w = jax.grad(value, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(w))
    wanted_x, wanted_w = np.zeros((rows, 6)), np.zeros((4, 6, 5))
    wanted_x[:used] = np.einsum("ro,rio->ri", pull[:used].astype(np.float64), w[owner])
    np.add.at(wanted_w, owner, np.einsum("ri,ro->rio", x[:used], pull[:used]))
    assert np.abs(d_x - wanted_x).max() < 1e-5
    assert np.abs(d_w - wanted_w).max() < 1e-4


def test_a_plan_puts_each_pair_into_one_row_of_its_group():
    groups = jnp.asarray([2, 0, 3, 2, 1, 4, 2, 0], jnp.int32)  # 4 is none of 4 groups
    held = plan(groups, 4)
    assert held.sizes.tolist() == [2, 1, 3, 1]
    assert held.source.tolist() == [1, 7, 4, 0, 3, 6, 2, 5]
    assert held.kept.tolist() == [True] * 5 + [False] + [True] * 2
    assert held.source[held.place].tolist() == list(range(8))
    bounded = plan(groups, 4, 2)
    assert bounded.source.tolist() == [1, 7, 4, 8, 0, 3, 2, 8]
    assert bounded.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert bounded.kept.tolist() == [True] * 5 + [False, False, True]  # the third of group 2 is out


@pytest.mark.parametrize("slots", [None, 1, 2, 4, 64])
def test_a_capacity_drops_the_last_comers_alone(slots):
    """With room for all nothing changes; else the first tokens of each expert stay."""
    x, w = draw(24, 6), draw(4, 6, 6)
    experts = np.stack([RANDOM.permutation(4)[:2] for _ in range(24)]).astype(np.int32)
    weights = RANDOM.random((24, 2)).astype(np.float32)

    def run(rows, owner, sizes):
        return jnp.einsum("ri,rio->ro", rows, jnp.asarray(w)[owner], precision="highest")

    job = Dispatch(count=4, slots=slots)
    routing = Routing(jnp.asarray(experts), jnp.asarray(weights), None)
    y, dropped = mix(jnp.asarray(x), routing, run, job)
    taken, wanted, lost = np.zeros(4, int), np.zeros((24, 6)), 0
    for token, choice in np.ndindex(24, 2):
        expert = experts[token, choice]
        taken[expert] += 1
        if slots is not None and taken[expert] > slots:
            lost += 1
        else:
            wanted[token] += weights[token, choice] * (x[token].astype(np.float64) @ w[expert])
    assert np.abs(y - wanted).max() < 1e-5
    assert dropped == lost
    assert (lost > 0) == (slots in (1, 2, 4))


WRONG = {
    "experts is positive": lambda: dataclasses.replace(OP, experts=0),
    "active is 1 to 8": lambda: dataclasses.replace(OP, active=9),
    "no multiple of the router's groups 3": lambda: alone(OP, groups=3),
    "active is 1 to 2": lambda: alone(OP, groups=4, groups_kept=1),
    "no two largest": lambda: alone(OP, groups=8, groups_kept=3),
    "groups_kept is 1 to groups": lambda: Router(groups=2, groups_kept=3),
    "scale is positive": lambda: Router(scale=0.0),
    "over_chosen is for softmax": lambda: Router(score="sigmoid", over_chosen=True),
    "no out_gate": lambda: dataclasses.replace(OP, mlp=MLP(width=4, out_gate=True)),
    "clamp is positive": lambda: MLP(width=4, clamp=0.0),
    "gain 2.0 is of silu": lambda: MLP(width=4, gain=2.0, activation="gelu"),
    "up_offset 1.0 needs a gate": lambda: MLP(width=4, gated=False, up_offset=1.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictions(message):
    with pytest.raises(ConfigError, match=message):
        WRONG[message]()
