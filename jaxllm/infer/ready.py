"""A generator over parameters that lie on the devices."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.aot.program import abstract_like
from jaxllm.aot.store import Store
from jaxllm.core.policy import Policy
from jaxllm.core.tree import segments_of
from jaxllm.infer.generate import Generator
from jaxllm.infer.programs import Setup
from jaxllm.spec.model import ModelSpec

__all__ = ["COMPILER_OPTIONS", "generator_of"]

COMPILER_OPTIONS = {"gpu": (("xla_gpu_command_buffer_scheduling_mode", "CONCURRENT"),)}
"""Per-program options of XLA; this one lets independent kernels of a step overlap (+1.2 % on an
H100 at batch 1, 2026-11-24)."""


def generator_of(
    spec: ModelSpec, params: Any, policy: Policy, mesh: Any, store: Store | None
) -> Generator:
    """What runs a model's programs, with the settings that suit the device.

    Args:
      spec: the model.
      params: in the run's layout.
      policy: how it runs.
      mesh: devices, or None for one.
      store: where programs are kept, or None.
    """
    setup = Setup(
        spec=spec,
        policy=policy,
        params=jax.tree.map(_abstract if mesh is None else abstract_like, params),
        segments=segments_of(params["layers"]),
        mesh=mesh,
        options=COMPILER_OPTIONS.get(jax.default_backend(), ()),
    )
    on_cpu = jax.default_backend() == "cpu"
    return Generator(
        setup, params, store, tokens_per_call=4 if on_cpu else 8, ahead=0 if on_cpu else 1
    )


def _abstract(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
