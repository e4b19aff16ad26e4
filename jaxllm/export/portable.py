"""One program as a portable file: StableHLO for a platform that need not be at hand.

A file's function takes and gives lists of plain arrays, so that whoever loads it needs none of our
types: the lists hold the leaves of each argument and result in their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax
from jax import export

from jaxllm.aot.program import Program
from jaxllm.errors import UnsupportedError
from pallas_kernels.target import targeting

__all__ = ["KERNEL_CALLS", "PLATFORMS", "Portable", "portable"]

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
"""Platforms as `jax.export` names them -> as devices name them."""
KERNEL_CALLS = {
    "mosaic_gpu": "mosaic_gpu_v2",
    "mosaic_tpu": "tpu_custom_call",
    "cudnn": "__cudnn$fmhaSoftmax",
}
"""Implementations that are kernels -> the custom call that runs them."""

_CALL = re.compile(r"custom_call @([\w.$]+)|call_target_name = \"([\w.$]+)\"")
_PLUMBING = re.compile(r"Sharding|SPMD.*|xla\.sdy\..*|annotate_device_placement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portable:
    """A program in a file.

    Attributes:
      data: what `jax.export.deserialize` reads.
      convention: version of its calling convention.
      custom_calls: names of all that it calls outside of StableHLO, sorted.
      module: the StableHLO alone, for who reads it without jax.
      dropped: places of arguments that the module does not take, being without use.
    """

    data: bytes
    convention: int
    custom_calls: tuple[str, ...]
    module: bytes
    dropped: tuple[int, ...]


def portable(program: Program, platform: str) -> Portable:
    """Trace a program and lower it for a platform.

    Args:
      program: on one device, or on a mesh that may be abstract.
      platform: a key of `PLATFORMS`.

    Raises:
      UnsupportedError: the program cannot be lowered for the platform from here.
    """
    function = program.build()
    lists = [jax.tree.leaves(argument) for argument in program.args]
    structures = [jax.tree.structure(argument) for argument in program.args]

    def run(*given: list[Any]) -> list[list[Any]]:
        pairs = zip(structures, given, strict=True)
        out = function(*[jax.tree.unflatten(structure, leaves) for structure, leaves in pairs])
        return [jax.tree.leaves(result) for result in _results(out)]

    lie: dict[str, Any] = {}
    if program.out_shardings is not None:
        lie["out_shardings"] = [jax.tree.leaves(x) for x in _results(program.out_shardings)]
    jitted = jax.jit(run, donate_argnums=program.donate, **lie)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS.values()]
    with targeting(PLATFORMS[platform]), _mesh(program.mesh):
        try:
            made = export.export(jitted, platforms=[platform], disabled_checks=checks)(*lists)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedError(
                f"program {program.name} cannot be exported for {platform}: {reason}"
            ) from error
    found = {name or other for name, other in _CALL.findall(made.mlir_module())}
    return Portable(
        data=bytes(made.serialize()),
        convention=made.calling_convention_version,
        custom_calls=tuple(sorted(n for n in found if not _PLUMBING.fullmatch(n))),
        module=made.mlir_module_serialized,
        dropped=tuple(sorted({*range(len(made.in_avals))} - {*made.module_kept_var_idx})),
    )


def _results(out: Any) -> tuple[Any, ...]:
    return out if type(out) is tuple else (out,)


def _mesh(mesh: Any) -> Any:
    """The scope in which a program of a mesh is traced."""
    if mesh is None:
        return contextlib.nullcontext()
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)
