"""Files of sentence-transformers beside a model: how its hidden states become one vector a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.spec.model import Pooling

__all__ = ["read_pooling", "write_pooling"]

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def _read(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is no JSON: {error}") from None
    if not isinstance(data, kind):
        raise WeightsError(f"{path}: expected a {kind.__name__}, found {type(data).__name__}")
    return data


def read_pooling(directory: Path, width: int) -> Pooling | None:
    """What modules.json and the files that it names say, or None without it.

    Args:
      directory: of the model.
      width: D, which the pooling must agree with.

    Raises:
      WeightsError: a file is damaged, or of another width.
      UnsupportedError: a module, a kind of pooling or an option that is not known here.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return None
    modules = [m if isinstance(m, dict) else {} for m in _read(path, list)]
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if kinds not in (list(_MODULES[:2]), list(_MODULES)):
        raise UnsupportedError(
            f"{path}: modules {', '.join(kinds)} are not supported; allowed are Transformer, "
            "Pooling and then Normalize or nothing"
        )
    config = directory / str(modules[1].get("path", "")) / "config.json"
    return Pooling(
        by=_mode(config, width),
        normalize="Normalize" in kinds,
        max_tokens=_max_tokens(directory / "sentence_bert_config.json"),
    )


def _mode(path: Path, width: int) -> Any:
    """The one kind of pooling that is on."""
    config = _read(path, dict)
    found = config.get("word_embedding_dimension", config.get("embedding_dimension", width))
    if found != width:
        raise WeightsError(f"{path}: pools vectors of {found} values, the model has {width}")
    named = config.get("pooling_mode")
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if named is not None and not on:
        on = [str(named)]
    mode = _MODES.get(on[0], _NAMES.get(on[0])) if len(on) == 1 else None
    if mode is None:
        raise UnsupportedError(
            f"{path}: pooling by {', '.join(on) or 'nothing'} is not supported; allowed is one of "
            f"{', '.join(_MODES)}"
        )
    return mode


def _max_tokens(path: Path) -> int | None:
    if not path.is_file():
        return None
    config = _read(path, dict)
    if config.get("do_lower_case"):
        raise UnsupportedError(f"{path}: do_lower_case is not supported; the tokenizer must do it")
    value = config.get("max_seq_length")
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{path}: max_seq_length is {value!r}; it must be a positive integer")
    return value


def write_pooling(directory: Path, pooling: Pooling, width: int) -> None:
    """Write the files that `read_pooling` reads; sentence-transformers reads them too."""
    names = _MODULES if pooling.normalize else _MODULES[:2]
    folders = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": folders[i], "type": f"sentence_transformers.models.{n}"}
        for i, n in enumerate(names)
    ]
    modes = {key: value == pooling.by for key, value in _MODES.items()}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
        "sentence_bert_config.json": {"max_seq_length": pooling.max_tokens, "do_lower_case": False},
    }
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
