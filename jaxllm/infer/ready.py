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

__all__ = ["COMPILER_OPTIONS", "generator_of", "tokens_per_call"]

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
    platform = jax.default_backend()
    return Generator(
        setup,
        params,
        store,
        tokens_per_call=tokens_per_call(platform),
        ahead=0 if platform == "cpu" else 1,
    )


def tokens_per_call(platform: str) -> int:
    """Decode steps of one program call: few where stopping late costs, many where calls do."""
    return 4 if platform == "cpu" else 8


def _abstract(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
