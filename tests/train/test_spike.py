"""The spike rule as a function of crafted losses, and in a run with a poisoned batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.loader import Data
from jaxllm.errors import ConfigError
from jaxllm.train import loop
from jaxllm.train.config import SpikeRule
from jaxllm.train.loop import train
from jaxllm.train.spike import judge, no_spikes
from tests.train.runs import small
from tests.train.test_run import rows

RULE = SpikeRule(threshold=4.0, decay=0.9, warmup=10, patience=3, floor=0.01)
NOISE = np.random.default_rng(0).normal(size=200)
CALM = [2.0 + 0.1 * x for x in NOISE]


def follow(values, rule=RULE, norms=None):
    """(whether each step is taken, statistics after the last)."""
    step = jax.jit(lambda stats, x, n: judge(stats, x, n, jnp.isfinite(x) & jnp.isfinite(n), rule))
    stats, taken = no_spikes(), []
    for value, norm in zip(values, norms or [1.0] * len(values), strict=True):
        calm, stats = step(stats, jnp.float32(value), jnp.float32(norm))
        taken.append(bool(calm))
    return taken, stats


def test_noise_is_no_spike():
    taken, stats = follow(CALM)
    assert all(taken) and int(stats.total) == 0 and int(stats.count) == 200


def test_the_statistics_are_exact_at_first_then_exponential():
    _, stats = follow(CALM[:8])
    assert float(stats.mean[0]) == pytest.approx(np.mean(CALM[:8]), rel=1e-5)
    assert float(stats.variance[0]) == pytest.approx(np.var(CALM[:8]), rel=1e-4)
    mean = np.mean(CALM[:10])
    variance = np.var(CALM[:10])
    for x in CALM[10:30]:
        variance = 0.9 * (variance + 0.1 * (x - mean) ** 2)
        mean += 0.1 * (x - mean)
    _, stats = follow(CALM[:30])
    assert float(stats.mean[0]) == pytest.approx(mean, rel=1e-5)
    assert float(stats.variance[0]) == pytest.approx(variance, rel=1e-3)


def test_a_leap_is_left_out_and_forgotten():
    values = [*CALM[:20], 3.5, *CALM[20:40]]
    taken, stats = follow(values)
    assert [i for i, t in enumerate(taken) if not t] == [20]
    _, without = follow(CALM[:40])
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()),
            stats,
            dataclasses.replace(without, total=stats.total),
        )
    )
    assert int(stats.total) == 1 and int(stats.row) == 0


def test_a_leap_of_the_gradient_alone_and_a_fall_of_the_loss():
    norms = [1.0 + 0.05 * x for x in NOISE[:30]]
    norms[25] = 1.5
    values = CALM[:30]
    values[27] = 0.5
    taken, _ = follow(values, norms=norms)
    assert [i for i, t in enumerate(taken) if not t] == [25]


def test_warm_up_leaves_nothing_out():
    taken, stats = follow([2.0] * 9 + [50.0])
    assert all(taken) and int(stats.total) == 0
    taken, _ = follow([2.0] * 10 + [50.0])
    assert taken[-1] is False


def test_a_constant_loss_has_a_floor_of_deviation():
    for last, calm in ((2.07, True), (2.09, False)):
        taken, _ = follow([2.0] * 20 + [last])
        assert taken[-1] is calm


def test_a_new_level_is_accepted_after_patience():
    high = [5.0 + 0.1 * x for x in NOISE[:60]]
    taken, stats = follow([*CALM[:40], *high])
    assert [i for i, t in enumerate(taken) if not t] == [40, 41, 42]
    assert int(stats.total) == 3
    assert float(stats.mean[0]) == pytest.approx(5.0, abs=0.1)
    assert int(stats.count) == 57


def test_what_is_not_finite_is_none_of_its_business():
    values = [*CALM[:20], math.nan, math.inf, *CALM[20:30]]
    taken, stats = follow(values)
    assert all(taken) and int(stats.total) == 0 and int(stats.count) == 30
    assert math.isfinite(float(stats.mean[0]))


def test_bad_rules():
    for changes in ({"threshold": 0.0}, {"decay": 1.0}, {"warmup": 1}, {"patience": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            SpikeRule(**changes)


def test_a_poisoned_batch_is_left_out(tmp_path, monkeypatch):
    """One batch of noise: its step leaves parameters and optimizer as they are."""
    rule = SpikeRule(threshold=4.0, decay=0.9, warmup=8, patience=3)
    saved = {}
    draw, real = Data.batch, loop._Run._save

    def poisoned(self, step, **options):
        batch = draw(self, step, **options)
        if step != 30:
            return batch
        noise = np.random.default_rng(0).integers(30, 40, batch.targets.shape).astype(np.int32)
        return dataclasses.replace(batch, targets=noise)

    def save(self, step, state, val_loss):
        saved[step] = jax.device_get((state.params, state.opt_state))
        real(self, step, state, val_loss)

    monkeypatch.setattr(Data, "batch", poisoned)
    monkeypatch.setattr(loop._Run, "_save", save)
    options = {"checkpoint_every": 31, "keep_every": 30, "eval_every": 33}
    config = small(tmp_path, steps=33, spike=rule, **options)
    train(config, quiet=True)
    found = [r for r in rows(config.out) if "loss" in r]
    assert [r["spikes"] for r in found] == [0] * 30 + [1] * 3
    assert [r["skipped"] for r in found] == [0] * 33
    assert found[30]["loss"] > found[29]["loss"] + 1.0
    assert list(saved) == [30, 31, 33]
    assert jax.tree.all(jax.tree.map(np.array_equal, saved[30], saved[31]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, saved[31], saved[33]))
