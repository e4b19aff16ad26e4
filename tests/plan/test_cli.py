"""`jaxllm plan`: what it prints and writes, its exit codes, and errors in one line."""

import json
import os
import re
import subprocess
import sys

import pytest

from jaxllm.cli.main import main
from tests.cli.test_cli import refused
from tests.cli.toy import toy_spec
from tests.plan.models import write

CONFIG = """
from jaxllm.train.config import RunConfig
from tests.train.runs import config_of

def config():
    return config_of(batch=8, length=16, layout="unrolled", fused=True, dtype="bfloat16")
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A model of one layer without weights."""
    path = tmp_path / "model"
    path.mkdir()
    said = {"model_type": "jaxllm", "spec": json.loads(toy_spec(64).to_json())}
    (path / "config.json").write_text(json.dumps(said))
    return str(path)


def test_a_config_on_gpus_that_are_not_here(config, tmp_path, capsys):
    page = tmp_path / "plan.html"
    options = ["--devices", "h100:2", "--mesh", "tensor=2", "--remat", "full"]
    code = main(["plan", config, *options, "--html", str(page), "--json"])
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert code == 0
    assert said["fits"] is True
    assert (said["purpose"], said["kind"]) == ("train", "NVIDIA H100 80GB HBM3")
    assert said["settings"]["layout"] == "scan"
    assert said["settings"]["fused"] is False
    assert said["programs"][0]["memory"]["estimated"] is True
    assert said["programs"][0]["time"]["mfu_bound"] > 0
    assert "layers are scanned" in err
    assert "apart" in err
    assert page.read_text().startswith("<!doctype html>")


def test_a_model_is_served_by_default(folder, capsys):
    assert main(["plan", folder, "--devices", "cpu:1", "--prompt", "16", "--explain"]) == 0
    out = capsys.readouterr().out
    for text in ("prefill: memory of a device", "room for", "verdict: fits", "- decode leaves"):
        assert text in out


def test_what_does_not_fit_exits_1(folder, capsys):
    """The context is the model's; a billion sequences of it fit nowhere."""
    options = ["--devices", "l4:1", "--batch", str(1 << 23), "--prompt", "16", "--context", "256"]
    assert main(["plan", folder, *options, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is False
    assert any("too much" in line for line in said["explain"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "v9:2x2"], "unknown device 'v9'; .*allowed: a100, a100-40gb"),
        (["--devices", "cpu:8", "--mesh", "data=3"], "the nearest is 'data=8'"),
        (["--devices", "cpu:8", "--mesh", "dta=8"], "unknown axis 'dta'; did you mean 'data'"),
        (["--devices", "cpu:8", "--mesh", "fsdp=2,tensor=4"], "tensor can be 1, 2"),
        (
            ["--devices", "cpu:8", "--set", "lenght=3"],
            "unknown field 'lenght'; did you mean 'length'",
        ),
        (["--devices", "cpu:8", "--set", "length"], "--set length: write NAME=VALUE"),
        (["--devices", "cpu:8", "--set", "steps=many"], "--set steps: expected int, found 'many'"),
        (
            ["--devices", "cpu:8", "--search"],
            "peak and bandwidths of cpu in bfloat16 are not known",
        ),
        (["--devices", "cpu:8", "--search", "--for", "serve"], "--search varies training runs"),
        (["--devices", "cpu:8", "--html", "/nowhere/x.html"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(config, options, message, capsys):
    assert re.search(message, refused(capsys, "plan", config, *options))


def test_devices_are_needed(config, capsys):
    assert "devices" in refused(capsys, "plan", config)


def test_search_prints_why_others_lost(config, capsys):
    options = ["--devices", "h100:2", "--search", "--tries", "1", "--batch", "4", "--json"]
    assert main(["plan", config, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["search"][0]["verdict"] == "the fastest that fits"
    assert said["search"][0]["tokens_per_s"] == said["programs"][0]["tokens_per_s"]
    assert all(t["verdict"].startswith("not compiled") for t in said["search"][1:])


def test_a_large_model_is_only_read(tmp_path, capsys):
    source = str(write(tmp_path, "llama-3.1-405b"))
    message = refused(capsys, "plan", source, "--devices", "h100:8", "--mesh", "tensor=3")
    assert "the nearest is" in message


@pytest.mark.slow
def test_a_fresh_process_gets_the_devices_that_stand_in(folder):
    hidden = {"JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    line = [sys.executable, "-m", "jaxllm.cli.main", "plan", folder, "--devices", "h100:2"]
    done = subprocess.run([*line, "--batch", "2"], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "2 x NVIDIA H100 80GB HBM3" in done.stdout
    assert "InitGoogle" not in done.stderr  # libtpu, where it is installed, is left alone


def test_quantize_is_for_serving(config, folder, capsys):
    said = refused(capsys, "plan", config, "--devices", "cpu:1", "--quantize", "int8")
    assert "--quantize is for serving" in said
    size = ["--batch", "1", "--context", "16", "--prompt", "16"]
    assert main(["plan", folder, "--devices", "cpu:1", "--quantize", "int8", *size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["quantize"] == "int8"


def test_kv_dtype_says_how_many_tokens_fit(config, folder, capsys):
    said = refused(capsys, "plan", config, "--devices", "cpu:1", "--kv-dtype", "int8")
    assert "--kv-dtype is for serving" in said
    size = ["--context", "64", "--prompt", "16", "--batch", "1"]
    found = {}
    for name in ("auto", "int8"):
        told = ["--kv-dtype", name, "--json"]
        assert main(["plan", folder, "--devices", "h100:1", *size, *told]) == 0
        found[name] = json.loads(capsys.readouterr().out)["serving"]
    plain, coded = found["auto"], found["int8"]
    assert plain["kv_bytes_per_token"] > coded["kv_bytes_per_token"]
    ratio = plain["kv_bytes_per_token"] / coded["kv_bytes_per_token"]
    assert coded["kv_capacity_tokens"] == pytest.approx(
        ratio * plain["kv_capacity_tokens"], rel=1e-6
    )
