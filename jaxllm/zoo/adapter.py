"""LoRA adapters as PEFT saves them, for any family: low-rank updates of a model's leaves.

Source of the format: huggingface.co/docs/peft, "Checkpoint format": adapter_config.json, and
adapter_model.safetensors with `base_model.model.MODULE.lora_A.weight` [R, in], `lora_B` [out, R].
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.config import nearest
from jaxllm.core.lowrank import LowRank
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.load import Checkpoint
from jaxllm.zoo.reader import Reader
from jaxllm.zoo.safetensors import open_safetensors
from jaxllm.zoo.table import Entry

__all__ = ["read_adapter", "with_adapter"]

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to draw the first factors which leave the base weights as they were."""
_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "bias"),
}
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_config", "megatron_core"),
    *("eva_config", "loftq_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
"""Keys that change nothing of W + scale b a; others are refused unless they are off."""
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Ranks and scales of adapter_config.json."""

    r: int
    alpha: float
    root: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank(self, module: str) -> int:
        """R of a module."""
        return int(_of(self.ranks, module, self.r))

    def scale(self, module: str) -> float:
        """What the product of the factors is multiplied by: alpha / R, or alpha / sqrt(R)."""
        rank = self.rank(module)
        return float(_of(self.alphas, module, self.alpha)) / (
            math.sqrt(rank) if self.root else rank
        )


def _of(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """The value of the first pattern that matches a module's last names."""
    hits = (v for key, v in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module))
    return next(hits, usual)


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint that is read with an adapter merged into it; see `read_adapter`."""
    return dataclasses.replace(checkpoint, updates=read_adapter(checkpoint, folder))


def read_adapter(checkpoint: Checkpoint, folder: Path) -> dict[str, LowRank]:
    """Unstacked path -> update, of every leaf that an adapter changes.

    Args:
      checkpoint: the base model.
      folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
      WeightsError: missing or damaged files; modules that the model has not, ranks or shapes that
        do not fit, all at once.
      UnsupportedError: another kind of adapter than LoRA on matrices, or a quantized base.
    """
    settings = _settings(folder / "adapter_config.json")
    reader = open_safetensors(folder / "adapter_model.safetensors")
    pairs, problems = _pairs(reader)
    entries = _entries(checkpoint, list(pairs))
    found: dict[str, LowRank] = {}
    for module, names in pairs.items():
        if module not in entries:
            near = nearest(module, entries).partition("allowed: ")[0]
            problems.append(f"{module} is no matrix of the model{near and '; '}{near.strip()}")
            continue
        rank, (a, b) = settings.rank(module), (reader.tensors[name].shape for name in names)
        outputs, inputs = _sides(entries[module][0], checkpoint)
        if (a, b) != ((rank, inputs), (outputs, rank)):
            wanted = f"{(rank, inputs)} and {(outputs, rank)} at rank {rank}"
            problems.append(f"{module}: lora_A and lora_B have shapes {a} and {b}, not {wanted}")
            continue
        a, b = (reader.read(name).astype(np.float32) for name in names)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            problems.append(f"{module}: holds values that are not finite")
        b *= np.float32(settings.scale(module))
        for entry in entries[module]:
            found[entry.path] = _update(a, b, entry, layer_paths(checkpoint.spec)[entry.path])
    if problems or not found:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        said = "; ".join(problems[:_SHOWN]) or "holds no lora_A and lora_B"
        raise WeightsError(f"{folder}: {said}{more}")
    _check_plain(checkpoint, folder, found)
    return found


def _settings(path: Path) -> _Settings:
    """Read adapter_config.json, and refuse what is more than W + scale b a."""
    try:
        data = json.loads(path.read_text())
        kind = str(data["peft_type"])
        made = _Settings(
            r=int(data["r"]),
            alpha=float(data["lora_alpha"]),
            root=bool(data.get("use_rslora")),
            ranks={k: int(v) for k, v in (data.get("rank_pattern") or {}).items()},
            alphas={k: float(v) for k, v in (data.get("alpha_pattern") or {}).items()},
        )
        for key in (*made.ranks, *made.alphas):
            re.compile(key)
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing; an adapter is a folder as PEFT saves it") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise WeightsError(f"{path}: is no PEFT config of LoRA: {error!r}") from None
    if min(made.r, *made.ranks.values(), made.r) < 1:
        raise WeightsError(f"{path}: ranks are at least 1")
    odd = {"peft_type": kind} if kind != "LORA" else {}
    odd |= {n: v for n, v in data.items() if v and n not in _READ and n not in _HARMLESS}
    if (drawn := data.get("init_lora_weights")) not in _KEEPS_BASE:
        odd["init_lora_weights"] = drawn
    if data.get("bias", "none") != "none":
        odd["bias"] = data["bias"]
    if odd:
        said = ", ".join(f"{name} {value!r}" for name, value in odd.items())
        raise UnsupportedError(
            f"{path}: {said}: only LoRA on matrices is read (no biases, no DoRA, no saved modules)"
        )
    return made


def _pairs(reader: Reader) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """(module -> names of its two factors, what is wrong)."""
    halves: dict[str, dict[str, str]] = {}
    problems = []
    for name in reader.tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            problems.append(f"{name} is neither a lora_A nor a lora_B of a matrix")
        else:
            halves.setdefault(match[1], {})[match[2]] = name
    problems += [
        f"{module} has a lora_{next(iter(half))} alone"
        for module, half in halves.items()
        if len(half) == 1
    ]
    return {m: (half["A"], half["B"]) for m, half in halves.items() if len(half) == 2}, problems


def _entries(checkpoint: Checkpoint, modules: list[str]) -> dict[str, list[Entry]]:
    """Module -> the leaves that its matrix fills, of all matrices that an adapter may change."""
    names, found = [f"{module}.weight" for module in modules], {}
    for entry in checkpoint.family.names(checkpoint.spec):
        definition = layer_paths(checkpoint.spec)[entry.path]
        known = entry.form in ("linear", "interleaved", "in_out") and entry.index is None
        if known and definition.inputs and definition.std and not definition.lead:
            located = checkpoint.family.locate(entry, names)
            found.setdefault(located.disk.removesuffix(".weight"), []).append(located)
    return found


def _sides(entry: Entry, checkpoint: Checkpoint) -> tuple[int, int]:
    """(outputs, inputs) of the whole matrix on disk."""
    rows, columns = entry.disk_shape(layer_paths(checkpoint.spec)[entry.path])
    return (columns, rows) if entry.form == "in_out" else (rows, columns)


def _update(a: np.ndarray, b: np.ndarray, entry: Entry, definition: ParamDef) -> LowRank:
    """The factors [R, in] and [out, R] of a module as those of one of its leaves."""
    outputs = definition.shape[definition.inputs :]
    axes = definition.axes[definition.inputs :]
    rows = dataclasses.replace(
        definition, shape=(len(a), *outputs), axes=(None, *axes), inputs=1
    )  # as if the rank were the input
    form = "linear" if entry.form == "in_out" else entry.form
    ours = dataclasses.replace(entry, form=form).to_ours(b, rows)
    return LowRank(np.ascontiguousarray(a.T), np.ascontiguousarray(ours))


def _check_plain(checkpoint: Checkpoint, folder: Path, found: Mapping[str, LowRank]) -> None:
    for entry in checkpoint.entries:
        if entry.path in found and checkpoint.reader.tensors[entry.disk].dtype == "quantized":
            raise UnsupportedError(
                f"{folder}: {entry.disk} of {checkpoint.path} is quantized, and adapters are added "
                "to plain weights: give the model that was not quantized"
            )
