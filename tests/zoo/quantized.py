"""Toy checkpoints in published quantized formats, packed here from their descriptions."""

import json
from pathlib import Path

import numpy as np

from jaxllm.zoo.safetensors import array_info, open_safetensors, write_safetensors
from tests.cli.toy import write_toy

WIDTHS = {"width": 128, "ffn": 256}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
RANDOM = np.random.default_rng(5)


def words(codes: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Codes of four bits, eight to an int32 along a dim; bits 4 j hold code order[j]."""
    moved = np.moveaxis(codes, axis, -1).astype(np.uint32)
    groups = moved.reshape(*moved.shape[:-1], -1, 8)
    packed = sum(groups[..., code] << np.uint32(4 * j) for j, code in enumerate(order))
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def gptq(shape, *, group=32, act_order=False, symmetric=True, v2=False):
    """(tensors, plain [out, in]) of a matrix as AutoGPTQ has it."""
    outputs, inputs = shape
    groups = inputs // group
    codes = RANDOM.integers(0, 16, (inputs, outputs))
    zeros = (
        np.full((groups, outputs), 8) if symmetric else RANDOM.integers(1, 16, (groups, outputs))
    )
    scales = RANDOM.uniform(0.005, 0.02, (groups, outputs)).astype(np.float16)
    index = np.arange(inputs) // group
    index = RANDOM.permutation(index) if act_order else index
    plain = (codes - zeros[index]) * scales[index].astype(np.float32)
    tensors = {
        "qweight": words(codes, 0),
        "qzeros": words(zeros - (not v2), 1),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    return tensors, plain.T


def awq(shape, *, group=32):
    """The same as AutoAWQ's GEMM has it."""
    outputs, inputs = shape
    codes = RANDOM.integers(0, 16, (inputs, outputs))
    zeros = RANDOM.integers(0, 16, (inputs // group, outputs))
    scales = RANDOM.uniform(0.005, 0.02, zeros.shape).astype(np.float16)
    spread = lambda a: np.repeat(a, group, axis=0)  # noqa: E731
    plain = (codes - spread(zeros)) * spread(scales).astype(np.float32)
    tensors = {
        "qweight": words(codes, 1, AWQ_ORDER),
        "qzeros": words(zeros, 1, AWQ_ORDER),
        "scales": scales,
    }
    return tensors, plain.T


def build(folder: Path, config: dict, make) -> dict[str, np.ndarray]:
    """A toy whose projections are quantized; `make` gives (tensors by suffix, plain).

    A suffix that begins with a dot follows the whole name, others the name without `weight`.

    Returns:
      plain values by name of the plain tensor.
    """
    write_toy(folder, **WIDTHS)
    reader = open_safetensors(folder)
    tensors, plain = {}, {}
    for name in reader.tensors:
        array = np.array(reader.read(name))
        if not name.endswith("_proj.weight"):
            tensors[name] = array
            continue
        made, plain[name] = make(array.shape)
        stem = name.removesuffix("weight")
        tensors |= {name + k if k[:1] in (".", "") else stem + k: v for k, v in made.items()}
    write(folder, tensors)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return plain


def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the tensors of a folder."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    give = [(n, array_info(a), lambda a=a: a) for n, a in tensors.items()]
    write_safetensors(folder, give, metadata={"format": "pt"})
