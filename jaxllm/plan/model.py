"""A cost model of a training step: quick, rough, and only for the order in which to compile.

Per device, with n rows of T tokens, L layers, width D, c bytes a value of the compute dtype:

  compute   needed FLOPs x what remat runs again / devices / peak
  network   fsdp: parameters gathered twice and gradients scattered, each c x P / tensor bytes;
            data: gradients all-reduced; tensor: 8 passes of n T D c bytes a layer (gathers and
            scatters around attention and feed-forward, forward and backward)
  memory    parameters and moments by their table, and what a layer keeps for its backward pass
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jaxllm.core.mesh import parse_mesh
from jaxllm.core.precision import dtype_of
from jaxllm.plan.place import Place
from jaxllm.spec.cost import flops, num_params
from jaxllm.spec.model import ModelSpec
from jaxllm.train.config import RunConfig
from jaxllm.train.devices import row_flops

__all__ = ["Guess", "guess"]

_AGAIN = {"none": 0.0, "save_dots": 0.02, "save_attention": 0.75, "full": 1.0, "offload": 0.02}
"""Share of the layers' forward pass that the backward pass runs again."""

_KEPT = {"none": 34.0, "save_dots": 16.0, "save_attention": 4.0, "full": 2.0, "offload": 2.0}
"""Values of width D that a layer keeps a token; source for `none`: Korthikanti et al.,
arXiv 2205.05198, eq. 2 (34 bytes x s b h with two-byte values are 17 values and scores; unfused
elementwise results double them)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """Of one device and step.

    Attributes:
      seconds: compute and network, one after the other: what hides what is the compiler's.
      memory_bytes: at the peak.
      tokens_per_s: over all devices.
    """

    seconds: float
    memory_bytes: float
    tokens_per_s: float


@functools.lru_cache(maxsize=64)
def _layers_flops(spec: ModelSpec, length: int) -> float:
    """Of a row's forward pass without the head."""
    part = flops(spec, length)
    return float(part["total"] - part["head"])


_num_params = functools.lru_cache(maxsize=64)(num_params)


def _state_bytes(config: RunConfig, sizes: dict[str, int]) -> float:
    """Parameters, gradients and moments by the table of the run."""
    fsdp, tensor, data = (sizes.get(axis, 1) for axis in ("fsdp", "tensor", "data"))
    one = _num_params(config.spec) / tensor * dtype_of(config.param_dtype).itemsize
    split = {
        "replicated": (1, 1, 1),
        "zero1": (1, 1, fsdp),
        "zero2": (1, fsdp, fsdp),
        "zero3": (fsdp, fsdp, fsdp),
        "hybrid": (fsdp, fsdp * data, fsdp * data),
    }
    params, gradients, moments = split[config.sharding]
    return one / params + one / gradients + 2 * one / moments


def guess(config: RunConfig, place: Place) -> Guess:
    """Time and memory of a step of a settled config, without compiling it.

    Args:
      config: with a named remat policy.
      place: of which peak and bandwidths are known.
    """
    sizes, spec = parse_mesh(config.mesh), config.spec
    fsdp, tensor, data = (sizes.get(axis, 1) for axis in ("fsdp", "tensor", "data"))
    devices = math.prod(sizes.values())
    limits, peak = place.limits, place.peak(config.dtype)
    assert limits is not None and peak is not None
    width = dtype_of(config.dtype).itemsize
    again = _AGAIN[config.remat] * _layers_flops(spec, config.length)
    work = config.batch * (row_flops(spec, config.length) + again)
    ring = lambda n: (n - 1) / n  # noqa: E731
    whole = _num_params(spec) * width / tensor
    gathers = 3 if config.sharding in ("zero3", "hybrid") else 2
    sent = gathers * whole * ring(fsdp) + 2 * whole * ring(data) / fsdp
    rows = config.batch / (devices / tensor)
    tokens = rows * config.length
    sent += 8 * spec.num_layers * tokens * spec.width * width * ring(tensor)
    seconds = work / devices / peak + sent / limits.link_bytes_per_s
    kept = _KEPT[config.remat] * spec.num_layers * tokens / config.accumulate * spec.width * width
    chunk = min(tokens, config.loss.chunk_tokens) * spec.vocab / tensor * 4
    memory = _state_bytes(config, sizes) + kept / tensor + chunk
    return Guess(
        seconds=seconds,
        memory_bytes=memory,
        tokens_per_s=config.batch * config.length / seconds,
    )
