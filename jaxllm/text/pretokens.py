"""How byte-level BPE vocabularies cut text before merging: `tokenizer.ggml.pre` of GGUF files.

A kind is a sequence of cuts, each applied to the pieces of the one before. The patterns are those
of the published tokenizers that the names stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.errors import UnsupportedError

__all__ = ["PRE_KINDS", "PreKind", "find_pre_kind"]

DIGITS = "digits"  # each numeric character alone

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACE_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACE_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE_TAIL}"
)
# Words of the o200k family end where a lower-case run ends: "camelCase" is two pieces.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_CASED_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE_TAIL}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACE_TAIL}"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)


@dataclass(frozen=True, kw_only=True)
class PreKind:
    """One way of cutting text.

    `cuts`: regular expressions or `DIGITS`. `ignore_merges`: a piece that is itself a token is
    taken whole. `adds_bos`: whether a BOS is added when the file does not say. `nfc`: the text is
    normalized to Unicode's NFC first.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False

    def build(self) -> Any:
        """The `tokenizers` pre-tokenizer: the cuts, then bytes as letters."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if cut == DIGITS
            else pre_tokenizers.Split(Regex(cut), behavior="isolated")
            for cut in self.cuts
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_gpt2 = PreKind(cuts=(_GPT2,))
_digits = PreKind(cuts=(DIGITS, _GPT2))
_llama3 = PreKind(cuts=(_LLAMA3,), ignore_merges=True, adds_bos=True)
_dbrx = PreKind(cuts=(_LLAMA3,))
_qwen2 = PreKind(cuts=(_QWEN2,), nfc=True)
_gpt4o = PreKind(cuts=(_GPT4O,))

PRE_KINDS: dict[str, PreKind] = {
    "default": PreKind(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "jais": _gpt2,
    "exaone4": _gpt2,
    "jina-v2-es": _gpt2,
    "jina-v2-de": _gpt2,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "codeshell": _digits,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "falcon-h1": _llama3,
    "pixtral": _llama3,
    "lfm2": _llama3,
    "dbrx": _dbrx,
    "smaug-bpe": _dbrx,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "stablelm2": PreKind(cuts=(_QWEN2,)),
    "qwen35": PreKind(cuts=(_QWEN35,), nfc=True),
    "gpt-4o": _gpt4o,
    "llama4": _gpt4o,
    "tekken": PreKind(cuts=(_TEKKEN,), ignore_merges=True, adds_bos=True),
    "falcon": PreKind(cuts=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
    "deepseek-coder": PreKind(cuts=_DEEPSEEK_CODER),
    "deepseek-v3": PreKind(cuts=_DEEPSEEK3),
}


def find_pre_kind(name: str) -> PreKind:
    """The kind of a name; an unknown one raises `UnsupportedError` that lists those known."""
    kind = PRE_KINDS.get(name)
    if kind is None:
        raise UnsupportedError(
            f"tokenizer.ggml.pre is {name!r}, which is not among the known pre-tokenizers: "
            f"{', '.join(PRE_KINDS)}. Import the model from its Hugging Face directory instead"
        )
    return kind
