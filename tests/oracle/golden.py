"""The golden files of scripts/make_goldens.py, and how results are held against them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).with_name("goldens")
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/golden.npz")))
TOLERANCE = 1e-5  # relative; the reference's own float32 noise is up to 1.4e-6 (in each golden)
HYBRIDS = ("qwen3_next", "olmo_hybrid")
"""Recurrences carry rounding on: their noise is up to 2.5e-5, and the tolerance 1e-4."""


def tolerance(name: str) -> float:
    """Of the logits of a golden, relative."""
    return 10 * TOLERANCE if name.startswith(HYBRIDS) else TOLERANCE


@dataclass(frozen=True)
class Golden:
    """Files of a model, and what transformers makes of them in float32.

    Attributes:
      source: what `jaxllm.load` opens: a directory, or a GGUF file.
      ids: [2, T] token ids.
      logits: [2, T, V] of these.
      prompts: two prompts of unequal length, beginnings of the rows of `ids`.
      greedy: [2, 12] what follows them.
      provenance: generator, versions, hashes, noise.
    """

    source: Path
    ids: np.ndarray
    logits: np.ndarray
    prompts: list[list[int]]
    greedy: list[list[int]]
    provenance: dict[str, Any]


@cache
def golden(name: str) -> Golden:
    """Read one golden directory; its files must be those that the numbers were made from."""
    folder = FOLDER / name
    with np.load(folder / "golden.npz") as held:
        ids, logits, lengths, greedy = (
            held[key] for key in ("ids", "logits", "prompt_lengths", "greedy")
        )
        provenance = json.loads(str(held["provenance"]))
    config, weights = folder / "config.json", hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.name not in ("config.json", "golden.npz")):
        weights.update(path.read_bytes())
    assert weights.hexdigest() == provenance["weights_sha256"], folder
    if config.exists():
        digest = hashlib.sha256(config.read_bytes()).hexdigest()
        assert digest == provenance["config_sha256"], folder
    source = folder if config.exists() else folder / "model.gguf"
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    return Golden(source, ids, logits, prompts, greedy.tolist(), provenance)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory, by an independent reader."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def relative(found: Any, wanted: Any) -> float:
    """Greatest difference, relative to the greatest wanted value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
