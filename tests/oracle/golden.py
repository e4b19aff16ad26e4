"""The golden files of scripts/make_goldens.py, and how results are held against them."""

import atexit
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.oracle.draws import digest, unpack

FOLDER = Path(__file__).with_name("goldens")
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/golden.npz")))
TOLERANCE = 1e-5  # relative; the reference's own float32 noise is up to 2e-6 (in each golden)


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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _place() -> Path:
    """Where this process keeps the models' files."""
    held = tempfile.TemporaryDirectory(prefix="goldens-")
    atexit.register(held.cleanup)
    return Path(held.name)


@cache
def files(name: str) -> Path:
    """The directory of a golden model, its matrices drawn again; checked by their hashes."""
    folder = FOLDER / name
    (numbers,) = folder.glob("*.npz")
    with np.load(numbers) as held:
        provenance = json.loads(str(held["provenance"]))
    if (folder / "model.gguf").exists():
        assert _sha256(folder / "model.gguf") == provenance["weights_sha256"], folder
        return folder
    drawn = _place() / name
    shutil.copytree(folder, drawn)
    unpack(drawn)
    assert digest(drawn) == provenance["weights_sha256"], folder
    assert _sha256(drawn / "config.json") == provenance["config_sha256"], folder
    return drawn


@cache
def golden(name: str) -> Golden:
    """Read one golden directory; its files must be those that the numbers were made from."""
    source = files(name)
    with np.load(source / "golden.npz") as held:
        ids, logits, lengths, greedy = (
            held[key] for key in ("ids", "logits", "prompt_lengths", "greedy")
        )
        provenance = json.loads(str(held["provenance"]))
    source = source if (source / "config.json").exists() else source / "model.gguf"
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    return Golden(source, ids, logits, prompts, greedy.tolist(), provenance)


def copy(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A copy of a golden model with keys of its config changed; None removes one."""
    folder = tmp_path / "model"
    shutil.copytree(files(name), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


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
