"""A Hugging Face model directory <-> the parts of a `Tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import WeightsError
from jaxllm.text.gguf_vocab import set_bos_eos

__all__ = ["read_hf_directory", "write_hf_directory"]

SPECIAL_NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


def read_hf_directory(directory: Path) -> dict[str, Any] | None:
    """The fields of a `Tokenizer`, or None when the directory has no tokenizer.json.

    Read are tokenizer.json, and where they exist tokenizer_config.json, special_tokens_map.json,
    chat_template.jinja, generation_config.json and config.json (the last two for token ids).

    Raises:
        WeightsError: A file is damaged, or one contradicts another.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    backend = _load_backend(path)
    config = _read_json(directory / "special_tokens_map.json")
    config |= _read_json(directory / "tokenizer_config.json")
    model = _read_json(directory / "config.json")
    inner = model.get("text_config")  # of a model that sees
    model = {**(inner if isinstance(inner, dict) else {}), **model}
    model |= _read_json(directory / "generation_config.json")
    _add_listed_tokens(backend, config, directory)
    special = _special_texts(backend, config, model, directory)
    _mark_special(backend, special)
    bos_id, eos_id = (_id(backend, special.get(f"{name}_token")) for name in ("bos", "eos"))
    if "add_bos_token" in config or "add_eos_token" in config:
        set_bos_eos(
            backend,
            bos=bos_id if config.get("add_bos_token") else None,
            eos=eos_id if config.get("add_eos_token") else None,
        )
    stops = [eos_id] if eos_id is not None else []
    stops += _ids(model, "eos_token_id", directory) + _ids(config, "eos_token_ids", directory)
    return {
        "backend": backend,
        "vocab_size": max(backend.get_vocab(True).values(), default=-1) + 1,
        "bos_id": bos_id,
        "eos_ids": tuple(dict.fromkeys(stops)),
        "adds_bos": _adds_bos(backend, bos_id),
        "special_tokens": special,
        **_templates(directory, config),
    }


def _load_backend(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise WeightsError(f"{path} is not a tokenizer file: {str(error)[:300]}") from None
    backend.no_truncation()  # a training run's settings; a prompt is never cut in silence
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _content(token: Any) -> str | None:
    """The text of a token that is written as a string or as {"content": ...}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id(backend: Any, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _ids(config: Mapping[str, Any], key: str, directory: Path) -> list[int]:
    """Token ids that are written as one integer, a list of them, or not at all."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if type(item) is not int or item < 0:
            raise WeightsError(
                f"{key} in the config files of {directory} is {value!r}; "
                "allowed: a token id or a list of token ids"
            )
    return values


def _add_listed_tokens(backend: Any, config: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens of `added_tokens_decoder` that tokenizer.json lacks; ids must agree."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    where = f"added_tokens_decoder in {directory / 'tokenizer_config.json'}"
    try:
        rows = sorted((int(key), token) for key, token in listed.items())
    except (AttributeError, TypeError, ValueError):
        raise WeightsError(f"{where} must map token ids to tokens") from None
    for number, token in rows:
        text = _content(token)
        if text is None:
            raise WeightsError(f"{where} has no content for id {number}")
        if number in known:
            continue
        options = dict(token) if isinstance(token, Mapping) else {"special": True}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added = AddedToken(text, **{key: bool(options[key]) for key in flags if key in options})
        backend.add_tokens([added])
        if backend.token_to_id(text) != number:
            raise WeightsError(
                f"{where} gives {text!r} the id {number}, but in tokenizer.json it has "
                f"{backend.token_to_id(text)}"
            )


def _special_texts(
    backend: Any, config: Mapping[str, Any], model: Mapping[str, Any], directory: Path
) -> dict[str, str]:
    """`bos_token` … -> text: as named, else (BOS and EOS) of the id that the model's config has."""
    special = {}
    for key in (f"{name}_token" for name in SPECIAL_NAMES):
        text = _content(config.get(key))
        if text is None and key in ("bos_token", "eos_token"):
            listed = _ids(model, f"{key}_id", directory)
            text = backend.id_to_token(listed[0]) if listed else None
        if text is not None:
            special[key] = text
    return special


def _mark_special(backend: Any, special: Mapping[str, str]) -> None:
    """Named special tokens are special also where tokenizer.json has them as plain entries."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys(special.values()):
        if text and text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True)])


def _adds_bos(backend: Any, bos_id: int | None) -> bool:
    """Whether encoding a text begins it with BOS, found by trying."""
    with_special, plain = (
        backend.encode("a", add_special_tokens=flag).ids for flag in (True, False)
    )
    return bos_id is not None and with_special[: len(plain) + 1] == [bos_id, *plain]


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    """The chat template and, where there is another one for tools, that too."""
    found = config.get("chat_template")
    if isinstance(found, list):
        rows = [row for row in found if isinstance(row, Mapping)]
        named = {row.get("name"): row.get("template") for row in rows}
    else:
        named = {"default": found}
    for name, path in (
        ("default", directory / "chat_template.jinja"),
        ("tool_use", directory / "additional_chat_templates" / "tool_use.jinja"),
    ):
        if path.is_file():
            named[name] = path.read_text(encoding="utf-8")
    chosen = {"chat_template": named.get("default"), "tool_template": named.get("tool_use")}
    for key, text in chosen.items():
        if text is not None and not isinstance(text, str):
            raise WeightsError(f"{key} in {directory} is {type(text).__name__}, not a string")
    return chosen


def write_hf_directory(directory: Path, parts: Mapping[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json; public loaders read them too.

    BOS and EOS rules stand in tokenizer.json's own post-processor, so no `add_bos_token` is
    written. A chat_template.jinja in the directory would win over the config: it is replaced.
    """
    template, tool_template = parts["chat_template"], parts["tool_template"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **parts["special_tokens"],
        "eos_token_ids": list(parts["eos_ids"]),
    }
    if tool_template is not None:
        named = {"default": template, "tool_use": tool_template}
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in named.items() if text is not None
        ]
    elif template is not None:
        config["chat_template"] = template
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(parts["backend"].to_str(), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    for path in (
        directory / "chat_template.jinja",
        directory / "additional_chat_templates" / "tool_use.jinja",
        directory / "special_tokens_map.json",
    ):
        path.unlink(missing_ok=True)
