"""LoRA adapters: merged as PEFT does it, and refused by name where they do not fit."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.core.tree import single_segments
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.infer.open import checkpoint_of, open_merged
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.adapter import read_adapter, with_adapter
from jaxllm.zoo.load import Checkpoint, read_arrays
from tests.cli.toy import write_toy
from tests.oracle.golden import golden
from tests.zoo.adapters import merged_by_hand, write_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("adapters") / "toy", width=32, ffn=48)


def arrays(checkpoint: Checkpoint, **layout: Any) -> dict[str, np.ndarray]:
    """All leaves in a layout."""
    usual = {"fused": False, "matrices": "canonical", "dtype": np.dtype(np.float32)}
    segments = single_segments(checkpoint.spec.num_layers)
    return dict(read_arrays(checkpoint, segments=segments, **(usual | layout)))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 3),
        ({"use_rslora": True}, 8 / 3**0.5),
        ({"alpha_pattern": {"proj": 99, "[a-z]*_proj": 6}, "rank_pattern": {"x.*": 7}}, 2.0),
    ],
)
@pytest.mark.parametrize("layout", [{}, {"fused": True, "matrices": "out_in"}], ids=["", "fused"])
def test_merged(
    model: Path, tmp_path: Path, config: dict[str, Any], scale: float, layout: dict[str, Any]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", model, **config)
    by_hand = checkpoint_of(str(merged_by_hand(tmp_path / "merged", model, adapter, scale)))
    base = checkpoint_of(str(model))
    ours, wanted = arrays(with_adapter(base, adapter), **layout), arrays(by_hand, **layout)
    assert ours.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = {n for n, a in arrays(base, **layout).items() if np.abs(a - ours[n]).max() > 0.01}
    assert moved and len(moved) < len(wanted)


def test_peft_itself() -> None:
    """Logits of an adapter that PEFT wrote and attached; see scripts/make_peft_golden.py."""
    folder = Path(__file__).with_name("peft")
    with np.load(folder / "golden.npz") as held:
        ids, logits, moved = (held[name] for name in ("ids", "logits", "moved"))
        base = golden(str(held["base"])).source
    model = jaxllm.load(base, dtype="float32", store=False)
    opened = open_merged(str(base), folder, policy=model.policy, put=jax.device_put)
    found = dataclasses.replace(model, params=opened.params).logits(ids)
    assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max() < 1e-3 * moved


def test_names_of_other_writers(model: Path, tmp_path: Path) -> None:
    """Without PEFT's prefix, and with the adapter's own name in them."""
    adapter = write_adapter(tmp_path / "adapter", model)
    base = checkpoint_of(str(model))
    wanted = read_adapter(base, adapter)
    file = adapter / "adapter_model.safetensors"
    for old, new in (("base_model.model.", ""), (".weight", ".default.weight")):
        save_file({name.replace(old, new): x for name, x in load_file(file).items()}, file)
        found = read_adapter(base, adapter)
        assert found.keys() == wanted.keys()
        assert all((found[path].b == wanted[path].b).all() for path in wanted)


def _shape(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].copy()


def _alone(tensors: dict[str, np.ndarray]) -> None:
    del tensors[next(name for name in tensors if "q_proj.lora_A" in name)]


def _module(tensors: dict[str, np.ndarray]) -> None:
    for side in "AB":
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        tensors[name.replace("q_proj", "qq_proj")] = tensors.pop(name)


def _other(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((3, 4), np.float32)


def _infinite(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shape, r"q_proj: lora_A and lora_B have shapes \(3, 31\) and \(32, 3\), not \(3, 32\)"),
        (_alone, "q_proj has a lora_B alone"),
        (_module, r"qq_proj is no matrix of the model; did you mean '[\w.]*0.self_attn.q_proj'"),
        (_other, "embed_tokens.lora_embedding_A is neither a lora_A nor a lora_B"),
        (_infinite, "not finite"),
        (dict.clear, "holds no lora_A and lora_B"),
    ],
)
def test_tensors_that_do_not_fit(
    model: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", model)
    file = adapter / "adapter_model.safetensors"
    tensors = {name: x.copy() for name, x in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=message) as found:
        read_adapter(checkpoint_of(str(model)), adapter)
    assert str(adapter) in str(found.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only LoRA"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"of_next_year": {"x": 1}}, "of_next_year"),
    ],
)
def test_other_adapters(model: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", model, **config)
    with pytest.raises(UnsupportedError, match=message):
        read_adapter(checkpoint_of(str(model)), adapter)


def test_bad_configs(model: Path, tmp_path: Path) -> None:
    adapter, base = write_adapter(tmp_path / "adapter", model), checkpoint_of(str(model))
    file = adapter / "adapter_config.json"
    good = json.loads(file.read_text())
    for bad in ("{", "[]", "3", json.dumps({"peft_type": "LORA"}), json.dumps(good | {"r": "x"})):
        file.write_text(bad)
        with pytest.raises(WeightsError, match="is no PEFT config of LoRA"):
            read_adapter(base, adapter)
    for bad in (good | {"r": 0}, good | {"rank_pattern": {"q_proj": -1}}):
        file.write_text(json.dumps(bad))
        with pytest.raises(WeightsError, match="ranks are at least 1"):
            read_adapter(base, adapter)
    file.write_text(json.dumps(good | {"r": 4}))
    with pytest.raises(WeightsError, match=re.escape("not (4, 32) and (32, 4) at rank 4")):
        read_adapter(base, adapter)
    file.unlink()
    with pytest.raises(WeightsError, match=r"adapter_config.json: is missing"):
        read_adapter(base, adapter)
    with pytest.raises(WeightsError, match="is missing"):
        read_adapter(base, tmp_path / "nowhere")


def test_a_quantized_base(model: Path, tmp_path: Path) -> None:
    jaxllm.load(model, store=False).quantize("int4", group=16).save(tmp_path / "few")
    adapter = write_adapter(tmp_path / "adapter", model)
    with pytest.raises(UnsupportedError, match="is quantized, and adapters are added to plain"):
        read_adapter(checkpoint_of(str(tmp_path / "few")), adapter)


FAMILIES = ("gpt2", "gpt_neox", "phi3_partial", "mamba2", "qwen3_next", "gguf_f32", "llama_mqa")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Turned matrices, several leaves in one tensor, rows in another order, and GGUF files."""
    base = checkpoint_of(str(golden(name).source))
    random, tensors, wanted = np.random.default_rng(0), {}, {}
    paths = layer_paths(base.spec)
    for entry in base.family.names(base.spec):
        definition = paths[entry.path]
        if entry.index is not None or definition.lead or not definition.inputs:
            continue
        shape = entry.disk_shape(definition)
        module = entry.disk.removesuffix(".weight")
        out, into = shape[::-1] if entry.form == "in_out" else shape
        key = f"base_model.model.{module}.lora_"
        for side, size in (("A", (2, into)), ("B", (out, 2))):
            fresh = random.standard_normal(size).astype(np.float32)
            tensors.setdefault(f"{key}{side}.weight", fresh)
        update = 2 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        update = update.T if entry.form == "in_out" else update
        wanted[entry.path] = entry.to_ours(update, definition)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    plain, ours = arrays(base), arrays(with_adapter(base, tmp_path))
    assert len(wanted) > 3
    for path, array in plain.items():
        update = wanted.get(path, np.float32(0))
        np.testing.assert_allclose(ours[path] - array, update, atol=1e-4, err_msg=path)
