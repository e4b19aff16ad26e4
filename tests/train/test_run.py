"""A training run: its directory, its resumption, its bad inputs."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.spec.model import Head
from jaxllm.train import loop
from jaxllm.train.config import LossScale, Optimizer
from jaxllm.train.loop import open_run, train
from tests.train.runs import TEXT, small


def rows(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str | Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in rows(folder) if "loss" in r}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, result) of an uninterrupted run."""
    config = small(tmp_path_factory.mktemp("whole"))
    return config, train(config, quiet=True)


def test_the_run_directory(whole):
    config, result = whole
    folder = Path(config.out)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "model",
        "summary.json",
        "tensorboard",
    }
    found = rows(folder)
    assert [r["step"] for r in found] == list(range(1, 13))
    assert [r["step"] for r in found if "val_loss" in r] == [6, 12]
    wanted = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_ms", "skipped"}
    assert all(wanted <= set(r) for r in found)
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    assert result.step == 12 and result.val_loss == found[-1]["val_loss"]
    assert [r["lr"] for r in found[:3]] == pytest.approx([1e-2 / 3, 1e-2 / 3 * 2, 1e-2], rel=1e-6)


def test_a_finished_run_is_a_source(whole):
    config, result = whole
    model = jaxllm.load(config.out, store=False)
    answer = model.generate("the quick", max_tokens=5, temperature=0.0)
    assert len(answer.token_ids) == 5 and len(answer.text) == 5
    ids = np.asarray(model.tokenizer.encode(TEXT[-17:]))[None]
    logits = model.logits(ids[:, :-1])
    top = logits - logits.max(-1, keepdims=True)
    nll = np.log(np.exp(top).sum(-1)) - np.take_along_axis(top, ids[:, 1:, None], -1)[..., 0]
    assert nll.mean() == pytest.approx(result.val_loss, abs=0.7)


def test_an_interrupted_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
    """Killed after step 7: resumed from 4, all losses equal, each step once."""
    config = small(tmp_path)
    real = loop._Run._write

    def die(self, step, metrics, params=None):
        if step == 7:
            raise KeyboardInterrupt
        real(self, step, metrics, params)

    monkeypatch.setattr(loop._Run, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.undo()
    train(config, quiet=True)
    found = rows(config.out)
    assert [r["resumed_from"] for r in found if "resumed_from" in r] == [4]
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 13))
    assert losses(config.out) == losses(whole[0].out)


def test_sigterm_saves_and_returns(whole, tmp_path, monkeypatch):
    config = small(tmp_path)
    real = loop._Run._write

    def tell(self, step, metrics, params=None):
        real(self, step, metrics, params)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Run, "_write", tell)
    result = train(config, quiet=True)
    assert 5 < result.step < 12
    assert not (Path(config.out) / "model").exists()
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert (summary["step"], summary["finished"]) == (result.step, False)
    assert (Path(config.out) / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(WeightsError, match="not finished"):
        jaxllm.load(config.out)
    monkeypatch.undo()
    resumed = train(config, quiet=True)
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [result.step]
    assert losses(config.out) == losses(whole[0].out)
    known = {name: whole[1].summary[name] for name in ("step", "tokens", "val_loss", "val_step")}
    assert known.items() <= resumed.summary.items() and resumed.summary["finished"]
    assert resumed.summary["best_val_loss"] == whole[1].summary["best_val_loss"]


def test_accumulation_gives_the_same_losses(whole, tmp_path):
    config = small(tmp_path, accumulate=2)
    train(config, quiet=True)
    found, wanted = losses(config.out), losses(whole[0].out)
    assert max(abs(found[s] - wanted[s]) for s in wanted) < 2e-5


def test_the_fast_layout_learns_and_exports_the_model_that_it_trained(tmp_path):
    """Unrolled layers, fused projections, bfloat16, dropout: the model has its parts apart."""
    config = small(
        tmp_path, dropout=0.1, dtype="bfloat16", layout="unrolled", fused=True, remat="save_dots"
    )
    result = train(config, quiet=True)
    found = losses(config.out)
    assert found[12] < found[1] - 0.2
    model = jaxllm.load(config.out)
    assert model.leaf("layers.1.attn.k").shape == (16, 1, 8)
    rows = open_run(config).validation_batches(rows=4, count=2)
    nll = [
        -np.take_along_axis(log_softmax(model.logits(b.tokens)), b.targets[..., None], -1).mean()
        for b in rows
    ]
    assert abs(np.mean(nll) - result.val_loss) < 0.01


def test_float16_scales_its_loss(tmp_path):
    """Far too large a scale falls until the gradient is finite, then grows again."""
    scaling = LossScale(initial=2.0**40, growth_interval=4)
    config = small(tmp_path, dtype="float16", loss_scale=scaling, steps=60, patience=40)
    train(config, quiet=True)
    found = [r for r in rows(config.out) if "loss" in r]
    scales = [r["loss_scale"] for r in found]
    skipped = found[-1]["skipped"]
    assert skipped >= 10 and scales[:3] == [2.0**40, 2.0**39, 2.0**38]
    assert any(b == 2 * a for a, b in itertools.pairwise(scales))
    assert all(b in (a, 2 * a, a / 2) for a, b in itertools.pairwise(scales))
    assert found[-1]["loss"] < found[0]["loss"] - 0.3


def test_float16_with_a_fitting_scale_skips_nothing(whole, tmp_path):
    config = small(tmp_path, dtype="float16", loss_scale=LossScale(initial=256.0))
    train(config, quiet=True)
    found, wanted = losses(config.out), losses(whole[0].out)
    assert rows(config.out)[-1]["skipped"] == 0
    assert max(abs(found[s] - wanted[s]) for s in wanted) < 0.02


def test_a_loss_that_is_never_finite_stops_the_run(tmp_path):
    optimizer = Optimizer(learning_rate=1e30, warmup_steps=0, clip=0.0, weight_decay=0.0)
    config = small(tmp_path, optimizer=optimizer, patience=3, steps=30)
    with pytest.raises(CapacityError, match="3 steps in a row"):
        train(config, quiet=True)
    # What is not finite is null: JSON has no NaN, which Python would write and others not read.
    assert rows(config.out)[-1]["grad_norm"] is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": None}, "--data"),
        ({"data": "/nowhere/at/all.txt"}, "/nowhere/at/all.txt"),
        ({"length": 33}, "context of 32"),
        ({"batch": 5, "accumulate": 2}, "accumulate"),
        ({"steps": 0}, "steps"),
        ({"validation_fraction": 0.001}, "validation part"),
        ({"log_every": -1}, "log_every is ≥ 0"),
        ({"sample_every": -1}, "sample_every is ≥ 0"),
        ({"sample_tokens": 0}, "sample_tokens is at least 1"),
        ({"sample_every": 1, "sample_prompt": ""}, "sample_prompt is empty"),
        ({"profile": "10"}, "FIRST:LAST"),
        ({"profile": "a:b"}, "FIRST:LAST"),
        ({"profile": "0:3"}, "FIRST:LAST"),
        ({"profile": "5:4"}, "FIRST:LAST"),
        ({"profile": "13:14"}, "only 12 steps"),
    ],
)
def test_contradictions(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        train(small(tmp_path, **changes), quiet=True)


def test_a_vocabulary_that_is_too_small(tmp_path):
    config = small(tmp_path)
    spec = dataclasses.replace(config.spec, vocab=10)
    with pytest.raises(ConfigError, match="vocabulary"):
        train(dataclasses.replace(config, spec=spec), quiet=True)


def test_a_directory_of_another_model(whole, tmp_path):
    config, _ = whole
    spec = dataclasses.replace(config.spec, head=Head(tied=False))
    with pytest.raises(ConfigError, match="another model"):
        train(dataclasses.replace(config, spec=spec), quiet=True)


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    config = small(tmp_path, steps=4)
    train(config, quiet=True)
    saved = Path(config.out) / "checkpoints" / "4"
    for file in [p for p in saved.rglob("*") if p.is_file()]:
        file.write_bytes(b"")
    with pytest.raises(WeightsError, match="checkpoint 4"):
        train(dataclasses.replace(config, steps=8), quiet=True)
