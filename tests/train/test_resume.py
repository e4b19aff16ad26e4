"""A run that stops and goes on is the run that never stopped, with every optimizer and option."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxllm
from jaxllm.data.loader import Data
from jaxllm.errors import CapacityError, WeightsError
from jaxllm.train import loop
from jaxllm.train.config import LossScale, Optimizer, SpikeRule
from jaxllm.train.loop import train
from tests.train.runs import small
from tests.train.test_run import losses, rows


def momentum(config, schedule):
    return optax.sgd(schedule, momentum=config.b1)


RATE = {"learning_rate": 1e-2, "warmup_steps": 3}
OPTIONS = {
    "adamw": {},
    "lion": {"optimizer": Optimizer(kind="lion", learning_rate=2e-3, warmup_steps=3)},
    "adafactor": {
        "optimizer": Optimizer(kind="adafactor", learning_rate=5e-2, warmup_steps=3),
        "mesh": "fsdp=2",
    },
    "muon": {"optimizer": Optimizer(kind="muon", **RATE), "mesh": "fsdp=2,tensor=2"},
    "custom": {
        "optimizer": Optimizer(kind="custom", build=momentum, learning_rate=0.3, warmup_steps=3)
    },
    "float16": {
        "dtype": "float16",
        "loss_scale": LossScale(initial=2.0**24, growth_interval=4),
        "spike": SpikeRule(warmup=4, threshold=3.0),
    },
}


class Stop(Exception):
    """What ends a run in the middle."""


SLOW = ("lion", "adafactor", "custom")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in OPTIONS]
)
def test_learns_and_resumes_bit_for_bit(tmp_path, monkeypatch, name):
    """Stopped after step 11, so that it goes on from the checkpoint of step 8."""
    config = small(tmp_path, steps=16, eval_every=8, checkpoint_every=4, **OPTIONS[name])
    train(config, quiet=True)
    whole = losses(config.out)
    assert whole[16] < whole[1] - 0.3
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    real = loop.Record.add

    def stop(self, row):
        if row.get("step") == 11:
            raise Stop
        real(self, row)

    monkeypatch.setattr(loop.Record, "add", stop)
    with pytest.raises(Stop):
        train(again, quiet=True)
    monkeypatch.undo()
    train(again, quiet=True)
    assert [r["resumed_from"] for r in rows(again.out) if "resumed_from" in r] == [8]
    volatile = ("tokens_per_s", "step_ms")
    for a, b in zip(rows_of_steps(config.out), rows_of_steps(again.out), strict=True):
        numbers = {k for k in a if k not in volatile and isinstance(a[k], (int, float))}
        assert {k: a[k] for k in numbers & set(b)} == {k: b[k] for k in numbers & set(b)}
    if name == "float16":
        assert rows_of_steps(config.out)[8]["skipped"] > 0


def rows_of_steps(folder):
    return [r for r in rows(folder) if "loss" in r]


def test_the_best_is_kept_and_exported(tmp_path, monkeypatch):
    """Validation losses 3, 1, 2, 4 at steps 3, 6, 9, 12: `model` is the parameters of step 6."""
    told = iter([3.0, 1.0, 2.0, 4.0])
    kept = {}
    real, write = loop._Run._save, loop._Run._write

    def tell(self, step, metrics, params=None):
        write(self, step, metrics, params)
        if params is not None:
            self.val_loss = next(told)

    def save(self, step, state, val_loss):
        kept[step] = np.asarray(state.params["embed"]["table"])
        real(self, step, state, val_loss)

    monkeypatch.setattr(loop._Run, "_write", tell)
    monkeypatch.setattr(loop._Run, "_save", save)
    config = small(tmp_path, eval_every=3, checkpoint_every=5, keep=1, keep_best=1, export="best")
    train(config, quiet=True)
    assert list(kept) == [3, 5, 6, 10, 12]
    found = {int(p.name) for p in (Path(config.out) / "checkpoints").iterdir()}
    assert found == {6, 12}
    model = jaxllm.load(config.out, store=False, dtype="float32")
    table = np.asarray(jax.tree.leaves(model.params["embed"])[0])
    table = table if table.shape == kept[6].shape else table.T
    np.testing.assert_array_equal(table, kept[6])
    assert not np.array_equal(kept[6], kept[12])


def test_a_run_that_is_never_finite_leaves_its_checkpoints_good(tmp_path, monkeypatch):
    """From step 5 on every loss is NaN: nothing of the state moves, all metrics stand in the file,
    what is saved meanwhile is the state of step 4, and sound data goes on from there."""
    saved = {}
    real, draw = loop._Run._save, Data.batch

    def save(self, step, state, val_loss):
        saved[step] = jax.device_get((state.params, state.opt_state))
        real(self, step, state, val_loss)

    def poisoned(self, step, **options):
        batch = draw(self, step, **options)
        bad = np.float32(np.nan if step >= 4 else 1.0)
        return dataclasses.replace(batch, weights=batch.weights * bad)

    monkeypatch.setattr(loop._Run, "_save", save)
    monkeypatch.setattr(Data, "batch", poisoned)
    config = small(tmp_path, steps=20, patience=6, checkpoint_every=2, eval_every=20)
    with pytest.raises(CapacityError, match="6 steps in a row"):
        train(config, quiet=True)
    found = rows_of_steps(config.out)
    assert [r["step"] for r in found] == list(range(1, 11))
    assert [r["skipped"] for r in found] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert list(saved) == [2, 4, 6, 8]
    for step in (6, 8):
        assert jax.tree.all(jax.tree.map(np.array_equal, saved[4], saved[step]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, saved[2], saved[4]))
    monkeypatch.undo()
    assert train(config, quiet=True).step == 20
    after = losses(config.out)
    assert all(math.isfinite(after[s]) for s in range(9, 21)) and after[20] < after[4]


def test_a_damaged_last_checkpoint_stops_the_run_and_says_what_to_do(tmp_path):
    config = small(tmp_path, steps=8)
    train(config, quiet=True)
    data = Path(config.out) / "checkpoints" / "8" / "state" / "ocdbt.process_0" / "d"
    file = max(data.iterdir(), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(WeightsError, match=r"checkpoint 8 .* damaged.*checkpoint 4 is whole"):
        train(config, quiet=True)
    assert (Path(config.out) / "checkpoints" / "8").exists()
