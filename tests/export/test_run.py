"""`jaxllm export` and `jaxllm run`: the options and answers of `jaxllm generate` and `chat`."""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax import export

from jaxllm.aot import counter
from jaxllm.cli.main import main
from jaxllm.errors import WeightsError
from jaxllm.export import runtime
from jaxllm.export.bundle import export_bundle
from jaxllm.export.model import load_bundle
from jaxllm.export.runtime import Bundle
from tests.cli.test_cli import refused
from tests.export.conftest import small

BLOCK = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if any(name == n or name.startswith(n + ".") for n in NAMES):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_answers_are_those_of_generate(
    talking: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, bundle = talking
    rest = ["--prompt", "hello", "--max-tokens", "6", "--json"]
    more = ["--temperature", "0", "--stop", "e"]
    wanted = printed(capsys, "generate", source, *rest, *more)
    found = printed(capsys, "run", str(bundle), "generate", *rest, *more)
    wanted.pop("timings")
    assert found.pop("timings")["prompt_tokens"] == len(found["prompt_token_ids"])
    assert found == wanted
    again = load_bundle(bundle)
    answer = again.generate("hello", max_tokens=6)
    assert answer.text and all(p.stored for p in again.bundle.ready.values())


def test_sampling_options_arrive(
    talking: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def stream(self: Bundle, ids: list[int], max_tokens: int, **options: Any) -> Any:
        seen.update(options, max_tokens=max_tokens)
        yield [65]

    monkeypatch.setattr(Bundle, "stream", stream)
    ask = ["--raw-prompt", "hi", "--temperature", "0.8", "--top-k", "30", "--seed", "3"]
    assert main(["run", str(talking[1]), "generate", *ask, "--max-tokens", "9"]) == 0
    capsys.readouterr()
    known = {name for name, *_ in Bundle(talking[1]).manifest["sampling"]}
    assert set(seen) == known | {"max_tokens"}
    wanted = {"temperature": 0.8, "top_k": 30, "seed": 3, "top_p": 1.0, "max_tokens": 9}
    assert {name: seen[name] for name in wanted} == wanted


def test_a_program_that_cannot_be_read_later(
    talking: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = export.deserialize, []

    def second_fails(data: bytearray) -> Any:
        calls.append(len(data))
        if len(calls) > 1:
            raise ValueError("of an unknown version")
        return real(data)

    monkeypatch.setattr(export, "deserialize", second_fails)
    message = refused(
        capsys, "run", str(talking[1]), "generate", "--prompt", "hi", "--max-tokens=2"
    )
    assert "of an unknown version" in message and "export it anew" in message


def test_chat(
    talking: tuple[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = "hi\n/reset\nhi\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main(["chat", talking[0], "--max-tokens", "4"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main(["run", str(talking[1]), "chat", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == wanted


def test_help(talking: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in ((["--help"], "serve"), (["generate", "-h"], "--trust")):
        with pytest.raises(SystemExit) as end:
            main(["run", talking[1].as_posix(), *arguments])
        assert end.value.code == 0 and word in capsys.readouterr().out


def test_bad_commands(
    talking: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(talking[1])
    ask = ["--prompt", "hi"]
    assert "allowed: batch, chat, generate" in refused(capsys, "run", bundle, "train")
    assert "allowed: batch, chat, generate" in refused(capsys, "run", bundle)
    assert "a bundle has no programs that verify drafts" in refused(
        capsys, "run", bundle, "generate", *ask, "--draft-tokens", "3"
    )
    assert "dtype is fixed" in refused(
        capsys, "run", bundle, "generate", *ask, "--dtype", "float32"
    )
    assert "--top-p" in refused(capsys, "run", bundle, "generate", *ask, "--top-p", "2")
    assert "context of 64" in refused(capsys, "run", bundle, "generate", "--raw-prompt", "x" * 99)
    assert "manifest.json is missing" in refused(capsys, "run", str(tmp_path), "generate", *ask)
    assert "exists" in refused(capsys, "export", talking[0], bundle)
    assert "platform 'gpu'" in refused(
        capsys, "export", talking[0], str(tmp_path / "b"), "--platform", "gpu"
    )


def test_export_prints_what_it_wrote(
    talking: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "bundle.tar"
    options = ["--platform", "cpu", "--context", "64", "--prefill", "32"]
    assert main(["export", talking[0], str(dest), *options]) == 0
    assert f"jaxllm run {dest} generate" in capsys.readouterr().out
    assert set(json.loads(bytes(Bundle(dest).read("manifest.json")))) >= {"format", "variants"}


def ran(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_runs_without_the_models_code(talking: tuple[str, Path], tmp_path: Path) -> None:
    code = BLOCK.replace("NAMES", repr(("jaxllm.nn", "jaxllm.zoo", "flax")))
    arguments = [
        "run",
        str(talking[1]),
        "generate",
        "--prompt",
        "hi",
        "--max-tokens",
        "3",
        "--json",
    ]
    code += f"from jaxllm.cli.main import main\nsys.exit(main({arguments!r}))"
    done = ran("-c", code)
    assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_the_runtime_stands_alone(talking: tuple[str, Path], tmp_path: Path) -> None:
    source = Path(runtime.__file__)
    text = source.read_text()
    assert len(text.splitlines()) <= 150
    found = {
        line.split()[1].partition(".")[0] for line in re.findall(r"(?m)^ *(?:from|import) .*", text)
    }
    assert found - sys.stdlib_module_names == {"jax", "numpy", "tokenizers", "jinja2"}
    shutil.copy(source, tmp_path / "vendored.py")
    ask = [{"role": "user", "content": "hi"}]
    code = BLOCK.replace("NAMES", repr(("jaxllm", "flax", "pallas_kernels")))
    code += f"sys.path.insert(0, {str(tmp_path)!r})\nimport vendored\n"
    code += f"print(repr(vendored.Bundle({str(talking[1])!r}).answer({ask!r}, max_tokens=5)))"
    done = ran("-I", "-c", code)
    wanted = load_bundle(talking[1]).generate(ask, max_tokens=5).text
    assert done.stdout == f"{wanted!r}\n"


@pytest.fixture(scope="module")
def native(talking: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with executables; the cache is that of whoever exported it."""
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_CACHE", str(folder / "cache"))
        patch.setattr("jaxllm.export.table._MODES", ("greedy",))
        yield export_bundle(talking[0], folder / "bundle", small(native=True))


def stored(bundle: Path, **options: Any) -> list[bool]:
    """Whether each program that an answer takes was compiled before."""
    model = load_bundle(bundle, **options)
    model.generate("hi", max_tokens=3)
    return [program.stored for program in model.bundle.ready.values()]


def test_native_executables_need_trust(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executables = sorted((native / "native").iterdir())
    assert len(executables) == 3 and {file.suffix for file in executables} == {".xla"}
    assert stored(native) == [True, True]  # built by this user: in the own store
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "stranger"))
    before = counter.compilations()
    assert stored(native, trust=True, store=False) == [True, True]
    assert counter.compilations() == before
    assert stored(native) == [False, False]
    copy = Path(shutil.copytree(native, tmp_path / "copy"))
    file = copy / "native" / executables[0].name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"native/.* was changed after the export"):
        load_bundle(copy)


def test_native_programs_of_another_stack_are_left_alone(
    native: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("jaxllm.aot.fingerprint._cpu_features", lambda: "another CPU")
    monkeypatch.setattr("jaxllm.core.logging._seen", set())
    monkeypatch.setattr(logging.getLogger("jaxllm"), "propagate", True)
    with caplog.at_level("INFO"):
        assert stored(native, trust=True, store=False) == [False, False]
    assert "for this stack (they are for device_kind cpu, jax" in caplog.text


def test_native_programs_run_on_a_host_of_fewer_devices(native: Path) -> None:
    """They are for one device, and were built here, where there are eight."""
    assert json.loads((native / "manifest.json").read_text())["native"]["device_kind"] == "cpu"
    code = "import os, sys; os.environ['JAX_NUM_CPU_DEVICES'] = '1'\n"
    code += "from jaxllm.export.model import load_bundle\n"
    code += f"model = load_bundle({str(native)!r}, trust=True, store=False)\n"
    code += "ids = model.generate('hi', max_tokens=3).token_ids\n"
    code += "print(ids, [p.stored for p in model.bundle.ready.values()])"
    wanted = load_bundle(native).generate("hi", max_tokens=3).token_ids
    assert ran("-c", code).stdout == f"{wanted} [True, True]\n"
