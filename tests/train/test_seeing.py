"""A run seen whole: samples, summary, profile, interruption, calls from a notebook."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import jaxllm
from jaxllm.aot import counter
from jaxllm.cli.main import main
from jaxllm.data.tokens import byte_tokenizer
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.train import loop
from jaxllm.train.devices import row_flops
from jaxllm.train.loop import train
from jaxllm.train.samples import Sampler
from jaxllm.train.stop import Stop
from tests.house.tree import ROOT
from tests.train.runs import small
from tests.train.test_run import losses, rows
from tests.train.test_trackers import events


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, result) of a run with all there is to see."""
    folder = tmp_path_factory.mktemp("seen")
    config = small(
        folder, sample_every=5, sample_prompt="the ", sample_tokens=20, profile="3:4", log_every=4
    )
    return config, train(config, quiet=True)


def lines(config, name):
    return [json.loads(text) for text in (Path(config.out) / name).read_text().splitlines()]


def test_nothing_compiles_after_the_first_step(whole):
    """Validation, samples, checkpoints, export and the picture included."""
    _, result = whole
    assert result.summary["late_compilations"] == 0


def test_late_compilations_are_seen(whole, tmp_path, monkeypatch):
    import jax

    real = loop._Run._write

    def compiles(self, step, metrics, params=None):
        real(self, step, metrics, params)
        jax.jit(lambda x: x + step)(1.0)

    monkeypatch.setattr(loop._Run, "_write", compiles)
    config = dataclasses.replace(whole[0], out=str(tmp_path / "run"), sample_every=0, profile="")
    assert train(config, quiet=True).summary["late_compilations"] > 0


def test_samples(whole):
    config, _ = whole
    found = lines(config, "samples.jsonl")
    assert [s["step"] for s in found] == [5, 10]
    assert all(s["prompt"] == "the " and s["tokens"] == 20 and s["text"] for s in found)


@pytest.fixture(params=["", "data=2,fsdp=2,tensor=2"], ids=["one device", "eight"])
def sampled(request, tmp_path, monkeypatch):
    """(config, result, compilations of each sample) on a device of 1 GFLOP/s, or on eight."""
    made, real = [], Sampler.draw

    def draw(self, params):
        before = counter.compilations()
        sample = real(self, params)
        made.append(counter.compilations() - before)
        return sample

    monkeypatch.setattr(Sampler, "draw", draw)
    monkeypatch.setattr(loop, "peak_flops", lambda kind, dtype: {"float32": 1e9}[dtype])
    batch = {"batch": 8} if request.param else {}
    config = small(tmp_path, mesh=request.param, sample_every=6, sample_prompt="the ", **batch)
    return config, train(config, quiet=True), made


def test_a_sample_is_what_the_finished_model_says(sampled):
    """Drawn at the last step, from parameters as they lie; compiled once, before the first step."""
    config, result, made = sampled
    assert len(made) == 3 and made[1:] == [0, 0]
    model = jaxllm.load(config.out, store=False)
    answer = model.generate("the ", max_tokens=100, temperature=0.8, seed=config.seed)
    sample = lines(config, "samples.jsonl")[-1]
    assert sample["step"] == 12 and sample["text"] == answer.text
    assert sample["tokens"] == len(answer.token_ids) == 28
    # MFU: needed FLOPs over seconds, of the peak of all devices.
    devices, flops = (8, 8) if config.mesh else (1, 4), row_flops(config.spec, 16)
    assert result.summary["devices"] == devices[0]
    peak, needed = 1e9 * devices[0], flops * devices[1]
    for row in lines(config, "metrics.jsonl"):
        assert row["mfu"] == pytest.approx(needed / (row["step_ms"] / 1e3) / peak)
    mean = result.summary["tokens_per_s"] / (16 * config.batch)
    assert result.summary["mfu"] == pytest.approx(mean * needed / peak)


def test_the_summary(whole):
    config, result = whole
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary == result.summary
    found = {name: summary[name] for name in ("step", "steps", "tokens", "finished", "val_step")}
    assert found == {"step": 12, "steps": 12, "tokens": 768, "finished": True, "val_step": 12}
    by_step = {r["step"]: r["val_loss"] for r in rows(config.out) if "val_loss" in r}
    assert summary["best_val_loss"] == min(by_step.values()) == by_step[summary["best_val_step"]]
    assert summary["val_loss"] == by_step[12] == result.val_loss
    assert {"data", "programs", "state", "samples", "first_step"} <= set(summary["startup"])
    assert summary["startup_seconds"] == pytest.approx(sum(summary["startup"].values()), rel=0.02)
    assert {"validation", "checkpoints", "samples", "profile"} == set(summary["apart"])
    assert 0 < summary["goodput"] < 1 and summary["tokens_per_s"] > 0
    assert summary["seconds"] > summary["startup_seconds"] + sum(summary["apart"].values())
    # A CPU has no peak in the table and says nothing of its memory.
    assert summary["mfu"] is None and summary["peak_bytes"] is None
    assert summary["predicted_bytes"] > 0
    assert all(r["mfu"] is None for r in rows(config.out))


def test_a_trace_of_some_steps(whole):
    config, _ = whole
    assert list((Path(config.out) / "profile").rglob("*.xplane.pb"))


def test_tensorboard_has_every_step_once(whole):
    config, _ = whole
    found = [e for e in events(Path(config.out) / "tensorboard") if e[1] == "train/loss"]
    wanted = losses(config.out)
    assert [step for step, _, _ in found] == list(wanted)
    assert [value for _, _, value in found] == pytest.approx(list(wanted.values()), rel=1e-6)


def test_the_device_never_waits_for_its_metrics(whole, tmp_path, monkeypatch):
    """Step n + 1 is under way before the numbers of step n are read, but where one must look."""
    order = []
    make, write = loop.make_programs, loop._Run._write

    def programs(*args):
        made = make(*args)

        def step(state, batch):
            order.append(("step", 1 + sum(kind == "step" for kind, _ in order)))
            return made.step.compiled(state, batch)

        step.report = made.step.report
        fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
        return type("Programs", (), fields | {"step": staticmethod(step)})()

    def read(self, step, metrics, params=None):
        order.append(("read", step))
        write(self, step, metrics, params)

    monkeypatch.setattr(loop, "make_programs", programs)
    monkeypatch.setattr(loop._Run, "_write", read)
    train(small(tmp_path, eval_every=4, checkpoint_every=6), quiet=True)
    assert order[:12] == [
        ("step", 1),
        *[("step", 2), ("read", 1)],
        *[("step", 3), ("read", 2)],
        *[("step", 4), ("read", 3), ("read", 4)],
        ("step", 5),
        *[("step", 6), ("read", 5), ("read", 6)],
    ]


@pytest.fixture
def listening():
    """Ctrl-C as at a terminal: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_stops_the_caller(whole, tmp_path, monkeypatch, listening):
    config = dataclasses.replace(whole[0], out=str(tmp_path / "run"), profile="")
    real = loop._Run._write

    def press(self, step, metrics, params=None):
        real(self, step, metrics, params)
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "_write", press)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary["step"] == 7 and not summary["finished"]
    assert (Path(config.out) / "loss.png").exists()
    monkeypatch.undo()
    train(config, quiet=True)
    assert [r["resumed_from"] for r in rows(config.out) if "resumed_from" in r] == [7]
    assert losses(config.out) == losses(whole[0].out)
    assert lines(config, "samples.jsonl") == lines(whole[0], "samples.jsonl")


def test_ctrl_c_twice_stops_at_once(listening):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and stop.interrupted
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_who_handles_ctrl_c_otherwise_keeps_it():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert seen == ["mine"] and not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked and not stop.interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_package_is_a_function_in_any_thread(whole, tmp_path):
    config = dataclasses.replace(whole[0], out=str(tmp_path / "run"), profile="")
    found = []
    thread = threading.Thread(target=lambda: found.append(jaxllm.train(config, quiet=True)))
    thread.start()
    thread.join()
    assert found[0].step == 12 and losses(config.out) == losses(whole[0].out)


def test_the_package_comes_light_and_first_thing():
    code = (
        "import sys, jaxllm\n"
        "assert callable(jaxllm.train) and 'train' in dir(jaxllm)\n"
        "import jaxllm.train as package\n"
        "assert package is jaxllm.train and 'jax' not in sys.modules\n"
        "import jaxllm.train.loop\n"
        "from jaxllm.train import Optimizer, Result, RunConfig\n"
        "assert jaxllm.train.RunConfig is RunConfig and jaxllm.train.loop.Result is Result\n"
        "try: jaxllm.train.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_prompts_that_cannot_be(tmp_path, monkeypatch):
    config = small(tmp_path, sample_every=4, sample_prompt="x" * 40)
    with pytest.raises(CapacityError, match="context of 32"):
        train(config, quiet=True)
    monkeypatch.setattr(
        "jaxllm.text.tokenizer.Tokenizer.encode", lambda self, text, **_: list(text.encode()[:0])
    )
    parts = {"store": None, "mesh": None, "params": None}
    with pytest.raises(ConfigError, match="no tokens in the data's vocabulary"):
        Sampler(config, byte_tokenizer(), **parts)
    with pytest.raises(ConfigError, match="no tokenizer"):
        Sampler(config, None, **parts)


def test_the_command_line_shows_lines_and_a_table(whole, tmp_path, capsys):
    config = tmp_path / "toy.py"
    config.write_text(
        "from pathlib import Path\nfrom tests.train.runs import small\n"
        f"def config():\n    return small(Path({str(tmp_path)!r}))\n"
    )
    with contextlib.chdir(tmp_path):
        code = main(["train", str(config), "--log-every", "5", "--sample-every", "6"])
    out, err = capsys.readouterr()
    assert code == 0
    said = out.splitlines()
    steps = [text.split("/")[0] for text in said if text.startswith("step ")]
    assert steps == ["step 1", "step 5", "step 6", "step 10", "step 12"]
    assert "val " in next(text for text in said if text.startswith("step 6/"))
    assert any(text.startswith("sample at step 6: ") for text in said)
    table = {text.split("  ")[0]: text.split("  ")[-1].strip() for text in said}
    assert table["steps"] == "12 of 12" and "at step 12" in table["last validation loss"]
    assert table["run directory"] == str(tmp_path / "run")
    assert "MFU" not in out and "train-step" in err
