"""Published quantized checkpoints: leaves stand for the values that the formats describe."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxllm
from jaxllm.core.qarray import QArray, dequantize_rows
from jaxllm.core.quantize import Scheme, quantize_jit
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError, WeightsError
from jaxllm.infer.open import run_policy
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.load import open_checkpoint, save_checkpoint
from jaxllm.zoo.quantized_files import open_packed
from jaxllm.zoo.safetensors import open_safetensors
from jaxllm.zoo.table import ConfigReader
from tests.cli.toy import write_toy
from tests.oracle.golden import FOLDER
from tests.zoo.quantized import awq, build, gptq, words, write

slow = pytest.mark.slow
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
RANDOM = np.random.default_rng(1)


def ct(weights, **more):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, **more}


def scaled(dtype, blocks):
    """Values with a scale a block, as compressed-tensors and block-scaled fp8 have them."""

    def make(shape):
        rows, group = (b or n for b, n in zip(blocks, shape, strict=True))
        high, wide = -(-shape[0] // rows), -(-shape[1] // group)
        scale = RANDOM.uniform(0.001, 0.01, (high, wide)).astype(np.float32)
        values = RANDOM.integers(-100, 100, shape).astype(np.int8)
        if dtype == "fp8":
            values = RANDOM.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        spread = np.repeat(np.repeat(scale, rows, 0), group, 1)[: shape[0], : shape[1]]
        return values, scale, values.astype(np.float32) * spread

    return make


def compressed(dtype, blocks, name="weight_scale", flat=False):
    def make(shape):
        values, scale, plain = scaled(dtype, blocks)(shape)
        return {"weight": values, name: scale.reshape(-1) if flat else scale}, plain

    return make


def packed_int4(shape):
    codes = RANDOM.integers(-8, 8, shape)
    scale = RANDOM.uniform(0.005, 0.02, (shape[0], shape[1] // 32)).astype(np.float32)
    tensors = {"weight_packed": words(codes + 8, 1), "weight_scale": scale}
    tensors["weight_shape"] = np.array(shape)
    return tensors, codes * np.repeat(scale, 32, 1)


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
BLOCK = FP8 | {"strategy": "block", "block_structure": [128, 128]}
FILES = {
    "gptq": (GPTQ, gptq),
    "gptq zero points": (GPTQ, lambda s: gptq(s, symmetric=False)),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda s: gptq(s, v2=True)),
    "awq": (AWQ, awq),
    "int8": (ct(INT8, format="int-quantized"), compressed("int8", (1, 0))),
    "fp8 tensor": (ct(FP8, format="float-quantized"), compressed("fp8", (0, 0), flat=True)),
    "fp8 blocks": (ct(BLOCK, format="float-quantized"), compressed("fp8", (128, 128))),
    "int4 packed": (ct(GROUP, format="pack-quantized"), packed_int4),
    "fp8 inverse": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        compressed("fp8", (128, 128), name="weight_scale_inv"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_leaves_are_what_the_format_says(tmp_path, name):
    plain = build(tmp_path / "m", *FILES[name])
    model = jaxllm.load(tmp_path / "m", store=False)
    layer = model.params["layers"]["0"]
    assert all(isinstance(layer["attn"][n], QArray) for n in ("qkv", "o"))
    assert all(isinstance(layer["mlp"][n], QArray) for n in ("gate_up", "down"))
    names = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    for ours, theirs in names.items():
        wanted = plain[f"model.layers.0.{theirs}.weight"]
        found = model.leaf(f"layers.0.{'attn' if theirs[0] == 's' else 'mlp'}.{ours}")
        found = found.reshape(wanted.shape[1], wanted.shape[0]).T
        assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    ids = np.arange(12)[None]
    dense = jaxllm.load(tmp_path / "m", store=False, packed=False)
    assert not isinstance(dense.params["layers"]["0"]["mlp"]["down"], QArray)
    difference = np.abs(model.logits(ids) - dense.logits(ids)).max()
    assert difference < 1e-4 * np.abs(dense.logits(ids)).max()


def test_act_order(tmp_path):
    """Scattered groups, kept apart or expanded; joined where projections share their order."""
    build(tmp_path / "m", GPTQ | {"desc_act": True}, lambda s: gptq(s, act_order=True))
    dense = jaxllm.load(tmp_path / "m", store=False, packed=False)
    with pytest.raises(UnsupportedError, match="fused=False"):
        jaxllm.load(tmp_path / "m", store=False)
    model = jaxllm.load(tmp_path / "m", store=False, policy=run_policy("float32", fused=False))
    assert model.params["layers"]["0"]["attn"]["q"].order is not None
    ids = np.arange(12)[None]
    wanted = dense.logits(ids)
    assert np.abs(model.logits(ids) - wanted).max() < 1e-4 * np.abs(wanted).max()


def damage(folder, **changes):
    """The same folder with tensors changed by suffix."""
    reader = open_safetensors(folder)
    tensors = {}
    for name in reader.tensors:
        array = np.array(reader.read(name))
        for suffix, change in changes.items():
            if name.endswith(f"down_proj.{suffix}"):
                array = change(array)
        if array is not None:
            tensors[name] = array
    write(folder, tensors)


BAD = {
    "scales": ({"scales": lambda a: a[:-1]}, "down_proj.scales has shape"),
    "zeros": ({"qzeros": lambda a: a[:, :-1]}, "down_proj.qzeros has shape"),
    "missing": ({"scales": lambda a: None}, "down_proj.scales is missing"),
    "index": ({"g_idx": lambda a: a + 1}, "down_proj.g_idx: holds 8; groups are 0 to 7"),
    "negative": ({"g_idx": lambda a: a - 1}, "down_proj.g_idx: holds -1"),
    "uneven": ({"g_idx": lambda a: np.minimum(a, 1)}, "down_proj.g_idx: groups have different"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_by_name(tmp_path, name):
    build(tmp_path / "m", GPTQ, gptq)
    changes, message = BAD[name]
    damage(tmp_path / "m", **changes)
    with pytest.raises(WeightsError, match=message):
        jaxllm.load(tmp_path / "m", store=False)


CONFIGS = {
    "zero group": ({"group_size": 0}, WeightsError, "group_size is 0"),
    "no number": ({"bits": "four"}, WeightsError, "bits is 'four'"),
    "three bits": ({"bits": 3}, UnsupportedError, "supported: 4, 8"),
    "method": ({"quant_method": "gptg"}, UnsupportedError, "did you mean 'gptq'"),
    "another group": ({"group_size": 64}, WeightsError, "has shape"),
    "format": ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
    "no tensors": ({"quant_method": "awq"}, WeightsError, "qzeros"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_configs_are_refused(tmp_path, name):
    change, kind, message = CONFIGS[name]
    build(tmp_path / "m", GPTQ | change, gptq)
    with pytest.raises(kind, match=message):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "format",
    ["int4", "nf4", "w8a8", *(pytest.param(f, marks=slow) for f in ("int8", "mxfp4", "fp8"))],
)
def test_quantize_save_load(tmp_path, format):
    """What is saved loads back bit-equal, through the store too; nothing else is touched."""
    model = jaxllm.load(write_toy(tmp_path / "m", width=128, ffn=256), store=False)
    small = model.quantize(format)
    assert small.nbytes < model.nbytes
    small.save(tmp_path / "small")
    again = jaxllm.load(tmp_path / "small")
    stored = jaxllm.load(tmp_path / "small")
    assert stored.weights_stored
    ids = np.arange(12)[None]
    wanted, before = small.logits(ids), model.logits(ids)
    assert np.array_equal(again.logits(ids), wanted)
    assert np.array_equal(stored.logits(ids), wanted)
    assert 1e-4 < np.abs(wanted - before).max() < 0.5 * np.abs(before).max()
    for path in ("embed.table", "final_norm.scale"):
        assert np.array_equal(small.leaf(path), model.leaf(path))
    assert again.nbytes < 1.05 * small.nbytes  # scales of scales, once cut, are a row's own
    text = json.loads((tmp_path / "small" / "config.json").read_text())
    assert text["quantization_config"]["quant_method"] == "jaxllm"
    if format == "int4":
        tokens = [m.generate([1, 2, 3], max_tokens=4).token_ids for m in (small, again)]
        assert tokens[0] == tokens[1]


OWN = {
    "scale": ({"weight.scale": lambda a: a[:, :-1]}, {}, "down_proj.weight: scale has shape"),
    "values": ({"weight.values": lambda a: a[:-1]}, {}, "down_proj.weight: values have shape"),
    "missing": ({"weight.scale": lambda a: None}, {}, "down_proj.weight.scale is missing"),
    "format": ({}, {"format": "int5"}, "no quantized leaf"),
    "group": ({}, {"group": 0}, "no quantized leaf"),
    "shape": ({}, {"shape": [256, -128]}, "no quantized leaf"),
    "rows": ({}, {"rows": 2}, "down_proj.weight: scale has shape"),
}


@pytest.mark.parametrize("name", OWN)
def test_damaged_files_of_our_own_are_refused(tmp_path, name):
    tensors, facts, message = OWN[name]
    model = jaxllm.load(write_toy(tmp_path / "m", width=128, ffn=256), store=False)
    model.quantize("int4", group=64).save(tmp_path / "small")
    damage(tmp_path / "small", **tensors)
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["tensors"]["model.layers.0.mlp.down_proj.weight"] |= facts
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        jaxllm.load(tmp_path / "small", store=False)


def test_a_flipped_nibble_moves_the_logits(tmp_path):
    build(tmp_path / "m", GPTQ, gptq)
    ids = np.arange(12)[None]
    before = jaxllm.load(tmp_path / "m", store=False).logits(ids)
    damage(tmp_path / "m", qweight=lambda a: a ^ np.eye(*a.shape, dtype=np.int32) * 8)
    after = jaxllm.load(tmp_path / "m", store=False).logits(ids)
    assert np.abs(after - before).max() > 1e-3


def test_rules(tmp_path):
    model = jaxllm.load(write_toy(tmp_path / "m", width=128, ffn=256), store=False)
    small = model.quantize("int4", group=64, include=["layers.*.mlp.*"], exclude=["*.down"])
    layer = small.params["layers"]["0"]
    kinds = [
        isinstance(layer[a][b], QArray)
        for a, b in (("mlp", "gate_up"), ("mlp", "down"), ("attn", "qkv"))
    ]
    assert kinds == [True, False, False]
    table = model.quantize("int8", include=["embed.table"])
    assert isinstance(table.params["embed"]["table"], QArray)
    ids = np.arange(12)[None]
    wanted = model.logits(ids)
    assert np.abs(table.logits(ids) - wanted).max() < 0.05 * np.abs(wanted).max()
    with pytest.raises(ConfigError, match="some of the projections"):
        model.quantize("int4", include=["layers.*.attn.q"])
    with pytest.raises(ConfigError, match="matches no leaf"):
        model.quantize("int4", exclude=["layers.*.attention.*"])
    with pytest.raises(ConfigError, match="did you mean 'group'"):
        model.quantize("int4", grup=64)
    with pytest.raises(ShapeError, match=r"layers\.0\.attn\.o: a group of 96"):
        model.quantize("int4", group=96)


GOLDEN = Path(__file__).parent / "bitsandbytes.npz"
SHAPES = {"rows": (32, 128), "cut": (128, 192)}


@pytest.mark.parametrize("double", ["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", SHAPES)
def test_bitsandbytes(tmp_path, name, kind, double):
    """What the package packed, read as a leaf, is what the package unpacks."""
    golden = np.load(GOLDEN)
    prefix = f"{name}/{kind}/{double}/"
    tensors = {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}
    plain = tensors.pop("plain")
    write(tmp_path, tensors)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    reader = open_packed(open_safetensors(tmp_path), config, "config")
    leaf = reader.leaf("weight")
    assert isinstance(leaf, QArray)
    assert reader.tensors["weight"].shape == SHAPES[name]
    assert np.abs(np.asarray(dequantize_rows(leaf))[-4:] - plain).max() < 2e-6
    assert isinstance(leaf.scale, QArray) == (double == "double" and name == "rows")


def test_our_nf4_is_that_of_bitsandbytes():
    """The same codes and scales from the same weights."""
    golden, shape = np.load(GOLDEN), SHAPES["rows"]
    w = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    leaf = quantize_jit(w.T, Scheme(format="nf4"))
    packed = golden["rows/nf4/double/weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(shape)
    assert np.array_equal(np.asarray(leaf.values, np.uint8), codes)
    absmax = golden["rows/nf4/double/weight.absmax"].reshape(32, 2)
    assert np.array_equal(leaf.scale.values, absmax)


def test_blocks_over_the_ends_of_rows_are_refused(tmp_path):
    golden = np.load(GOLDEN)
    prefix = "rows/nf4/single/"
    tensors = {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}
    tensors.pop("plain")
    facts = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"]))
    facts["shape"] = [128, 32]
    raw = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write(tmp_path, tensors | {"weight.quant_state.bitsandbytes__nf4": raw})
    with pytest.raises(UnsupportedError, match="run over the ends of rows"):
        open_packed(open_safetensors(tmp_path), {"quant_method": "bitsandbytes"}, "config")
    write(tmp_path, tensors | {"weight.quant_state.bitsandbytes__nf4": raw[:-3]})
    with pytest.raises(WeightsError, match="no JSON"):
        open_packed(open_safetensors(tmp_path), {"quant_method": "bitsandbytes"}, "config")


@slow
def test_experts_in_mxfp4(tmp_path):
    """The family's experts packed as the published files have them: gate and up in turns."""
    folder = tmp_path / "m"
    config = json.loads((FOLDER / "gpt_oss" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 32}
    spec = FAMILIES["gpt_oss"].read(ConfigReader(config, "config"))
    draw = lambda path: RANDOM.standard_normal(layer_paths(spec)[path].shape) / 4  # noqa: E731
    save_checkpoint(folder, spec, lambda p: draw(p).astype(np.float32), dtype="float32")
    reader = open_safetensors(folder)
    tensors, rest, plain = {}, {}, {}
    for name in reader.tensors:
        array = np.array(reader.read(name))
        if not name.endswith(("gate_up_proj", "down_proj")) or array.ndim != 3:
            rest[name] = array
            continue
        experts, inputs, outputs = array.shape
        codes = RANDOM.integers(0, 16, (experts, outputs, inputs // 32, 32)).astype(np.uint8)
        exponents = RANDOM.integers(120, 127, codes.shape[:-1]).astype(np.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | (codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = exponents
        e2m1 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        values = e2m1 * np.exp2(exponents.astype(np.float32) - 127)[..., None]
        plain[name] = values.reshape(experts, outputs, inputs).swapaxes(1, 2)
    write(folder, rest | plain)
    ids = np.arange(6)[None]
    wanted = jaxllm.load(folder, store=False).logits(ids)
    write(folder, rest | tensors)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))
    model = jaxllm.load(folder, store=False)
    assert isinstance(model.params["layers"]["0"]["moe"]["down"], QArray)
    assert np.abs(model.logits(ids) - wanted).max() < 1e-4 * np.abs(wanted).max()
    model.save(tmp_path / "again")
    again = jaxllm.load(tmp_path / "again", store=False).logits(ids)
    assert np.array_equal(again, model.logits(ids))
