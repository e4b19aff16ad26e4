"""Opening a source: its spec, its parameters in the run's layout on the devices, its tokenizer.

Weights are kept in run layout in the user's cache, keyed by the source's SHA-256, and mapped into
memory by the next start; on a CPU they are used where they lie.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.aot import fingerprint
from jaxllm.aot.arrays import load_arrays, save_arrays
from jaxllm.aot.program import Program
from jaxllm.aot.store import Store
from jaxllm.core import runtime
from jaxllm.core.config import to_dict
from jaxllm.core.logging import log
from jaxllm.core.packing import apart, together
from jaxllm.core.policy import Policy
from jaxllm.core.precision import default_dtype, dtype_of
from jaxllm.core.qarray import QArray
from jaxllm.core.qrows import quantized_axes
from jaxllm.core.sharding import named_sharding
from jaxllm.core.tree import Segment, flatten, map_leaves, single_segments, stack_equal, unflatten
from jaxllm.core.weights import OutputsFirst
from jaxllm.errors import ConfigError, WeightsError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import model_table
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.zoo import load as zoo
from jaxllm.zoo.adapter import with_adapter
from jaxllm.zoo.families import PRESETS
from jaxllm.zoo.pull import resolve

__all__ = ["Opened", "checkpoint_of", "open_merged", "open_source", "run_policy", "run_segments"]

Put = Callable[[Any, Any], Any]
"""(array on the host, sharding or None) -> what stands for it in the parameters."""

_CODE_LETTERS = 12
"""Letters of the hash of the importing code at the end of a stored weight folder's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A source, ready to run.

    Attributes:
      spec: what the model is.
      params: parameters in the run's layout, on the devices.
      tokenizer: or None where the source has none.
      eos_ids: tokens that end generation.
      stored: whether the weights came from the cache.
    """

    spec: ModelSpec
    params: Any
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    stored: bool


def run_policy(
    dtype: str | None = None, *, mesh: Any = None, platform: str | None = None, **changes: Any
) -> Policy:
    """The policy that suits a device: its dtype, and the layout that decodes fastest there.

    On a CPU and a GPU one array a layer with fused projections (slices of stacked weights are
    copied at every step); on a mesh and a TPU the canonical stacks. `platform` is `cpu`, `gpu` or
    `tpu`; by default that of the devices at hand.
    """
    platform = platform or jax.default_backend()
    kind = default_dtype(platform) if dtype is None else dtype
    dtype_of(kind)
    single = mesh is None and platform != "tpu"
    base = {
        "param_dtype": kind,
        "compute_dtype": kind,
        "layout": "unrolled" if single else "scan",
        "fused": single,
        "matrices": {"gpu": "out_in", "cpu": "in_out"}.get(platform if single else "", "canonical"),
        "codes": "planes" if single and platform == "cpu" else "values",
    }
    return Policy(**(base | changes))  # pyright: ignore[reportArgumentType]


def run_segments(spec: ModelSpec, policy: Policy) -> tuple[Segment, ...]:
    """How the layers of a spec are stacked under a policy."""
    if policy.layout == "unrolled":
        return single_segments(spec.num_layers)
    return stack_equal(spec.pattern.names) if policy.layout == "runs" else spec.segments


def open_source(
    source: str,
    *,
    policy: Policy,
    mesh: Any = None,
    store: Store | None = None,
    packed: bool | None = None,
    put: Put = jax.device_put,
) -> Opened:
    """Open a catalogue name, a Hugging Face directory, a GGUF file, or `random:PRESET`.

    `packed` as in `load`; `put` takes each array of a file and its sharding, and gives what stands
    for it in the parameters.

    Raises:
      ConfigError: the source is none of these; WeightsError: its files are missing or damaged.
    """
    if source.startswith("random:"):
        return _random(source.removeprefix("random:"), policy, mesh, store)
    checkpoint = checkpoint_of(source)
    packed = checkpoint.path.is_dir() if packed is None else packed
    layout = _layout(policy, run_segments(checkpoint.spec, policy), packed)
    stored, known = False, None
    if store is None:
        arrays = zoo.read_arrays(checkpoint, **layout)
    else:
        arrays, known, stored = _kept_arrays(checkpoint, policy, layout)
    params = _place(checkpoint.spec, arrays, policy, mesh, put)
    return _opened(checkpoint, params, known, stored)


def open_merged(
    source: str, adapter: Path | None, *, policy: Policy, mesh: Any = None, put: Put
) -> Opened:
    """Open a source with an adapter, if any, merged into it, past the cache; see `open_source`.

    Raises:
      ConfigError, WeightsError: of the source; WeightsError, UnsupportedError: of the adapter.
    """
    if adapter is None:
        return open_source(source, policy=policy, mesh=mesh, put=put)
    checkpoint = with_adapter(checkpoint_of(source), adapter)
    layout = _layout(policy, run_segments(checkpoint.spec, policy), packed=checkpoint.path.is_dir())
    arrays = zoo.read_arrays(checkpoint, **layout)
    params = _place(checkpoint.spec, arrays, policy, mesh, put)
    return _opened(checkpoint, params, None, stored=False)


def checkpoint_of(source: str) -> zoo.Checkpoint:
    """The files of a source, which is not `random:PRESET`.

    Raises:
      ConfigError: it is; or no source; WeightsError: its files are missing or damaged.
    """
    if source.startswith("random:"):
        raise ConfigError(f"{source}: has no files; give a source that has")
    return zoo.open_checkpoint(_model_path(resolve(source)))


def _opened(checkpoint: zoo.Checkpoint, params: Any, known: str | None, stored: bool) -> Opened:
    tokenizer = _tokenizer(checkpoint, known)
    eos = tokenizer.eos_ids if tokenizer is not None else _config_eos(checkpoint.path)
    return Opened(
        spec=checkpoint.spec, params=params, tokenizer=tokenizer, eos_ids=eos, stored=stored
    )


def _model_path(path: Path) -> Path:
    """The model of a run directory, else the path itself."""
    if (path / "metrics.jsonl").is_file():
        if not (path / "model" / "config.json").is_file():
            raise WeightsError(f"{path}: this training run has not finished; run it to its end")
        return path / "model"
    return path


def _kept_arrays(
    checkpoint: zoo.Checkpoint, policy: Policy, layout: dict[str, Any]
) -> tuple[Iterable[tuple[str, Any]], str | None, bool]:
    """(mapped leaves, a GGUF file's tokenizer, whether they were there), imported if need be."""
    folder = _weights_folder(checkpoint, policy, layout["packed"])
    found = load_arrays(folder)
    stored = found is not None
    if found is None:
        log.info("weights: importing %s", checkpoint.path)
        for old in folder.parent.glob(folder.name[:-_CODE_LETTERS] + "?" * _CODE_LETTERS):
            shutil.rmtree(old, ignore_errors=True)
        tokenizer = None if checkpoint.path.is_dir() else _tokenizer(checkpoint, None)
        extra: dict[str, Any] = {"quantized": {}}
        if tokenizer is not None:
            extra["tokenizer"] = tokenizer.to_json()
        leaves = zoo.read_arrays(checkpoint, **layout)
        save_arrays(folder, apart(leaves, extra["quantized"]), extra)
        found = load_arrays(folder)
    if found is None:
        raise WeightsError(f"{folder}: the weights just written cannot be read back")
    leaves = together(dict(flatten(found[0])), found[1].get("quantized", {}))
    return leaves, found[1].get("tokenizer"), stored


def _layout(policy: Policy, segments: tuple[Segment, ...], packed: bool) -> dict[str, Any]:
    return {
        "dtype": dtype_of(policy.param_dtype),
        "segments": segments,
        "fused": policy.fused,
        "matrices": policy.matrices,
        "packed": policy.codes if packed else "",
    }


def _config_eos(path: Path) -> tuple[int, ...]:
    """End tokens of a directory without a tokenizer, from its generation or model config."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            data = json.loads((path / name).read_text())
            value = data.get("eos_token_id", (data.get("text_config") or {}).get("eos_token_id"))
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _tokenizer(checkpoint: zoo.Checkpoint, known: str | None) -> Tokenizer | None:
    """The source's tokenizer; `known` is the JSON of a GGUF file's, kept beside its weights."""
    if checkpoint.path.is_dir():
        return Tokenizer.from_directory(checkpoint.path)
    if known is not None:
        return Tokenizer.from_json(known)
    if "tokenizer.ggml.model" not in checkpoint.reader.metadata:
        return None
    return Tokenizer.from_gguf(checkpoint.reader.metadata)


def _weights_folder(checkpoint: zoo.Checkpoint, policy: Policy, packed: str) -> Path:
    """Named by source, dtype and layout, then by the code that writes it: older ones give way."""
    leaves = ("core/packing.py", "core/layouts.py", "core/qrows.py", "core/qarray.py")
    code = fingerprint.package_hash("spec", "zoo", "text", *leaves, "aot/arrays.py")
    layout = "+".join(
        [policy.param_dtype, policy.layout, policy.matrices]
        + ["fused"] * policy.fused
        + ([packed] if packed else [])
    )
    source = zoo.source_hash(checkpoint)[:24]
    return runtime.weights_dir() / f"{source}-{layout}-{code[:_CODE_LETTERS]}"


def _sharding(definition: ParamDef, policy: Policy, mesh: Any) -> Any:
    """Where a leaf's held array goes."""
    if mesh is None:
        return None
    held = definition.hold(policy.matrices)
    return named_sharding(mesh, held.axes, policy.rules, held.shape)


def _place(
    spec: ModelSpec, arrays: Iterable[tuple[str, Any]], policy: Policy, mesh: Any, put: Put
) -> Any:
    """Held arrays straight to their (sharded) place, one at a time, as leaves."""
    table = dict(flatten(model_table(spec, run_segments(spec, policy), policy.fused)))

    def leaf(path: str, array: Any) -> Any:
        definition = table[path]
        if isinstance(array, QArray):
            return _place_packed(array, definition, policy, mesh, put)
        placed = put(array, _sharding(definition, policy, mesh))
        inputs = definition.held_inputs(policy.matrices)
        return OutputsFirst(placed, inputs=inputs) if inputs else placed

    return unflatten({path: leaf(path, array) for path, array in arrays})


def _place_packed(
    leaf: QArray, definition: ParamDef, policy: Policy, mesh: Any, put: Put
) -> QArray:
    """A quantized leaf's arrays to their places."""
    if mesh is None:
        return jax.tree.map(lambda a: put(a, None), leaf)
    axes = quantized_axes(leaf, definition.axes)
    return jax.tree.map(
        lambda a, names: put(a, named_sharding(mesh, names, policy.rules, a.shape)),
        leaf,
        axes,
    )


def _random(name: str, policy: Policy, mesh: Any, store: Store | None) -> Opened:
    """Random weights of a preset, drawn on the devices by a program of their own."""
    if name not in PRESETS:
        raise ConfigError(f"random:{name}: unknown preset; allowed: {', '.join(PRESETS)}")
    spec = PRESETS[name]
    segments = run_segments(spec, policy)

    def build() -> Callable[..., Any]:
        from jaxllm.nn.api import hold, init

        dtype = dtype_of(policy.param_dtype)
        layout = {"segments": segments, "fused": policy.fused}
        return lambda seed: hold(
            spec, init(spec, jax.random.key(seed, impl="rbg"), dtype=dtype, **layout), policy
        )

    table = model_table(spec, segments, policy.fused)
    out = map_leaves(lambda _, d: _sharding(d, policy, mesh), table)
    program = Program(
        name=f"{name}-init",
        build=build,
        args=(jax.ShapeDtypeStruct((), np.uint32),),
        depends={"spec": to_dict(spec), "policy": to_dict(policy)},
        out_shardings=None if mesh is None else out,
        mesh=mesh,
    )
    params = program.load(store)(jax.device_put(np.uint32(0)))
    return Opened(spec=spec, params=params, tokenizer=None, eos_ids=(), stored=True)
