"""A bundle gives the tokens of the model that it was exported from."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.export.bundle import export_bundle
from jaxllm.export.runtime import Bundle, BundleError, files_of
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options
from jaxllm.export.weights import Placed, write_weights
from tests.cli.toy import write_toy
from tests.contracts.encoders import ENCODERS
from tests.contracts.specs import LOCAL, MLP48, SPECS, heads, model, pre
from tests.export.conftest import CHUNKED, SMALL, both, drawn, opened, small
from tests.infer.conftest import prompt, quickly, save

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7}
LOCAL_LAYER = pre("L", heads(4, 2, mask=LOCAL), MLP48)
TOYS = {
    "window": (model(LOCAL_LAYER, layers="L*2"), "greedy", {}),
    "moe": (SPECS["moe"], "penalize", SAMPLED),
    "hybrid": (SPECS["dual"], "greedy", {}),
    "gqa": (SPECS["gqa"], "penalize", {"repetition_penalty": 1.3, "frequency_penalty": 0.5}),
}


SLOW = {"moe", "hybrid"}
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TOYS]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, mode, options = TOYS[name]
    monkeypatch.setattr("jaxllm.export.table._MODES", (mode,))
    source, bundle = both(tmp_path, dataclasses.replace(spec, context=64), CHUNKED)
    ids = [i % spec.vocab for i in prompt(20)]  # two chunks, the second not full
    wanted = source.generate(ids, max_tokens=7, **options).token_ids
    assert drawn(bundle, ids, 7, **options) == wanted
    assert {key.partition("-")[0] for key in bundle.ready} == {"prefill", "extend", "decode"}


def test_a_state_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))
    source = write_toy(tmp_path / "toy", context=300)
    options = small(sizes=Sizes(context=300, prefill=(128, 256)))
    bundle = opened(export_bundle(str(source), tmp_path / "bundle", options))
    ids = prompt(120)
    model = quickly(jaxllm.load(source, store=False))
    assert drawn(bundle, ids, 140) == model.generate(ids, max_tokens=140, raw=True).token_ids[:140]
    assert "grow-256" in bundle.ready


def test_answers_end_with_the_context(talking: tuple[str, Path]) -> None:
    bundle = opened(talking[1])
    assert len(drawn(bundle, prompt(60), 100)) == 4
    for ids in (prompt(64), []):
        with pytest.raises(BundleError, match="prompts of 1 to 63 tokens"):
            drawn(bundle, ids, 1)


def test_quantized_leaves_travel_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))
    source = write_toy(tmp_path / "toy", width=32, ffn=64)
    jaxllm.load(source, store=False).quantize("int4", group=16).save(tmp_path / "few")
    few = quickly(jaxllm.load(tmp_path / "few", store=False))
    bundle = opened(export_bundle(str(tmp_path / "few"), tmp_path / "bundle", SMALL))
    assert "uint8" in {kind for *_, kind, _ in bundle.way["parameters"]}
    ids = prompt(9)
    assert drawn(bundle, ids, 6) == few.generate(ids, max_tokens=6).token_ids[:6]


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_four_bit_arrays_come_back(kind: str, tmp_path: Path) -> None:
    codes = np.arange(15).reshape(3, 5) - (8 if kind == "int4" else 0)
    array = codes.astype(jnp.dtype(kind))
    tree = {"a": Placed(array, None), "b": Placed(np.arange(3, dtype=np.float32), None)}
    where = write_weights(tmp_path, tree)
    bundle = object.__new__(Bundle)
    bundle.path, bundle.files = tmp_path, files_of(tmp_path)
    for name, wanted in (("a", array), ("b", np.arange(3, dtype=np.float32))):
        file, offset = where[name]
        found = bundle.array([name, file.name, offset, wanted.dtype.name, list(wanted.shape)])
        np.testing.assert_array_equal(found, wanted)


def test_three_platforms_from_one_machine(talking, tmp_path: Path) -> None:
    path = export_bundle(talking[0], tmp_path / "all", small(platforms=("cpu", "cuda", "tpu")))
    manifest = json.loads((path / "manifest.json").read_text())
    assert [v["name"] for v in manifest["variants"]] == ["cpu x 1", "cuda x 1", "tpu x 1"]
    assert [v["param_dtype"] for v in manifest["variants"]] == ["float32", "bfloat16", "bfloat16"]
    assert all(v["implementations"]["attention"] == ["reference"] for v in manifest["variants"])
    names = {f"programs/{p}/decode-greedy-256.jaxexport" for p in ("cpu", "cuda", "tpu")}
    assert names <= set(manifest["files"])


def test_bad_options(talking, tmp_path: Path) -> None:
    def refused(match: str, kind=ConfigError, source=talking[0], **changes) -> None:
        with pytest.raises(kind, match=match):
            export_bundle(source, tmp_path / "bundle", small(**changes))
        assert not any(tmp_path.glob("*bundle*"))

    refused("context is in 2..256", sizes=Sizes(context=9999))
    refused("mesh 'rows=2'", meshes=("rows=2",))
    with pytest.raises(ConfigError, match="platform 'gpu' is unknown"):
        Options(platforms=("gpu",))
    with pytest.raises(ConfigError, match="runs on tpu"):
        Options(platforms=("cpu",), attention="mosaic_tpu")
    with pytest.raises(ConfigError, match="powers of two"):
        Sizes(prefill=(48,))
    spec = next(iter(ENCODERS.values()))
    refused("encoder", UnsupportedError, str(save(tmp_path / "encoder", spec)))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ConfigError, match="exists"):
        export_bundle(talking[0], tmp_path / "there", SMALL)
