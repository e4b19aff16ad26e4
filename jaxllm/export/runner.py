"""Writing a folder for `scripts/pjrt_runner`, which needs neither Python nor jax.

A text manifest, greedy programs as StableHLO, the weights, and XLA's compile options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

from jaxllm.aot.program import Program
from jaxllm.core.config import check_new, require
from jaxllm.core.logging import log
from jaxllm.errors import UnsupportedError
from jaxllm.export.bundle import folder_beside
from jaxllm.export.portable import KERNEL_CALLS, PLATFORMS, portable
from jaxllm.export.table import Row, table
from jaxllm.export.ways import Options, Way, check_kernels, ways
from jaxllm.export.weights import Placed, abstract, parameters, placed, write_weights
from jaxllm.infer.open import open_merged, run_segments
from jaxllm.infer.programs import Setup, check_decodes
from jaxllm.infer.ready import COMPILER_OPTIONS, tokens_per_call
from jaxllm.infer.sampling import Sampling

__all__ = ["export_runner"]

_FORMAT = "jaxllm-runner 1"
_DTYPES = {
    *("bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32"),
    "float8_e4m3fn",
}
"""Dtypes of weights that the runner knows."""
_CALLS = {KERNEL_CALLS["cudnn"]}
"""Custom calls that a plugin serves by itself: handlers of all others come from Python."""


def export_runner(source: str, dest: str | Path, options: Options) -> Path:
    """Write a folder for the runner, whole or not at all.

    Args:
      source: what `jaxllm.load` takes.
      dest: a new directory.
      options: one platform, no mesh; kernels `cudnn` or none.

    Returns:
      `dest`.

    Raises:
      ConfigError: `dest` exists, or options that contradict the model or each other.
      UnsupportedError: an encoder, kernels or dtypes that the runner does not know.
      CapacityError: no space.
    """
    dest = Path(dest)
    require(dest.suffix != ".tar", f"{dest}: the runner reads a directory, not a .tar")
    check_new(dest, "a new directory")
    require(
        len(options.platforms) == 1 and not options.meshes,
        "--runner writes programs for one device: give --platform cpu or --platform cuda, and no "
        "--mesh",
    )
    require(
        not options.native,
        "--native: the runner compiles for its own plugin; call it with --native instead",
    )
    for op, name in (("attention", options.attention), ("experts", options.experts)):
        require(
            name is None or not name.startswith("mosaic"),
            f"--{op} {name}: handlers of Mosaic's kernels come from Python, and the runner has "
            "none; allowed: cudnn, reference",
        )
    require(not options.apart, "the runner adds no adapters: merge one by --adapter instead")
    (way,) = ways(options)
    with folder_beside(dest) as folder:
        _write(folder, source, way, options)
        if dest.exists():
            dest.rmdir()
        folder.rename(dest)
    return dest


def _write(folder: Path, source: str, way: Way, options: Options) -> None:
    opened = open_merged(source, options.adapter, policy=way.policy, put=Placed)
    check_decodes(opened.spec)
    params = placed(opened.params)
    context, _, _ = options.sizes.fit(opened.spec)
    lines = [
        _FORMAT,
        f"made_by jax {jax.__version__}",
        f"platform {way.platform}",
        f"context {context}",
        f"vocab {opened.spec.vocab}",
        " ".join(["ends_at", *map(str, opened.eos_ids)]),
        *_parameters(folder, params),
    ]
    setup = Setup(
        spec=opened.spec,
        policy=way.policy,
        params=abstract(params),
        segments=run_segments(opened.spec, way.policy),
        name=way.name,
    )
    (folder / "programs").mkdir()
    count = tokens_per_call(PLATFORMS[way.platform])
    rows = [r for r in table(setup, options.sizes, tokens_per_call=count) if r.mode != "penalize"]
    lines += [_program(folder, row, way) for row in rows]
    (folder / "compile_options.pb").write_bytes(_compile_options(way))
    (folder / "manifest.txt").write_text("\n".join([*lines, "end"]) + "\n")


def _parameters(folder: Path, params: Any) -> list[str]:
    """Write the weights; a line an array, in the order in which programs take them."""
    rows = parameters(params)
    unknown = sorted({leaf.array.dtype.name for _, leaf in rows} - _DTYPES)
    if unknown:
        raise UnsupportedError(
            f"the runner knows no arrays of {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_DTYPES))}: export the model unquantized, or in int8"
        )
    where = write_weights(folder / "weights", params)
    lines = []
    for name, leaf in rows:
        file, offset = where[name]
        array = leaf.array
        words = [name, file.relative_to(folder).as_posix(), offset, array.nbytes, array.dtype.name]
        lines.append(" ".join(map(str, ["parameter", *words, *array.shape])))
    return lines


def _program(folder: Path, row: Row, way: Way) -> str:
    """Write a program without its sampling options; its line."""
    log.info("export: program %s for the runner", row.name)
    made = portable(_greedy(row), way.platform)
    if row.kind in ("prefill", "extend"):
        check_kernels(way.policy, way.platform, {row.name: made.custom_calls})
    foreign = sorted(set(made.custom_calls) - _CALLS)
    if foreign:
        raise UnsupportedError(
            f"program {row.name} calls {', '.join(foreign)}, whose handlers come from Python: the "
            "runner has none; use --attention cudnn or reference, and no packed integers on cuda"
        )
    name = row.name.replace("-greedy", "")
    (folder / "programs" / f"{name}.mlirbc").write_bytes(made.module)
    tokens = row.to if row.kind == "grow" else row.tokens
    words = [name, row.kind, tokens, row.capacity, f"programs/{name}.mlirbc", *made.dropped]
    return " ".join(map(str, ["program", *words]))


def _greedy(row: Row) -> Program:
    """The program of a greedy row without the arguments that only sampling reads."""
    program = row.program
    if row.kind == "grow":
        return program
    fixed = Sampling().rows(1)

    def build() -> Callable[..., Any]:
        function = program.build()
        return lambda *given: function(*given, jax.tree.map(np.asarray, fixed))

    return dataclasses.replace(program, build=build, args=program.args[:-1])


def _compile_options(way: Way) -> bytes:
    """A CompileOptionsProto for one device."""
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    build = options.executable_build_options
    build.num_replicas = build.num_partitions = 1
    options.env_option_overrides = list(COMPILER_OPTIONS.get(PLATFORMS[way.platform], ()))
    return options.SerializeAsString()
