"""Text <-> token ids: one `Tokenizer` for Hugging Face directories and GGUF files."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from jaxllm.errors import ConfigError, WeightsError
from jaxllm.text.chat import check_messages, check_tools, render_template
from jaxllm.text.gguf_vocab import read_gguf_vocab
from jaxllm.text.hf_files import read_hf_directory, write_hf_directory

__all__ = ["Tokenizer"]

FORMAT = "jaxllm-tokenizer-1"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its rules of cutting, its special tokens and its chat template.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work; not to be changed.
        vocab_size: Largest token id + 1. A model's embedding may be larger.
        bos_id: The token that begins a text, if there is one.
        eos_ids: The tokens that end generation; the tokenizer's own EOS first.
        adds_bos: Whether `encode` begins with BOS.
        chat_template: jinja2 text that turns messages into a prompt.
        tool_template: Another one, for when tools are given.
        special_tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token` … -> their text.
    """

    backend: Any = field(repr=False)
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None = field(default=None, repr=False)
    tool_template: str | None = field(default=None, repr=False)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer | None:
        """Read a Hugging Face model directory; None when it has no tokenizer.json.

        Raises:
            WeightsError: A file is damaged, or one contradicts another.
        """
        parts = read_hf_directory(Path(path))
        return None if parts is None else cls(**parts)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that GGUF key/values describe.

        Args:
            metadata: `tokenizer.*` keys with Python values (str, int, float, bool, lists of them);
                other keys are ignored.

        Raises:
            WeightsError: Keys are missing, of a wrong type, or contradict each other.
            UnsupportedError: The kind of vocabulary or pre-tokenizer is not known.
        """
        return cls(**read_gguf_vocab(metadata))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read back what `to_json` wrote.

        Raises:
            WeightsError: The text is not such a document.
        """
        from tokenizers import Tokenizer as Backend

        try:
            document = json.loads(text)
            if document.pop("format") != FORMAT:
                raise ValueError("another format")
            document["backend"] = Backend.from_str(document["backend"])
            document["eos_ids"] = tuple(document["eos_ids"])
            return cls(**document)
        except Exception as error:  # the package raises bare Exception
            raise WeightsError(
                f"the stored tokenizer is damaged or of another version ({str(error)[:200]}); "
                "delete it and import the model again"
            ) from None

    def to_json(self) -> str:
        """Everything in one JSON document, quick to load: the backend is a string in it."""
        parts = self._parts()
        parts["backend"] = self.backend.to_str()
        return json.dumps({"format": FORMAT, **parts})

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: `from_directory` reads back an equal."""
        write_hf_directory(Path(directory), self._parts())

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The token ids of a text.

        Args:
            add_special: Begin with BOS (and so on) where the tokenizer's own config says so. It is
                wrong for the text of a chat template, which writes these tokens itself.
            parse_special: Read the text of a special token, such as `<|im_start|>`, as that token.
                Without it the text of strangers cannot forge one.

        Raises:
            ConfigError: `text` is no string, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise ConfigError(f"encode takes a string, not {type(text).__name__}")
        backend = self.backend if parse_special else self._plain_backend
        try:
            return backend.encode(text, add_special_tokens=add_special).ids
        except TypeError:  # what the package says of a string that is not UTF-8
            raise ConfigError(
                "the text is not valid Unicode: it holds a lone surrogate. Decode its bytes as "
                "UTF-8 before encoding it"
            ) from None

    def encode_cut(self, text: str, max_tokens: int) -> list[int]:
        """The token ids of a text, cut at its end so that with special tokens they are so many.

        Raises:
            ConfigError: `max_tokens` does not hold the special tokens; or see `encode`.
        """
        ids = self.encode(text)
        if len(ids) <= max_tokens:
            return ids
        special = self.backend.num_special_tokens_to_add(False)
        if max_tokens <= special:
            raise ConfigError(
                f"max_tokens {max_tokens} must be over the {special} special tokens of a text"
            )
        if max_tokens not in self._cutters:
            from tokenizers import Tokenizer as Backend

            cutter = Backend.from_str(self.backend.to_str())
            cutter.enable_truncation(max_tokens)
            self._cutters[max_tokens] = cutter
        return self._cutters[max_tokens].encode(text).ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD, ids that no token has are left out.

        Raises:
            ConfigError: An id is negative or no integer.
        """
        try:
            numbers = [operator.index(i) for i in ids]
            return self.backend.decode(numbers, skip_special_tokens=skip_special)
        except (TypeError, OverflowError):
            raise ConfigError("token ids must be integers from 0 to 2**32 - 1") from None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of messages.

        Args:
            messages: Dicts with `role` and `content` (see `chat.check_messages`).
            add_generation_prompt: End with the opening of the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            options: Further variables of the template, such as `enable_thinking`.

        Raises:
            ConfigError: There is no template, the messages are malformed, or the template refuses
                them.
            WeightsError: The template is wrong or exceeds its limits.
        """
        template = (self.tool_template if tools else None) or self.chat_template
        if template is None:
            raise ConfigError(
                "this tokenizer has no chat template (it may belong to a base model); "
                "use a raw prompt"
            )
        taken = sorted(set(options or {}) & {*_RESERVED, *self.special_tokens})
        if taken:
            raise ConfigError(f"options may not set {', '.join(taken)}: the template needs its own")
        variables = {
            **self.special_tokens,
            **(options or {}),
            "messages": check_messages(messages),
            "tools": check_tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_template(template, variables)

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of `render_chat`'s prompt; nothing is added to what the template writes."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, options=options
        )
        return self.encode(text, add_special=False)

    @property
    def bos_token(self) -> str | None:
        """The text of the BOS token."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the tokenizer's own EOS token."""
        return self.special_tokens.get("eos_token")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens: those that `decode` skips."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @functools.cached_property
    def _plain_backend(self) -> Any:
        """A second backend that reads special tokens as text; the switch is not per call."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _cutters(self) -> dict[int, Any]:
        """Backends that cut to a number of tokens; the switch is not per call."""
        return {}

    def _parts(self) -> dict[str, Any]:
        """The fields by name, with JSON types but for the backend."""
        names = ("vocab_size", "bos_id", "adds_bos", "chat_template", "tool_template")
        return {
            "backend": self.backend,
            **{name: getattr(self, name) for name in names},
            "eos_ids": list(self.eos_ids),
            "special_tokens": dict(self.special_tokens),
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        mine, theirs = self._parts(), other._parts()
        backends = mine.pop("backend"), theirs.pop("backend")
        return mine == theirs and backends[0].to_str() == backends[1].to_str()

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.bos_id, self.eos_ids, self.chat_template))
