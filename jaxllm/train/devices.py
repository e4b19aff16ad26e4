"""Peaks and limits of devices by jax's `device_kind`, and the FLOPs that a training step needs.

MFU (model FLOPs utilisation) is needed FLOPs / second / peak. A device or dtype that is not in the
table has no MFU, rather than a wrong one. So the kinds are whole strings: a part of a card
(`... MIG 3g.40gb`), a cut-down one (`RTX 4090 D`) or a laptop's is another kind.

Sources. NVIDIA's data sheets print twice these numbers ("with sparsity"); the dense ones are:
H100 (SXM, PCIe, NVL): "H100 Tensor Core GPU" data sheet. H200: its data sheet (SXM). GH200: "Grace
Hopper Superchip" data sheet. A100: "A100 Tensor Core GPU" data sheet. B200, GB200: "GB200 NVL72"
and "HGX B200" specifications. L4, L40S: their data sheets. RTX 4090: "Ada GPU architecture"
whitepaper, bf16 with float32 accumulation. TPU: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
("peak compute per chip, bf16"), tpu7x; their kinds as in jax/_src/tpu_info.py. jax sees a v2, v3
or 7x chip as two devices: v2 and v3 are left out, a TPU7x stands for half a chip.

Memory, its bandwidth and links: the same pages and data sheets. TPU pages give "bidirectional ICI
bandwidth per chip", NVIDIA's sheets "NVLink" (both directions together); a device sends half of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxllm.spec.cost import flops
from jaxllm.spec.model import ModelSpec

__all__ = ["Limits", "limits", "peak_flops", "row_flops", "step_flops"]

_TERA = 1e12

_HALF_AND_SINGLE = {
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756.0, 51.0),
    "NVIDIA H100 NVL": (835.5, 60.0),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA GH200 480GB": (989.4, 66.9),
    "NVIDIA B200": (2250.0, 75.0),
    "NVIDIA GB200": (2500.0, 80.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5),
    "NVIDIA L4": (121.0, 30.3),
    "NVIDIA L40S": (362.0, 91.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
}
"""TFLOP/s in bfloat16 and float16 (float32 accumulation), and in float32. The latter is that of the
float32 units, not of TF32: `ops/linear.py` multiplies float32 at full precision (an 8192^3 product
on an H100: 51 TFLOP/s; in TF32 it would be 386; 2026-11-25)."""

_TPU_BFLOAT16 = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
}
"""TFLOP/s in bfloat16; none is published for float32, and float16 is no type of these chips."""

_GIB, _GB = 2**30, 1e9
_MEMORY_AND_LINKS = {
    "NVIDIA H100 80GB HBM3": (80 * _GB, 3350, 450),
    "NVIDIA H100 PCIe": (80 * _GB, 2000, 300),
    "NVIDIA H100 NVL": (94 * _GB, 3900, 300),
    "NVIDIA H200": (141 * _GB, 4800, 450),
    "NVIDIA GH200 480GB": (96 * _GB, 4000, 450),
    "NVIDIA B200": (180 * _GB, 7700, 900),
    "NVIDIA GB200": (186 * _GB, 8000, 900),
    "NVIDIA A100-SXM4-40GB": (40 * _GB, 1555, 300),
    "NVIDIA A100-SXM4-80GB": (80 * _GB, 2039, 300),
    "NVIDIA L4": (24 * _GB, 300, 32),
    "NVIDIA L40S": (48 * _GB, 864, 32),
    "NVIDIA GeForce RTX 4090": (24 * _GB, 1008, 32),
    "TPU v5 lite": (16 * _GIB, 819, 200),
    "TPU v5": (95 * _GIB, 2765, 600),
    "TPU v6 lite": (32 * _GIB, 1638, 400),
    "TPU7x": (96 * _GIB, 3690, 300),
}
"""Bytes of memory, GB/s of memory, GB/s that a device can send over all its links (cards without
NVLink: PCIe gen 4 x16)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device holds and moves.

    Attributes:
      memory_bytes: of its main memory.
      memory_bytes_per_s: read and written.
      link_bytes_per_s: that it can send to other devices, over all its links together.
    """

    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float


def limits(device_kind: str) -> Limits | None:
    """Memory and bandwidths of one device, or None if they are not known."""
    found = _MEMORY_AND_LINKS.get(device_kind)
    if found is None:
        return None
    memory, moved, sent = found
    return Limits(
        memory_bytes=int(memory), memory_bytes_per_s=moved * _GB, link_bytes_per_s=sent * _GB
    )


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of one device with matmul inputs of a dtype, or None if it is not known.

    Args:
      device_kind: as jax says it.
      dtype: `float32`, `bfloat16` or `float16`.
    """
    if device_kind in _HALF_AND_SINGLE:
        half, single = _HALF_AND_SINGLE[device_kind]
        known = {"bfloat16": half, "float16": half, "float32": single}
    else:
        known = {"bfloat16": _TPU_BFLOAT16.get(device_kind)}
    tera = known.get(dtype)
    return None if tera is None else tera * _TERA


@functools.lru_cache(maxsize=65536)
def row_flops(spec: ModelSpec, tokens: int) -> float:
    """FLOPs that a training step needs for one document of a row.

    Three times those of the forward pass: the backward pass has two products for each of its own.
    Masked pairs, embedding lookups and what remat computes again count nothing.
    """
    return 3.0 * flops(spec, tokens)["total"]


def step_flops(spec: ModelSpec, batch: Any, *, rows: int) -> float:
    """FLOPs that a step needs; tokens attend within their own segment only.

    Args:
      spec: the model.
      batch: a `Batch` of host arrays [B, T].
      rows: of the step; where `batch` holds a part of them, the others count as these.
    """
    held, length = batch.tokens.shape
    if batch.segment_ids is None:
        return rows * row_flops(spec, length)
    ids = np.asarray(batch.segment_ids)
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = np.append(np.flatnonzero(starts), ids.size)
    lengths, counts = np.unique(np.diff(bounds), return_counts=True)
    total = sum(int(n) * row_flops(spec, int(t)) for t, n in zip(lengths, counts, strict=True))
    return total * rows / held
