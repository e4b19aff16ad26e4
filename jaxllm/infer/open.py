"""Opening a source: its spec, its parameters in the run's layout on the devices, its tokenizer.

Weights are kept in run layout in the user's cache, keyed by the source's SHA-256, and mapped into
memory by the next start; on a CPU they are used where they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
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
from jaxllm.core.policy import Policy
from jaxllm.core.precision import default_dtype, dtype_of
from jaxllm.core.sharding import named_sharding
from jaxllm.core.tree import Segment, flatten, map_leaves, unflatten
from jaxllm.errors import ConfigError, WeightsError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import model_table
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.zoo import load as zoo
from jaxllm.zoo.families import PRESETS
from jaxllm.zoo.pull import resolve

__all__ = ["Opened", "open_source", "run_policy", "run_segments"]


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


def run_policy(dtype: str | None = None, *, mesh: Any = None, **changes: Any) -> Policy:
    """The policy that suits the device: its dtype, and the layout that decodes fastest there.

    On a CPU and a GPU one array a layer with fused projections (slices of stacked weights are
    copied at every step); on a mesh and a TPU the canonical stacks.
    """
    platform = jax.default_backend()
    kind = default_dtype(platform) if dtype is None else dtype
    dtype_of(kind)
    single = mesh is None and platform != "tpu"
    base = {
        "param_dtype": kind,
        "compute_dtype": kind,
        "layout": "unrolled" if single else "scan",
        "fused": single,
    }
    return Policy(**(base | changes))  # pyright: ignore[reportArgumentType]


def run_segments(spec: ModelSpec, policy: Policy) -> tuple[Segment, ...]:
    """How the layers of a spec are stacked under a policy."""
    if policy.layout == "unrolled":
        return tuple(Segment(i, i + 1, 1, stacked=False) for i in range(spec.num_layers))
    return spec.segments


def open_source(
    source: str, *, policy: Policy, mesh: Any = None, store: Store | None = None
) -> Opened:
    """Open a catalogue name, a Hugging Face directory, a GGUF file, or `random:PRESET`.

    Raises:
      ConfigError: the source is none of these; WeightsError: its files are missing or damaged.
    """
    if source.startswith("random:"):
        return _random(source.removeprefix("random:"), policy, mesh, store)
    checkpoint = zoo.open_checkpoint(resolve(source))
    segments = run_segments(checkpoint.spec, policy)
    if store is None:
        arrays = zoo.read_arrays(checkpoint, **_layout(policy, segments))
        placed = _place_stream(checkpoint.spec, arrays, policy, mesh)
        return _opened(checkpoint, placed, _tokenizer(checkpoint), stored=False)
    folder = _weights_folder(checkpoint, policy)
    found = load_arrays(folder)
    if found is None:
        log.info("weights: importing %s", checkpoint.path)
        for old in folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-*"):
            shutil.rmtree(old, ignore_errors=True)
        tokenizer = _tokenizer(checkpoint)
        extra = {"tokenizer": None if tokenizer is None else tokenizer.to_json()}
        save_arrays(folder, zoo.read_arrays(checkpoint, **_layout(policy, segments)), extra)
        reread = load_arrays(folder)
        if reread is None:
            raise WeightsError(f"{folder}: the weights just written cannot be read back")
        return _opened(checkpoint, _place(checkpoint.spec, reread[0], policy, mesh), tokenizer)
    tree, extra = found
    text = extra.get("tokenizer")
    tokenizer = None if text is None else Tokenizer.from_json(text)
    params = _place(checkpoint.spec, tree, policy, mesh)
    return _opened(checkpoint, params, tokenizer, stored=True)


def _layout(policy: Policy, segments: tuple[Segment, ...]) -> dict[str, Any]:
    return {"dtype": dtype_of(policy.param_dtype), "segments": segments, "fused": policy.fused}


def _opened(
    checkpoint: zoo.Checkpoint, params: Any, tokenizer: Tokenizer | None, stored: bool = False
) -> Opened:
    eos = tokenizer.eos_ids if tokenizer is not None else _config_eos(checkpoint.path)
    return Opened(
        spec=checkpoint.spec, params=params, tokenizer=tokenizer, eos_ids=eos, stored=stored
    )


def _config_eos(path: Path) -> tuple[int, ...]:
    """End tokens of a directory without a tokenizer, from its generation or model config."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            value = json.loads((path / name).read_text()).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _tokenizer(checkpoint: zoo.Checkpoint) -> Tokenizer | None:
    if checkpoint.path.is_dir():
        return Tokenizer.from_directory(checkpoint.path)
    if "tokenizer.ggml.model" not in checkpoint.reader.metadata:
        return None
    return Tokenizer.from_gguf(checkpoint.reader.metadata)


def _weights_folder(checkpoint: zoo.Checkpoint, policy: Policy) -> Path:
    """Named by source, dtype and layout, then by the code that writes it: older ones are replaced."""
    code = fingerprint.package_hash("spec", "zoo", "text", "aot/arrays.py")
    layout = f"{policy.param_dtype}-{policy.layout}{'-fused' if policy.fused else ''}"
    source = zoo.source_hash(checkpoint)[:24]
    return runtime.weights_dir() / f"{source}-{layout}-{code[:12]}"


def _sharding(definition: Any, policy: Policy, mesh: Any) -> Any:
    if mesh is None:
        return None
    return named_sharding(mesh, definition.axes, policy.rules, definition.shape)


def _place_stream(
    spec: ModelSpec, arrays: Iterator[tuple[str, np.ndarray]], policy: Policy, mesh: Any
) -> Any:
    """Arrays straight to their (sharded) place, one at a time."""
    table = dict(flatten(model_table(spec, run_segments(spec, policy), policy.fused)))
    return unflatten({p: jax.device_put(a, _sharding(table[p], policy, mesh)) for p, a in arrays})


def _place(spec: ModelSpec, tree: Any, policy: Policy, mesh: Any) -> Any:
    return _place_stream(spec, flatten(tree), policy, mesh)


def _random(name: str, policy: Policy, mesh: Any, store: Store | None) -> Opened:
    """Random weights of a preset, drawn on the devices by a program of their own."""
    if name not in PRESETS:
        raise ConfigError(f"random:{name}: unknown preset; allowed: {', '.join(PRESETS)}")
    spec = PRESETS[name]
    segments = run_segments(spec, policy)

    def build() -> Callable[..., Any]:
        from jaxllm.nn.api import init

        make = functools.partial(init, dtype=dtype_of(policy.param_dtype))
        return lambda seed: make(
            spec, jax.random.key(seed, impl="rbg"), segments=segments, fused=policy.fused
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
