"""GGUF metadata -> the parts of a `Tokenizer`: byte-level and sentencepiece BPE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.text.pretokens import find_pre_kind

__all__ = ["read_gguf_vocab", "set_bos_eos"]

PREFIX = "tokenizer.ggml."
SPACE = "\u2581"  # sentencepiece writes a space as this letter

# Values of tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_KINDS = {str: "a string", int: "an integer", bool: "a boolean", float: "a number"}


def read_gguf_vocab(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Tokenizer` from GGUF key/values.

    Raises:
        WeightsError: Keys are missing, of a wrong type, or contradict each other; all are named.
        UnsupportedError: The kind of vocabulary or pre-tokenizer is not known.
    """
    problems: list[str] = []
    model = _model_kind(metadata)
    tokens, types = _tokens(metadata, problems)
    ids = _special_ids(metadata, len(tokens), problems)
    templates = {
        "chat_template": _text(metadata, "tokenizer.chat_template", problems),
        "tool_template": _text(metadata, "tokenizer.chat_template.tool_use", problems),
    }
    flags = _flags(metadata, ids, problems)
    if model == "gpt2":
        pre = find_pre_kind(_scalar(metadata, "pre", str, problems) or "default")
        backend = _byte_level(metadata, tokens, pre, problems)
        default_bos = pre.adds_bos
    else:
        backend = _sentencepiece(
            metadata, tokens, types=types, ids=ids, flags=flags, problems=problems
        )
        default_bos = True
    _raise(problems)
    bos_flag = flags["add_bos_token"]
    adds_bos = (default_bos if bos_flag is None else bos_flag) and ids["bos"] is not None
    _add_special_tokens(backend, tokens, types)
    set_bos_eos(
        backend,
        bos=ids["bos"] if adds_bos else None,
        eos=ids["eos"] if flags["add_eos_token"] else None,
    )
    eos_ids = dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None)
    named = {f"{name}_token": ids[name] for name in ("bos", "eos", "unk", "pad")}
    return {
        "backend": backend,
        "vocab_size": len(tokens),
        "bos_id": ids["bos"],
        "eos_ids": tuple(eos_ids),
        "adds_bos": adds_bos,
        "special_tokens": {k: tokens[i] for k, i in named.items() if i is not None},
        **templates,
    }


def _model_kind(metadata: Mapping[str, Any]) -> str:
    """The kind of vocabulary, one of the known."""
    problems: list[str] = []
    model = _scalar(metadata, "model", str, problems)
    if model is None and not problems:
        problems.append(f"{PREFIX}model is missing: the file has no tokenizer")
    _raise(problems)
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{PREFIX}model is {model!r}; known are 'gpt2' (byte-level BPE) and 'llama' "
            "(sentencepiece BPE). Import the model from its Hugging Face directory instead"
        )
    return model


def _flags(
    metadata: Mapping[str, Any], ids: Mapping[str, int | None], problems: list[str]
) -> dict[str, bool | None]:
    """The switches of the file; None where it does not say."""
    names = ("add_bos_token", "add_eos_token", "add_space_prefix")
    flags = {name: _scalar(metadata, name, bool, problems) for name in names}
    for name in ("bos", "eos"):
        if flags[f"add_{name}_token"] and ids[name] is None:
            problems.append(f"{PREFIX}add_{name}_token is set, but there is no {name}_token_id")
    return flags


def _raise(problems: list[str]) -> None:
    if problems:
        raise WeightsError("the GGUF tokenizer is damaged: " + "; ".join(problems))


def _text(metadata: Mapping[str, Any], key: str, problems: list[str]) -> str | None:
    value = metadata.get(key)
    if value is None or isinstance(value, str):
        return value
    problems.append(f"{key} is {type(value).__name__}, not a string")
    return None


def _scalar(metadata: Mapping[str, Any], name: str, kind: type, problems: list[str]) -> Any:
    """The value of a key, or None when it is absent or (a problem) of another type."""
    value: Any = metadata.get(PREFIX + name)
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's scalars
    if value is None or type(value) is kind:
        return value
    problems.append(f"{PREFIX}{name} is {type(value).__name__}, not {_KINDS[kind]}")
    return None


def _array(metadata: Mapping[str, Any], name: str, kind: type, problems: list[str]) -> list[Any]:
    """The list of a key; empty when it is absent or (a problem) of another type."""
    value: Any = metadata.get(PREFIX + name)
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's arrays
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        problems.append(f"{PREFIX}{name} is {type(value).__name__}, not a list")
        return []
    kinds = (int, float) if kind is float else (kind,)
    for i, item in enumerate(value):
        if type(item) not in kinds:
            problems.append(f"{PREFIX}{name}[{i}] is {type(item).__name__}, not {_KINDS[kind]}")
            return []
    return list(value)


def _tokens(metadata: Mapping[str, Any], problems: list[str]) -> tuple[list[str], list[int]]:
    """The tokens and their types, which default to normal."""
    tokens = _array(metadata, "tokens", str, problems)
    if not tokens:
        problems.append(f"{PREFIX}tokens is missing or empty")
    if len(set(tokens)) < len(tokens):
        first = {token: i for i, token in reversed(list(enumerate(tokens)))}
        i, token = next((i, t) for i, t in enumerate(tokens) if first[t] != i)
        problems.append(f"{PREFIX}tokens has {token[:40]!r} twice, at {first[token]} and {i}")
    types = _array(metadata, "token_type", int, problems)
    if types and len(types) != len(tokens):
        problems.append(f"{PREFIX}token_type has {len(types)} entries for {len(tokens)} tokens")
    unknown = {t for t in types if not 0 <= t <= BYTE}
    if unknown:
        problems.append(f"{PREFIX}token_type holds {min(unknown)}; allowed are 0 to {BYTE}")
    return tokens, types or [NORMAL] * len(tokens)


def _special_ids(
    metadata: Mapping[str, Any], num_tokens: int, problems: list[str]
) -> dict[str, int | None]:
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown",
            "pad": "padding"}  # fmt: skip
    ids: dict[str, int | None] = {}
    for short, name in keys.items():
        key = f"{name}_token_id"
        value = _scalar(metadata, key, int, problems)
        if value is not None and not 0 <= value < num_tokens:
            problems.append(f"{PREFIX}{key} is {value}, outside the {num_tokens} tokens")
            value = None
        ids[short] = value
    return ids


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], pre: Any, problems: list[str]
) -> Any:
    """A byte-level BPE backend: merges as listed, text cut as the pre-tokenizer kind says."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    listed = _array(metadata, "merges", str, problems)
    if PREFIX + "merges" not in metadata:
        problems.append(f"{PREFIX}merges is missing")
    for i, merge in enumerate(listed):
        cut = merge.find(" ", 1)  # a left part may itself begin with a space
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not (left in vocab and right in vocab and left + right in vocab):
            problems.append(
                f"{PREFIX}merges[{i}] is {merge[:80]!r}, which does not join two tokens to a third"
            )
            break
        merges.append((left, right))
    _raise(problems)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any],
    tokens: list[str],
    *,
    types: list[int],
    ids: Mapping[str, int | None],
    flags: Mapping[str, bool | None],
    problems: list[str],
) -> Any:
    """A sentencepiece BPE backend: no cuts, spaces as letters, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(metadata, "scores", float, problems)
    if len(scores) != len(tokens):
        problems.append(f"{PREFIX}scores has {len(scores)} entries for {len(tokens)} tokens")
    if not all(map(math.isfinite, scores)):
        problems.append(f"{PREFIX}scores holds a value that is not finite")
    _raise(problems)
    unk = ids["unk"] if ids["unk"] is not None else _first(types, UNKNOWN)
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, types, scores),
            unk_token=None if unk is None else tokens[unk],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = flags["add_space_prefix"] is not False
    as_letter = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), as_letter]) if prefix else as_letter
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


def _first(types: list[int], wanted: int) -> int | None:
    return types.index(wanted) if wanted in types else None


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union scores best: every way to make each token,
    the best token first."""
    usable = {t: i for i, t in enumerate(tokens) if types[i] in (0, NORMAL)}
    rows = []
    for token, i in usable.items():
        for cut in range(1, len(token)):
            left, right = usable.get(token[:cut]), usable.get(token[cut:])
            if left is not None and right is not None:
                rows.append((-scores[i], i, left, right))
    rows.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in rows]


def _add_special_tokens(backend: Any, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special; user-defined ones are found in the text but stay text."""
    from tokenizers import AddedToken

    for special, kinds in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        chosen = [t for t, kind in zip(tokens, types, strict=True) if kind in kinds and t]
        added = [AddedToken(t, special=special, normalized=False) for t in chosen]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def set_bos_eos(backend: Any, *, bos: int | None, eos: int | None) -> None:
    """Have the backend put BOS before and EOS after a text, or neither.

    In the template the names `bos` and `eos` stand for the tokens, whose own text may hold
    characters that the template's syntax uses.
    """
    from tokenizers import processors

    special = [
        {"id": name, "ids": [i], "tokens": [backend.id_to_token(i)]}
        for name, i in (("bos", bos), ("eos", eos))
        if i is not None
    ]
    single = ["bos"] * (bos is not None) + ["$A"] + ["eos"] * (eos is not None)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=special
    )
