"""The command line: what it prints; every bad input gives one clear error and exit code 2."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from jaxllm.cli.main import main
from jaxllm.core.qarray import QArray
from jaxllm.model import load
from tests.cli.toy import write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy(tmp_path_factory.mktemp("toy")))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a refused command line: a few lines on stderr, nothing on stdout, code 2."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    lines = [line for line in err.splitlines() if not line.startswith(("weights:", "program "))]
    assert 1 <= len(lines) <= 5 and "Traceback" not in err
    return "\n".join(lines)


def test_generate_prints_one_json_object(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "hello", "--max-tokens", "6", "--json"]
    assert main(["generate", toy, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "text",
        "token_ids",
        "prompt_token_ids",
        "finish_reason",
        "usage",
        "timings",
    }
    assert len(found["token_ids"]) == 6 and found["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == len(found["prompt_token_ids"]) + 6
    assert main(["generate", toy, *options]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == found["token_ids"]


def test_streamed_text_equals_json(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--raw-prompt", "once upon", "--max-tokens", "9", "--temperature", "1"]
    assert main(["generate", toy, *options]) == 0
    streamed = capsys.readouterr().out
    assert main(["generate", toy, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == streamed.removesuffix("\n")


def test_report_says_what_was_compiled(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", toy, "--prompt", "hello", "--max-tokens", "6", "--report"]
    assert main(options) == 0
    capsys.readouterr()
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "programs from the store: 2 of 2" in out and "memory-mapped" in out
    assert "compilations: " in out and "tokens per second: " in out


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param(["--draft-tokens", "3"], marks=pytest.mark.slow),
        ["--draft", "", "--draft-format", "int8", "--draft-tokens", "1"],
    ],
)
def test_guesses_change_no_token(
    toy: str, draft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["generate", toy, "--raw-prompt", "ababababab", "--max-tokens", "24"]
    assert main([*options, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    guessing = [*options, *(part or toy for part in draft)]
    assert main([*guessing, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == alone["token_ids"]
    assert found["timings"]["drafted_tokens"] >= found["timings"]["accepted_tokens"] > 0
    assert main([*guessing, "--report"]) == 0
    assert "drafted tokens: " in capsys.readouterr().out


def test_messages_file(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "hello"}]))
    shared = ["--max-tokens", "3", "--json"]
    assert main(["generate", toy, "--messages", str(file), *shared]) == 0
    by_file = json.loads(capsys.readouterr().out)
    assert main(["generate", toy, "--prompt", "hello", *shared]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_token_ids"] == by_file["prompt_token_ids"]


def test_perplexity(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = ["--text", str(file), "--window", "32", "--num-windows", "3", "--json"]
    assert main(["perplexity", toy, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_tokens"] == 3 * 31
    assert found["perplexity"] == pytest.approx(2.718281828459045 ** found["nll"])


def test_quantize(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--format", "int8", "--include", "layers.*.mlp.*", "--dtype", "float32"]
    assert main(["quantize", toy, str(tmp_path / "small"), *options]) == 0
    assert "MB of parameters" in capsys.readouterr().out
    model = load(tmp_path / "small", store=False)
    assert isinstance(model.params["layers"]["0"]["mlp"]["down"], QArray)
    assert not isinstance(model.params["layers"]["0"]["attn"]["o"], QArray)
    assert "exists" in refused(capsys, "quantize", toy, str(tmp_path / "small"))
    wrong = ["quantize", toy, str(tmp_path / "other"), "--format", "int8", "--group", "5"]
    assert "a group of 5" in refused(capsys, *wrong)
    assert not (tmp_path / "other").exists()


def test_chat_keeps_its_history(
    toy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand again\n/reset\nhello\n/quit\nnever\n"))
    assert main(["chat", toy, "--max-tokens", "4"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == answers[-1]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["packages"]["jax"]
    assert found["choices"]["attention"].startswith("reference")
    assert len(found["devices"]) == 8


def test_doctor_fails_when_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxllm.cli.doctor._PACKAGES", ("jax", "no-such-package"))
    assert main(["doctor"]) == 1
    assert "no-such-package is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "-3"], "--top-k"),
        (["--min-p", "1"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--seed", "-1"], "--seed"),
        (["--presence-penalty", "3"], "--presence-penalty"),
        (["--temperature", "warm"], "--temperature"),
        (["--dtype", "float8"], "--dtype"),
        (["--no-such-option", "1"], "--no-such-option"),
        (["--raw-prompt", "both"], "--raw-prompt"),
        (["--draft-format", "int4"], "--draft-format: give --draft too"),
        (["--draft-tokens", "32"], "--draft-tokens is 0 to 31"),
        (["--draft", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_options(
    toy: str, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, "generate", toy, "--prompt", "hi", *options)


def test_bad_prompts(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in refused(capsys, "generate", toy, "--raw-prompt", "")
    assert "--prompt" in refused(capsys, "generate", toy)
    assert "context of 256" in refused(capsys, "generate", toy, "--raw-prompt", "x" * 300)
    file = tmp_path / "broken.json"
    file.write_text("[{")
    assert "broken.json" in refused(capsys, "generate", toy, "--messages", str(file))
    file.write_text('[{"role": "user"}]')
    assert "content" in refused(capsys, "generate", toy, "--messages", str(file))


def test_no_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_toy(tmp_path / "plain", template=None)
    assert "raw prompt" in refused(capsys, "generate", str(directory), "--prompt", "hi")
    assert main(["generate", str(directory), "--raw-prompt", "hi", "--max-tokens", "2"]) == 0


def test_bad_sources(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(source: object) -> str:
        return refused(capsys, "generate", str(source), "--prompt", "hi")

    assert "did you mean" in message("smollm2-135m-instrukt") or "smollm2" in message("smollm2-135")
    assert "absent.gguf" in message(tmp_path / "absent.gguf")
    assert "config.json" in message(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(toy, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in message(broken)
    weights.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    for change, named in [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "heads"),
        ({"hidden_sice": 3}, "hidden_sice"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 32}, "mlp.down_proj.weight"),
        ({"rope_scaling": {"rope_type": "magic"}}, "magic"),
    ]:
        (broken / "config.json").write_text(json.dumps(config | change))
        assert named in message(broken)


def test_no_space_for_the_cache(
    toy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    real = os.fsync

    def full(handle: int) -> None:
        real(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "no space left" in refused(capsys, "generate", toy, "--prompt", "hi")
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".sha256"]
    assert left == []


def test_a_cache_that_cannot_be_written(
    toy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "file" / "cache"))
    assert "JAXLLM_CACHE" in refused(capsys, "generate", toy, "--prompt", "hi")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--window", "1"], "--window"),
        (["--window", "9999"], "window 9999"),
        (["--num-windows", "0"], "--num-windows"),
        (["--skip-fraction", "1"], "--skip-fraction"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--window", "250"], "fewer than one window"),
    ],
)
def test_bad_perplexity(
    toy: str,
    tmp_path: Path,
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text " * 8)
    assert named in refused(capsys, "perplexity", toy, "--text", str(file), *options)
