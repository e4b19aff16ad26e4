"""From files to (spec, params): streams one tensor at a time into the layout of the run."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core import runtime
from jaxllm.core.config import nearest
from jaxllm.core.lowrank import LowRank
from jaxllm.core.tree import Segment, flatten, unstacked_paths
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import fused_part, layer_paths, model_table
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.gguf import open_gguf
from jaxllm.zoo.packed import METHOD, fused_parts, packed_leaf, packed_tensors
from jaxllm.zoo.quantized_files import open_packed
from jaxllm.zoo.reader import Reader, TensorInfo
from jaxllm.zoo.safetensors import TensorSource, open_safetensors, write_safetensors
from jaxllm.zoo.sentence import read_pooling, write_pooling
from jaxllm.zoo.table import ConfigReader, Entry, Family, join

__all__ = [
    "Checkpoint",
    "open_checkpoint",
    "read_arrays",
    "read_spec",
    "save_checkpoint",
    "saved_paths",
    "source_hash",
]

_NO_FLOATS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened source: what the model is, and where each of its tensors stands.

    Attributes:
      path: directory or file.
      spec: the model.
      reader: gives tensors by name.
      entries: tensors on disk and the leaves they fill.
      family: how its files are read.
      updates: what is added to leaves as they are read, by unstacked path; see `zoo.adapter`.
    """

    path: Path
    spec: ModelSpec
    reader: Reader
    entries: tuple[Entry, ...]
    family: Family
    updates: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing; a model directory holds config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{path}: expected an object, found {type(data).__name__}")
    return data


def _family(kind: str, names: Callable[[Family], tuple[str, ...]], where: str) -> Family:
    for family in FAMILIES.values():
        if kind in names(family):
            return family
    known = [n for f in FAMILIES.values() for n in names(f)]
    raise UnsupportedError(f"{where}: unknown architecture {kind!r}; {nearest(kind, known)}")


def _open_gguf(path: Path) -> Checkpoint:
    reader = open_gguf(path)
    kind = str(reader.metadata.get("general.architecture"))
    family = _family(kind, lambda f: f.architectures, f"{path}: general.architecture")
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in reader.metadata.items()
        if key.startswith(f"{kind}.")
    }
    spec = family.read_gguf(ConfigReader(own, str(path)), reader.tensors)
    return Checkpoint(path, spec, reader, tuple(family.gguf_names(spec, kind)), family)


def _open_directory(path: Path) -> Checkpoint:
    config = _read_json(path / "config.json")
    kind = str(config.get("model_type"))
    family = _family(kind, lambda f: f.model_types, f"{path / 'config.json'}: model_type")
    quantization = config.pop("quantization_config", None)
    reader = None
    if family.head_tensor:
        reader = open_safetensors(path)
        kind = "ForMaskedLM" if family.head_tensor in reader.tensors else "Model"
        config["architectures"] = [kind]
    spec = family.read(ConfigReader(config, str(path / "config.json")))
    reader = reader or open_safetensors(path)
    if quantization is not None:
        reader = open_packed(reader, quantization, str(path / "config.json"))
    entries = [family.locate(entry, reader.tensors) for entry in family.names(spec)]
    if (pooling := read_pooling(path, spec.width)) is not None:
        spec = dataclasses.replace(spec, head=dataclasses.replace(spec.head, pooling=pooling))
    return Checkpoint(path, spec, reader, tuple(entries), family)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face directory, and account for every tensor in it.

    Raises:
      WeightsError: missing or damaged files; missing, misshapen or unknown tensors, all at once.
      ConfigError: a config key that is missing, contradictory or unknown.
      UnsupportedError: an architecture that no family reads.
    """
    checkpoint = _open_directory(path) if path.is_dir() else _open_gguf(path)
    _check_tensors(checkpoint)
    return checkpoint


def read_spec(path: Path) -> ModelSpec:
    """What a model is, from its config alone: the weights need not be there.

    Args:
      path: a directory with config.json, that file itself, or a GGUF file (its header is read).

    Raises:
      WeightsError, ConfigError, UnsupportedError: as `open_checkpoint`.
    """
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path).spec
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    family = _family(str(config.get("model_type")), lambda f: f.model_types, f"{file}: model_type")
    if family.head_tensor:
        return _open_directory(file.parent).spec
    config.pop("quantization_config", None)
    return family.read(ConfigReader(config, str(file)))


def _check_tensors(checkpoint: Checkpoint) -> None:
    tensors, paths = checkpoint.reader.tensors, layer_paths(checkpoint.spec)
    problems: list[str] = []
    for entry in checkpoint.entries:
        wanted = entry.disk_shape(paths[entry.path])
        if entry.disk not in tensors:
            problems.append(f"{entry.disk} is missing")
        elif tensors[entry.disk].shape != wanted:
            problems.append(f"{entry.disk} has shape {tensors[entry.disk].shape}, not {wanted}")
        elif tensors[entry.disk].dtype in _NO_FLOATS:
            problems.append(f"{entry.disk} has dtype {tensors[entry.disk].dtype}, not a float")
    problems = list(dict.fromkeys(problems))  # leaves of one tensor find the same
    used = {entry.disk for entry in checkpoint.entries}
    spared = checkpoint.family.spared(checkpoint.spec.num_layers, tensors)
    ignored = [*checkpoint.family.ignored, *spared]
    if checkpoint.spec.head.tied:
        ignored.append("lm_head.weight")
    for name in tensors:
        if name not in used and not any(fnmatch.fnmatchcase(name, g) for g in ignored):
            problems.append(f"{name} is used by nothing")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise WeightsError(f"{checkpoint.path}: {'; '.join(problems[:6])}{more}")


def read_arrays(
    checkpoint: Checkpoint,
    *,
    dtype: Any,
    segments: tuple[Segment, ...],
    fused: bool,
    matrices: str,
    packed: str = "",
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, host array or quantized leaf) in the run's layout, one at a time.

    At any moment one leaf and one source tensor are in memory.

    Args:
      checkpoint: the source.
      dtype: numpy dtype of the leaves but those that are wide.
      segments: how layers are stacked.
      fused: query/key/value and gate/up as one matrix each.
      matrices: how they are held, as `Policy.matrices` says.
      packed: how quantized tensors are held, as `Policy.codes` says; empty for plain arrays. Where
        parts of one leaf are quantized in different ways, or only some are, it is plain.
    """
    sources: dict[str, list[Entry]] = {}
    for entry in checkpoint.entries:
        sources.setdefault(entry.path, []).append(entry)
    for path, definition in flatten(model_table(checkpoint.spec, segments, fused)):
        layers = unstacked_paths(path)
        stacked = len(layers) > 1 or definition.axes[0] == "layers"
        if packed and definition.std:
            leaf = packed_leaf(checkpoint, sources, path, definition, codes=packed)
            if leaf is not None:
                yield path, leaf
                continue
        held = np.float32 if definition.wide else dtype
        out = np.empty(definition.hold(matrices).shape, held)
        ours = out.transpose(np.argsort(definition.hold_order(matrices)))
        for i, layer in enumerate(layers):
            _fill(checkpoint, sources, layer, ours[i] if stacked else ours)
        yield path, out


def _fill(
    checkpoint: Checkpoint, sources: dict[str, list[Entry]], path: str, out: np.ndarray
) -> None:
    """Fill the place of one unstacked (possibly fused) leaf."""
    paths = layer_paths(checkpoint.spec)
    fused = fused_parts(path)
    for part in fused or [path]:
        place = out[fused_part(checkpoint.spec, part)[1] if fused else ...]
        for entry in sources[part]:
            array = entry.to_ours(checkpoint.reader.read(entry.disk), paths[part])
            if part in checkpoint.updates:
                array = checkpoint.updates[part].added(array)
            at = ... if entry.index is None else entry.index
            place[at] = array.astype(out.dtype, copy=False)


def save_checkpoint(
    directory: Path,
    spec: ModelSpec,
    read: Callable[[str], Any],
    *,
    dtype: str,
    eos_ids: tuple[int, ...] = (),
    quantized: Collection[str] = (),
) -> None:
    """Write config.json and safetensors; `read` gives unstacked leaves.

    The layout is that of the first public family which can say the spec, else our own.

    Args:
      directory: made if absent; config.json is written last.
      spec: the model.
      read: unstacked path -> canonical host array, or leaf of host arrays.
      dtype: name of the arrays' dtype, for the config and the header.
      eos_ids: tokens that end generation.
      quantized: the paths of which `read` gives leaves.
    """
    family, config = _writer(spec)
    paths = layer_paths(spec)
    pooling = spec.head.pooling
    narrow = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    last: dict[str, Any] = {}

    def leaf(path: str) -> Any:
        if path not in last:  # experts, tensor by tensor, are those of one leaf
            last.clear()
            last[path] = read(path)
        return last[path]

    facts: dict[str, Any] = {}

    def tensor(parts: list[Entry]) -> Iterator[TensorSource]:
        if all(entry.path in quantized for entry in parts):
            yield from packed_tensors(parts, leaf, paths, facts)
            return
        definition = paths[parts[0].path]
        tag = "F32" if definition.wide else narrow
        shape = parts[0].disk_shape(definition)
        info = TensorInfo(shape, tag, int(np.prod(shape)) * (4 if tag == "F32" else 2))
        yield parts[0].disk, info, lambda: make(parts)

    def make(parts: list[Entry]) -> np.ndarray:
        arrays = [entry.to_disk(leaf(entry.path), paths[entry.path]) for entry in parts]
        return join(parts, arrays, parts[0].axis(paths[parts[0].path]))

    directory.mkdir(parents=True, exist_ok=True)
    tensors = itertools.chain.from_iterable(map(tensor, _by_tensor(family.names(spec))))
    write_safetensors(directory, tensors, metadata={"format": "pt"})
    if pooling is not None:
        write_pooling(directory, pooling, spec.width)
    config["torch_dtype"] = dtype
    if facts:
        config["quantization_config"] = {"quant_method": METHOD, "tensors": facts}
    if eos_ids:
        config["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def saved_paths(spec: ModelSpec) -> list[str]:
    """The unstacked paths that `save_checkpoint` reads, in its order."""
    groups = _by_tensor(_writer(spec)[0].names(spec))
    paths = [entry.path for parts in groups for entry in parts]
    return [path for i, path in enumerate(paths) if not i or path != paths[i - 1]]


def _by_tensor(entries: list[Entry]) -> list[list[Entry]]:
    """Entries grouped by tensor, the parts of one in their order on disk."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.disk, []).append(entry)
    return [sorted(parts, key=lambda entry: entry.part or ()) for parts in groups.values()]


def _writer(spec: ModelSpec) -> tuple[Family, dict[str, Any]]:
    """The family that can say a spec, and the config.json in which it does."""
    spec = dataclasses.replace(spec, head=dataclasses.replace(spec.head, pooling=None))
    said = ((family, family.write(spec)) for family in FAMILIES.values())
    return next((f, c) for f, c in said if c is not None and _same_spec(f, c, spec))


def _same_spec(family: Family, config: dict[str, Any], spec: ModelSpec) -> bool:
    try:
        return family.read(ConfigReader(config, "config")) == spec
    except ConfigError:
        return False


def source_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over the source's files; remembered by path, size and time: a start is quick."""
    files = [*checkpoint.reader.files]
    if checkpoint.path.is_dir():
        files.append(checkpoint.path / "config.json")
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    memo = runtime.weights_dir() / f"source-{key[:32]}.sha256"
    if memo.exists():
        return memo.read_text().strip()
    hasher = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    memo.write_text(hasher.hexdigest())
    return hasher.hexdigest()
