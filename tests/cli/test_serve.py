"""`jaxllm serve` as a process: ready, an answer, SIGTERM, exit 0."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from jaxllm.cli.draft import draft_of
from jaxllm.cli.main import main, parse
from jaxllm.cli.serve import bounds_of, prefix_ids
from jaxllm.errors import ConfigError
from jaxllm.model import load
from tests.cli.toy import write_toy


@pytest.mark.slow
def test_from_start_to_sigterm(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    small = ["--max-sequences", "2", "--max-batch-tokens", "16", "--cache-tokens", "256"]
    command = [sys.executable, "-m", "jaxllm.cli.main", "serve", str(write_toy(tmp_path / "toy"))]
    command += ["--port", "0", "--api-key-file", str(keys), "--name", "mine", *small]
    (tmp_path / "prefix").write_text("You are a helpful machine. " * 2)
    command += ["--pin-prefix", str(tmp_path / "prefix"), "--draft-tokens", "3"]
    environment = os.environ | {"JAXLLM_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if ready := re.search(r"http://\S+", line):
                break
        assert ready, said
        assert any("tokens pinned" in line for line in said)
        with openai.OpenAI(base_url=ready[0] + "/v1", api_key="second") as client:
            reply = client.completions.create(model="mine", prompt="abc", max_tokens=4)
            assert reply.usage is not None
            assert reply.usage.completion_tokens >= 1
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 0, rest


def test_a_prefix_is_text_or_messages(tmp_path: Path) -> None:
    model = load(str(write_toy(tmp_path / "toy")))
    assert model.tokenizer is not None
    text = tmp_path / "p.txt"
    text.write_text("hello")
    assert prefix_ids(text, model) == model.tokenizer.encode("hello")
    messages = tmp_path / "p.json"
    for wrong in (b"{", b"\xff", b'{"role": "user"}', b'"x"'):
        messages.write_bytes(wrong)
        with pytest.raises(ConfigError):
            prefix_ids(messages, model)
    with pytest.raises(ConfigError, match="cannot be read"):
        prefix_ids(tmp_path / "none", model)


def test_a_draft_is_the_source_itself_or_another(tmp_path: Path) -> None:
    source = str(write_toy(tmp_path / "toy"))
    model = load(source)
    own = parse(["serve", source, "--draft", source, "--draft-format", "int8"])
    draft = draft_of(own, model, source)
    assert draft is not None and draft.nbytes < model.nbytes
    assert draft_of(parse(["serve", source, "--draft", source]), model, source) is model
    assert draft_of(parse(["serve", source]), model, source) is None
    with pytest.raises(ConfigError, match="give --draft too"):
        draft_of(parse(["serve", source, "--draft-format", "int4"]), model, source)


def test_options() -> None:
    options = parse(["serve", "x", "--api-key", "a", "--api-key", "b", "--port", "7"])
    assert (options.api_key, options.port, options.host) == (("a", "b"), 7, "127.0.0.1")
    bounds = bounds_of(parse(["serve", "x", "--spill-gib", "0.25", "--mixed-tokens", "8"]))
    assert (bounds.spill_gib, bounds.mixed_tokens, bounds.prefix_cache) == (0.25, 8, True)


@pytest.mark.parametrize("arguments", [
    ["--host", "0.0.0.0"], ["--port", "70000"], ["--api-key-file", "/nowhere"],
])  # fmt: skip
def test_refused_before_the_model_is_loaded(arguments, capsys) -> None:
    assert main(["serve", "/nowhere/model", *arguments]) == 2
    message = capsys.readouterr().err
    assert "/nowhere/model" not in message
    assert message.startswith("jaxllm serve: ")
