"""Streaming: token ids -> text as soon as it is certain, and stop strings that span tokens."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopMatcher"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 characters stand for themselves,
    the other bytes, in order, for the letters from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _byte_of_letter()


class Detokenizer:
    """Turn ids into text one at a time.

    The texts that `push` and finally `flush` return, joined, are `tokenizer.decode(ids)`. A piece
    never ends within a character, and holds U+FFFD only where no later token can complete the
    bytes. The work per token does not grow with the text.

    In vocabularies with byte fallback (`<0xE2>` …) a run of byte tokens is text or a row of U+FFFD
    as a whole, so it is held until it ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        kinds = _decoder_kinds(self._backend.decoder)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = kinds == ["ByteLevel"]
        self._holds_runs = "ByteFallback" in kinds
        self._holds_broken = "ByteLevel" in kinds
        self._anchor: list[int] = []  # the last settled token: the context of the next
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often one piece, sometimes empty."""
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._bytes:
            return self._utf8.decode(_token_bytes(token))
        self._pending.append(token_id)
        if self._holds_runs and _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._settle(final=False)

    def flush(self) -> str:
        """What was held back, at the end of the text; afterwards a new text can begin."""
        text = self._utf8.decode(b"", final=True) + self._settle(final=True)
        self._utf8.reset()
        self._anchor = []
        return text

    def _settle(self, *, final: bool) -> str:
        """Decode what is pending in the context of the token before it."""
        if not self._pending:
            return ""
        known = self._decode(self._anchor)
        text = self._decode(self._anchor + self._pending)
        if self._holds_broken and not final and text.endswith("\ufffd"):
            return ""
        # A token without text is no context: rules for the first token would pass through it.
        settled = [i for i in self._anchor + self._pending if self._backend.id_to_token(i)]
        self._anchor, self._pending = settled[-1:], []
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""


def _decoder_kinds(decoder: Any) -> list[str]:
    """The names of a backend decoder's steps."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token may be outside the alphabet: its UTF-8."""
    try:
        return bytes([_LETTERS[letter] for letter in token])
    except KeyError:
        return token.encode()


class StopMatcher:
    """Find stop strings in text that comes in pieces, holding back what may begin one.

    The match that ends first wins, and of several that end together the longest: the result does
    not depend on how the text is cut. The stop string itself is not emitted.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ConfigError(f"stop strings must be a list of non-empty strings, not {stops!r}")
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop the text ends with
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; the text that can be emitted now, and whether a stop string was found.

        After a stop everything further is dropped.
        """
        if self.stopped:
            return "", True
        held = self._held + text
        for position in range(len(self._held), len(held)):
            found = self._advance(held[position])
            if found:
                self.stopped, self._held = True, ""
                return held[: position + 1 - found], True
        keep = max(self._matched, default=0)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return text

    def _advance(self, letter: str) -> int:
        """Follow one more character in every stop; the length of the longest one completed."""
        longest = 0
        for i, stop in enumerate(self._stops):
            count, borders = self._matched[i], self._borders[i]
            while count and stop[count] != letter:
                count = borders[count - 1]
            count += stop[count] == letter
            self._matched[i] = count
            if count == len(stop):
                longest = max(longest, count)
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix
    (Knuth, Morris, Pratt 1977): where matching goes on after a mismatch."""
    borders = [0] * len(stop)
    for i in range(1, len(stop)):
        count = borders[i - 1]
        while count and stop[count] != stop[i]:
            count = borders[count - 1]
        borders[i] = count + (stop[count] == stop[i])
    return borders
