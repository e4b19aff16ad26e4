"""Small vocabularies for the tests of `jaxllm.text`."""

import json
from pathlib import Path
from typing import Any

from jaxllm.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((HERE / "golden_smollm2.json").read_text())
SPACE = "\u2581"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def golden_metadata() -> dict[str, Any]:
    """GGUF metadata of the part of SmolLM2's vocabulary that the golden texts reach.

    Ids are positions in this part; `GOLDEN["tokens"]` has the model's own.
    """
    rows = GOLDEN["tokens"]
    return {
        **GOLDEN["metadata"],
        "tokenizer.ggml.tokens": [token for _, token, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, _, kind in rows],
        "tokenizer.ggml.merges": list(GOLDEN["merges"]),
    }


def byte_letters() -> list[str]:
    """The 256 letters of byte-level vocabularies, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: every byte, a few merges, special and user-defined tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ã ©", "Ġ Ġ"]
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "naïve é"]
    tokens = [*special, *byte_letters(), *(m.replace(" ", "") for m in merges)]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3, 3, 3, 4, 4] + [1] * (len(tokens) - 6),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items() if v is not None}


def byte_tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_gguf(byte_metadata(**changes) | {"tokenizer.chat_template": CHATML})


def score_metadata(**changes: Any) -> dict[str, Any]:
    """A sentencepiece vocabulary with byte fallback; earlier pieces score higher."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<think>"]
    pieces = f"{SPACE}t he {SPACE}the in {SPACE}in aa aaa bb ab {SPACE}{SPACE} er her".split()
    pieces += [*"abeghinorstw", SPACE, "é", "世"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + pieces
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 261 + [-float(i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items() if v is not None}


def score_tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_gguf(score_metadata(**changes))
