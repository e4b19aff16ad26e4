"""The ways in which a bundle can be run: a platform, one device or a mesh, and a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.core.config import nearest, require
from jaxllm.core.mesh import AXES, parse_mesh
from jaxllm.core.policy import Policy
from jaxllm.errors import UnsupportedError
from jaxllm.export.portable import KERNEL_CALLS, PLATFORMS
from jaxllm.export.table import Sizes
from jaxllm.infer.open import run_policy

__all__ = ["Options", "Way", "check_kernels", "ways"]

_AT_HOME = {"cudnn": "cuda", "mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""Kernels -> the platform that has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is exported.

    Attributes:
      platforms: keys of `PLATFORMS`.
      meshes: texts such as `data=2,tensor=4`, a set of programs each; none for one device.
      sizes: shapes of the programs.
      dtype: of weights and activations; what suits each platform by default.
      attention: `reference`, which runs everywhere, or a kernel, on the platform that has it.
      experts: `ragged_dot`, which runs everywhere, or a kernel, in the same way.
      native: compile for this machine too, and put the executables beside the programs.
      adapter: folder of a LoRA adapter that is merged into the weights.
      apart: (name, folder) of adapters that are kept beside them, to be added when it is run.
    """

    platforms: tuple[str, ...] = tuple(PLATFORMS)
    meshes: tuple[str, ...] = ()
    sizes: Sizes = Sizes()
    dtype: str | None = None
    attention: str | None = None
    experts: str | None = None
    native: bool = False
    adapter: Path | None = None
    apart: tuple[tuple[str, Path], ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.platforms), "platforms: name at least one")
        for name in self.platforms:
            require(name in PLATFORMS, f"platform {name!r} is unknown; {nearest(name, PLATFORMS)}")
        for op, name in (("attention", self.attention), ("experts", self.experts)):
            home = _AT_HOME.get(name or "")
            require(
                home is None or home in self.platforms,
                f"{op} {name!r} runs on {home}, which is none of the platforms "
                f"{', '.join(self.platforms)}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a bundle.

    Attributes:
      platform: a key of `PLATFORMS`.
      mesh: an abstract mesh, or None for one device.
      policy: how it runs there.
    """

    platform: str
    mesh: Any
    policy: Policy

    @property
    def name(self) -> str:
        """Of its folder of programs."""
        if self.mesh is None:
            return self.platform
        sizes = [f"{axis}{size}" for axis, size in self.mesh.shape.items() if size > 1]
        return "-".join([self.platform, *sizes])

    @property
    def said(self) -> str:
        """For people."""
        axes = [] if self.mesh is None else self.mesh.shape.items()
        sizes = ",".join(f"{axis}={size}" for axis, size in axes if size > 1)
        devices = 1 if self.mesh is None else self.mesh.size
        return f"{self.platform} x {devices}" + (f" (mesh {sizes})" if sizes else "")

    @property
    def layout(self) -> str:
        """Of its weights; ways of one layout share them."""
        policy = self.policy
        parts = [policy.param_dtype, policy.layout, policy.matrices, policy.codes]
        return "-".join(parts + ["fused"] * policy.fused)


def ways(options: Options) -> Iterator[Way]:
    """All ways that the options ask for."""
    meshes = [_abstract(text) for text in options.meshes] or [None]
    for platform in dict.fromkeys(options.platforms):
        for mesh in meshes:
            yield Way(platform=platform, mesh=mesh, policy=_policy(options, platform, mesh))


def _policy(options: Options, platform: str, mesh: Any) -> Policy:
    """With choices that do not hang on the machine that exports."""

    def choice(asked: str | None, default: str) -> str:
        return asked if asked and _AT_HOME.get(asked, platform) == platform else default

    return run_policy(
        options.dtype,
        mesh=mesh,
        platform=PLATFORMS[platform],
        scan="chunked",
        attention=choice(options.attention, "reference"),
        experts=choice(options.experts, "auto" if platform == "cpu" else "ragged_dot"),
        decode="plain",
    )


def _abstract(text: str) -> Any:
    sizes = parse_mesh(text)
    require(bool(sizes), f"mesh {text!r}: write data=2,tensor=4")
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=kinds)


def check_kernels(policy: Policy, platform: str, calls: dict[str, tuple[str, ...]]) -> None:
    """Refuse programs that were to call kernels and do not.

    Args:
      policy: what was asked for.
      platform: for the message.
      calls: name of each program that takes in a prompt -> its custom calls.

    Raises:
      UnsupportedError: a kernel is missing.
    """
    for op, name in (("attention", policy.attention), ("experts", policy.experts)):
        for program, found in calls.items():
            if name in KERNEL_CALLS and KERNEL_CALLS[name] not in found:
                raise UnsupportedError(
                    f"the export for {platform} asks for {op} {name!r}, but its program {program} "
                    f"calls no {KERNEL_CALLS[name]} (it calls {', '.join(found) or 'nothing'}): "
                    "the kernel was lost to the reference"
                )
