"""Adapters of a bundle: merged when it is written, or kept apart and added when it is run."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.cli.main import main
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.export import adapt, runtime
from jaxllm.export.bundle import export_bundle
from jaxllm.export.model import load_bundle
from jaxllm.export.runtime import Bundle, files_of
from tests.cli.test_cli import refused
from tests.cli.toy import write_toy
from tests.export.conftest import drawn, opened, small
from tests.export.test_run import BLOCK, printed, ran
from tests.infer.conftest import prompt, quickly, save
from tests.zoo.adapters import merged_by_hand, write_adapter

COUNT = 8
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy`, its adapters `one` and `two`, and `bundle`, which keeps both apart."""
    folder = tmp_path_factory.mktemp("adapted")
    model = write_toy(folder / "toy", width=32, ffn=48)
    apart = tuple(
        (name, write_adapter(folder / name, model, rank=2 + i, seed=i))
        for i, name in enumerate(NAMES)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxllm.export.table._MODES", ("greedy",))
        export_bundle(str(model), folder / "bundle", small(apart=apart))
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[int]]:
    """Ids of the model, and of the models into which an adapter was merged by hand."""
    sources = {"": folder / "toy"}
    for i, name in enumerate(NAMES):
        dest = folder / f"by-hand-{name}"
        sources[name] = merged_by_hand(dest, folder / "toy", folder / name, 8 / (2 + i))
    models = {name: quickly(jaxllm.load(path, store=False)) for name, path in sources.items()}
    return {
        name: model.generate(prompt(9), max_tokens=COUNT, raw=True).token_ids
        for name, model in models.items()
    }


def test_apart(folder: Path, answers: dict[str, list[int]]) -> None:
    """One bundle is three models, by the same programs."""
    assert len({tuple(ids) for ids in answers.values()}) == 3
    base = opened(folder / "bundle")
    for name, wanted in answers.items():
        bundle = opened(folder / "bundle")
        bundle.ready = base.ready
        if name:
            adapt.adapt(bundle, name)
        assert drawn(bundle, prompt(9), COUNT)[: len(wanted)] == wanted
    assert len(base.ready) == 2


def test_merged(
    folder: Path,
    answers: dict[str, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))
    options = ["--platform", "cpu", "--context", "64", "--prefill", "32"]
    given = [str(folder / "toy"), str(tmp_path / "b.tar"), "--adapter", str(folder / "one")]
    assert main(["export", *given, *options]) == 0
    bundle = opened(tmp_path / "b.tar")
    assert bundle.manifest["merged"] == "one" and bundle.way["adapters"] == {}
    assert drawn(bundle, prompt(9), COUNT)[: len(answers["one"])] == answers["one"]
    capsys.readouterr()


def test_the_command(
    folder: Path, answers: dict[str, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(folder / "bundle")
    ask = ["--raw-prompt", "hello", "--max-tokens", "6", "--json"]
    found = [
        printed(capsys, "run", bundle, "generate", *ask, *more)["token_ids"]
        for more in ([], ["--adapter", "one"], ["--adapter", "two"])
    ]
    assert len({tuple(ids) for ids in found}) == 3
    by_hand = quickly(jaxllm.load(folder / "by-hand-one", store=False))
    assert found[1] == by_hand.generate("hello", max_tokens=6, raw=True).token_ids
    assert "adapter 'on' is unknown; did you mean 'one'? allowed: one, two" in refused(
        capsys, "run", bundle, "generate", *ask, "--adapter", "on"
    )


def test_none_apart(talking: tuple[str, Path]) -> None:
    with pytest.raises(ConfigError, match="adapter 'one' is unknown; it keeps none apart"):
        load_bundle(talking[1], adapter="one")


def test_a_changed_adapter(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "bundle", tmp_path / "copy"))
    file = next((copy / "adapters" / "two").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"adapters/two/.* was changed after the export"):
        load_bundle(copy)


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=2"])
def test_every_layout(mesh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One array a layer, outputs first, or stacks: apart and then added is merged."""
    monkeypatch.setattr("jaxllm.export.bundle.table", lambda *_, **__: [])
    model = save(tmp_path / "toy")
    adapter = write_adapter(tmp_path / "one", model)
    for dtype, near in (("float32", 1e-5), ("bfloat16", 1e-2)):
        shape = {"platforms": ("cpu", "cuda", "tpu"), "dtype": dtype}
        options = small(**shape, meshes=(mesh,) if mesh else ())
        changed = []
        for name, change in (
            ("apart", {"apart": (("one", adapter),)}),
            ("m", {"adapter": adapter}),
        ):
            path = tmp_path / f"{name}-{dtype}"
            export_bundle(str(model), path, small(**{**vars(options), **change}))
            changed.append(unread(path))
        for way, wanted in zip(*(b.manifest["variants"] for b in changed), strict=True):
            updates, one, other = way["adapters"]["one"], *changed
            scanned, fused = ("scan" in str(way["weights"]), "fused" in str(way["weights"]))
            assert len(updates) == (5 if scanned else 8 if fused else 10)
            for row, merged in zip(way["parameters"], wanted["parameters"], strict=True):
                theirs = other.array(merged).astype(np.float32)
                at = updates.get(row[0])
                ours = one.array(row) if at is None else adapt.adapted(one, row, at)
                np.testing.assert_allclose(
                    ours.astype(np.float32), theirs, rtol=near, atol=near, err_msg=row[0]
                )
                assert at is None or np.abs(one.array(row).astype(np.float32) - theirs).max() > 0.1


def unread(path: Path) -> Bundle:
    """A bundle whose programs are not looked at."""
    import json

    bundle = object.__new__(Bundle)
    bundle.path, bundle.files = path, files_of(path)
    bundle.manifest = json.loads(bytes(bundle.read("manifest.json")))
    return bundle


def test_vendored(folder: Path, tmp_path: Path, answers: dict[str, list[int]]) -> None:
    for module in (runtime, adapt):
        shutil.copy(str(module.__file__), tmp_path)
    code = BLOCK.replace("NAMES", repr(("jaxllm", "flax", "pallas_kernels")))
    code += f"sys.path.insert(0, {str(tmp_path)!r})\nimport runtime, adapt\n"
    code += f"b = runtime.Bundle({str(folder / 'bundle')!r})\nadapt.adapt(b, 'two')\n"
    code += f"print([i for ids in b.stream({prompt(9)}, {COUNT}) for i in ids])"
    ids = eval(ran("-I", "-c", code).stdout)
    assert ids[: len(answers["two"])] == answers["two"]


def test_bad_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = str(tmp_path / "bundle")
    ask = ["export", str(folder / "toy"), dest, "--platform", "cpu"]
    one = str(folder / "one")
    assert "write NAME=FOLDER" in refused(capsys, *ask, "--adapter-apart", one)
    assert "a name of its own" in refused(capsys, *ask, "--adapter-apart", f"a/b={one}")
    twice = [f"--adapter-apart=a={one}"] * 2
    assert "a name of its own" in refused(capsys, *ask, *twice)
    assert "adapter_config.json: is missing" in refused(capsys, *ask, "--adapter", dest)
    runner = ["--runner", "--adapter-apart", f"a={one}"]
    assert "merge one by --adapter instead" in refused(capsys, *ask, *runner)
    with pytest.raises(UnsupportedError, match="is quantized"):
        few = tmp_path / "few"
        jaxllm.load(folder / "toy", store=False).quantize("int4", group=16).save(few)
        export_bundle(str(few), dest, small(apart=(("a", folder / "one"),)))
    with pytest.raises(ConfigError, match="has no files"):
        export_bundle("random:llama-tiny", dest, small(adapter=folder / "one"))
    assert not Path(dest).exists()
