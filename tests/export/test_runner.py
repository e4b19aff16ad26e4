"""The folder of `jaxllm export --runner`, and the native runner that reads it."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxllm
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.export.runner import export_runner
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options
from tests.cli.test_cli import refused
from tests.infer.conftest import CONTEXT, SPEC, prompt, save

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "pjrt_runner"
HEADER = BUILT / "include" / "xla" / "pjrt" / "c" / "pjrt_c_api.h"
PLUGIN = BUILT / "cpu_plugin.so"
OPTIONS = Options(platforms=("cpu",), sizes=Sizes(context=CONTEXT, prefill=(16, 32)))

needs_header = pytest.mark.skipif(
    not (HEADER.is_file() and shutil.which("cmake") and shutil.which("c++")),
    reason="needs cmake, a compiler and the header that scripts/pjrt_runner/build fetches",
)
needs_plugin = pytest.mark.skipif(
    not PLUGIN.is_file(),
    reason="needs the plugin that scripts/pjrt_runner/build --cpu-plugin fetches",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("runner") / "toy"))


@pytest.fixture(scope="module")
def folder(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_runner(source, tmp_path_factory.mktemp("exported") / "folder", OPTIONS)


def lines(folder: Path, word: str) -> list[list[str]]:
    text = (folder / "manifest.txt").read_text().splitlines()
    return [line.split()[1:] for line in text if line.split()[0] == word]


def test_the_manifest_names_everything(folder: Path) -> None:
    programs = lines(folder, "program")
    assert [p[0] for p in programs] == [
        *("prefill-16", "prefill-32", "extend-32-256", "decode-256")
    ]
    assert all((folder / p[4]).read_bytes()[:4] == b"ML\xefR" for p in programs)
    for name, file, offset, size, *_ in lines(folder, "parameter"):
        assert int(offset) + int(size) <= (folder / file).stat().st_size, name
    assert lines(folder, "end") == [[]] and (folder / "compile_options.pb").stat().st_size


def test_a_gpus_folder_is_written_here(source: str, tmp_path: Path) -> None:
    dest = export_runner(
        source, tmp_path / "folder", dataclasses.replace(OPTIONS, platforms=("cuda",))
    )
    assert lines(dest, "platform") == [["cuda"]]
    assert any(
        "out" in name or "bfloat16" in kind for name, _, _, _, kind, *_ in lines(dest, "parameter")
    )


def test_refusals(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = str(tmp_path / "folder")

    def said(*options: str, to: str = dest) -> str:
        return refused(capsys, "export", source, to, "--runner", *options)

    assert "one device" in said()
    assert "one device" in said("--platform", "cpu", "--platform", "cuda")
    assert "one device" in said("--platform", "cpu", "--mesh", "tensor=2")
    assert "not a .tar" in said("--platform", "cpu", to=dest + ".tar")
    assert "handlers of Mosaic's kernels come from Python" in said(
        "--platform", "cuda", "--attention", "mosaic_gpu"
    )
    assert "its own plugin" in said("--platform", "cpu", "--native")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    assert "exists" in said("--platform", "cpu")


def test_what_the_runner_could_not_call(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "int4"
    jaxllm.load(source, store=False).quantize("int4", group=16).save(packed)
    with pytest.raises(UnsupportedError, match="knows no arrays of"):
        export_runner(
            str(packed), tmp_path / "folder", dataclasses.replace(OPTIONS, platforms=("cuda",))
        )
    monkeypatch.setattr("jaxllm.export.runner._CALLS", set())
    seen = re.compile(r"stablehlo\.(dot_general)()")
    monkeypatch.setattr("jaxllm.export.portable._CALL", seen)
    with pytest.raises(
        UnsupportedError, match="calls dot_general, whose handlers come from Python"
    ):
        export_runner(source, tmp_path / "folder", OPTIONS)
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The runner, built as its page says."""
    build = tmp_path_factory.mktemp("build")
    include = f"-DPJRT_INCLUDE={BUILT / 'include'}"
    source = str(ROOT / "scripts" / "pjrt_runner")
    for command in (
        ["cmake", "-S", source, "-B", str(build), include],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return str(build / "pjrt_runner")


def ran(binary: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [binary, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def complaint(binary: str, *arguments: str | Path) -> str:
    done = ran(binary, *arguments)
    assert done.returncode == 2 and not done.stdout, (done.returncode, done.stdout, done.stderr)
    return done.stderr


def ids(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


STUB = """
#include "xla/pjrt/c/pjrt_c_api.h"
#include <cstdlib>
static PJRT_Error* initialize(PJRT_Plugin_Initialize_Args*) { std::abort(); }
extern "C" const PJRT_Api* GetPjrtApi() {
  static PJRT_Api api{};
  api.struct_size = SIZE;
  api.pjrt_api_version.major_version = MAJOR;
  api.pjrt_api_version.minor_version = MINOR;
  api.PJRT_Plugin_Initialize = initialize;
  return &api;
}
"""


def stub(folder: Path, **changes: str) -> Path:
    """A plugin that says who it is, and must not be called."""
    usual = {"SIZE": "PJRT_Api_STRUCT_SIZE", "MAJOR": "PJRT_API_MAJOR", "MINOR": "PJRT_API_MINOR"}
    text = STUB
    for name, value in (usual | changes).items():
        text = text.replace(f" {name};", f" {value};")
    (folder / "stub.cc").write_text(text)
    made = folder / "stub.so"
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-isystem",
        str(BUILT / "include"),
        str(folder / "stub.cc"),
    ]
    subprocess.run([*command, "-o", str(made)], check=True)
    return made


@needs_header
def test_bad_plugins(binary: str, folder: Path, tmp_path: Path) -> None:
    ask = (folder, "--prompt", "1,2", "--plugin")
    assert "cannot be loaded" in complaint(binary, *ask, tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("no library")
    assert "cannot be loaded" in complaint(binary, *ask, tmp_path / "text.so")
    (tmp_path / "empty.cc").write_text("")
    empty = tmp_path / "empty.so"
    subprocess.run(["c++", "-shared", str(tmp_path / "empty.cc"), "-o", str(empty)], check=True)
    assert "it has no GetPjrtApi" in complaint(binary, *ask, empty)
    assert "speaks PJRT 7." in complaint(binary, *ask, stub(tmp_path, MAJOR="7"))
    older = complaint(binary, *ask, stub(tmp_path, MINOR="PJRT_API_MINOR - 1"))
    assert "or newer: build it with the plugin's own header" in older
    assert "its table of functions has 64 bytes" in complaint(
        binary, *ask, stub(tmp_path, SIZE="64")
    )


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "manifest.txt"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "manifest.txt cannot be read"),
    "newer format": (edit("jaxllm-runner 1", "jaxllm-runner 2"), "has format 'jaxllm-runner 2'"),
    "cut-off manifest": (lambda f: cut(f / "manifest.txt", 900), "line"),
    "manifest without its end": (edit("\nend\n", "\n"), "is cut off"),
    "unknown line": (edit("vocab", "words"), "line 5 is damaged"),
    "no number": (edit("context 96", "context many"), "line 4 is damaged"),
    "path out of the folder": (edit("weights/model", "../model"), "is damaged"),
    "absolute path": (edit("programs/", "/programs/"), "is damaged"),
    "cut-off weights": (lambda f: cut(f / "weights/model.safetensors", 50_000), "is cut off"),
    "no weights": (lambda f: (f / "weights/model.safetensors").unlink(), "cannot be read"),
    "empty weights": (lambda f: cut(f / "weights/model.safetensors", 0), "is empty"),
    "another shape": (edit("float32 272 32", "float32 272 33"), "bytes, its shape"),
    "a shape of no memory": (edit("float32 272 32", "float32 -272 32"), "no shape that memory"),
    "a huge shape": (
        edit("float32 272 32", "float32 9223372036854775807 9223372036854775807"),
        "no shape that memory",
    ),
    "unknown dtype": (edit("float32 272", "float64 272"), "arrays of float64 are unknown"),
    "a name with a path": (edit("program prefill-16 ", "program ../prefill-16 "), "is damaged"),
    "far offset": (edit(" 1472 ", " 18446744073709551000 "), "is cut off"),
}


@needs_header
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(binary: str, folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    assert message in complaint(binary, copy, "--prompt", "1,2", "--plugin", tmp_path / "never.so")


@needs_header
def test_bad_options(binary: str, folder: Path) -> None:
    assert "usage:" in complaint(binary)
    assert "usage:" in complaint(binary, folder, "--plugin", "x", "--build", "--prompt", "1")
    assert "unknown option --tokens" in complaint(binary, folder, "--tokens", "3")
    assert "'x' is no whole number" in complaint(binary, folder, "--prompt", "1,x")
    assert "--plugin wants a value" in complaint(binary, folder, "--plugin")
    assert "NAME=VALUE" in complaint(binary, folder, "--option", "fraction")
    assert "at least 1" in complaint(
        binary, folder, "--plugin", "x", "--prompt", "1", "--max-tokens", "0"
    )


@needs_header
@needs_plugin
@pytest.mark.parametrize(
    "length", [40, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 16, 94))]
)
def test_ids_are_those_of_generate(
    binary: str, source: str, folder: Path, length: int, tmp_path: Path
) -> None:
    asked = prompt(length)
    wanted = jaxllm.load(source, store=False).generate(asked, max_tokens=CONTEXT).token_ids
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    ask = (copy, "--plugin", PLUGIN, "--prompt", ids(asked), "--max-tokens", str(CONTEXT))
    assert ran(binary, *ask[:3], "--build").returncode == 0
    made = {file.name: file.stat().st_mtime_ns for file in (copy / "native").iterdir()}
    assert sorted(made) == sorted(f"{p[0]}.exe" for p in lines(folder, "program"))
    for more in ((), ("--native",)):
        done = ran(binary, *ask, *more)
        assert done.returncode == 0, done.stderr
        assert [int(i) for i in done.stdout.split()] == wanted
    assert made == {file.name: file.stat().st_mtime_ns for file in (copy / "native").iterdir()}
    short = ran(binary, *ask[:-1], "3", "--native")
    assert [int(i) for i in short.stdout.split()] == wanted[:3]


@pytest.mark.slow
@needs_header
@needs_plugin
def test_a_state_that_grows(binary: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, context=1024)
    source = str(save(tmp_path / "long", spec))
    options = dataclasses.replace(OPTIONS, sizes=Sizes(context=700, prefill=(32, 256)))
    folder = export_runner(source, tmp_path / "folder", options)
    assert [p[0] for p in lines(folder, "program") if p[1] == "grow"] == ["grow-256", "grow-512"]
    asked = prompt(300)
    wanted = jaxllm.load(source, store=False).generate(asked, max_tokens=250).token_ids
    done = ran(binary, folder, "--plugin", PLUGIN, "--prompt", ids(asked), "--max-tokens", "250")
    assert [int(i) for i in done.stdout.split()] == wanted, done.stderr


@needs_header
@needs_plugin
def test_what_only_a_plugin_can_refuse(binary: str, folder: Path, tmp_path: Path) -> None:
    ask = ("--plugin", PLUGIN, "--prompt")
    assert "is not in the vocabulary of 272" in complaint(binary, folder, *ask, "1,272")
    assert "is not in the vocabulary" in complaint(binary, folder, *ask, "-1")
    assert "at most 95 tokens" in complaint(binary, folder, *ask, ids(prompt(96)))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit("platform cpu", "platform cuda")(copy)
    assert "is for cuda, the plugin for cpu" in complaint(binary, copy, *ask, "1")
    edit("platform cuda", "platform cpu")(copy)
    cut(copy / "programs/prefill-16.mlirbc", 500)
    assert "compiling: " in complaint(binary, copy, *ask, "1")
    (copy / "programs/prefill-16.mlirbc").unlink()
    assert "prefill-16.mlirbc: cannot be read" in complaint(binary, copy, *ask, "1")


def test_a_bad_destination(source: str) -> None:
    with pytest.raises(ConfigError, match=r"not a \.tar"):
        export_runner(source, "model.tar", OPTIONS)
