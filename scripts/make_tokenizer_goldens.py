"""Write tests/text/golden_smollm2.json: what transformers makes of nasty texts with SmolLM2.

Run in an environment with transformers and gguf (torch is not needed):

    python scripts/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

The file also holds the part of the vocabulary that these texts can reach, so that the test needs
no model: a merge whose result is no part of any text can never take place in it.

transformers 5.24 reads this GGUF without the pre-tokenizer's separate digits (it ignores the kind
`smollm`), which shows where white space meets a digit. The model's own tokenizer.json cuts digits
first; so does llama.cpp. The ids are taken with that cut put back.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "tests/text/golden_smollm2.json"

TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "Hello, world!",
    "What is the capital of France?",
    "   leading and trailing   ",
    "many     spaces\tand\t\ttabs",
    "\n",
    "\n\n\n",
    " \n \n ",
    "one\r\ntwo\r\n\r\nthree\rfour",
    "a  1 and   22\n\n3",
    "123456 3.14159 1,000,000 0x1F -7e+12",
    "½ ² Ⅷ ① ٣٤ १२३ 三",
    "I'm sure they'll say it's fine; we've, I'd, you're, CAN'T WE'LL",
    "it’s ‘quoted’ “text” – dash — dash…",
    "Café naïve résumé Ångström vs e\u0301 A\u030a",
    "こんにちは世界。これは試験です",
    "你好，世界！这是一个测试。",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "हिन्दी भाषा",
    "Привет, мир",
    "👍 👍🏽 🇺🇸",
    "👩\u200d👩\u200d👧\u200d👦 and 🏳️\u200d🌈",
    "\u200b\u200d\ufeff\u00a0\u3000\u2028",
    "\ud7ff\ue000\ufffd\U0010ffff\x00\x01\x7f",
    "𝕳𝖊𝖑𝖑𝖔 ﬁﬂ",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\tif x <= 3:\n\t\tpass\n",
    '<div class="a">&amp;</div> {"k": [1, 2.5, null]} a_b-c.d/e\\f|g~h`i',
    "http://127.0.0.1:8000/a?b=c&d=e#f",
    "!!!???...---===$$$@@@",
    "CamelCase HTTPServer snake_case iPhone",
    "<|im_start|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    " <|im_end|> <|im_start <|im_end|",
    "im_start|> <|endoftext|><|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "________________________________",
    "0000000000000000",
]

USER = {"role": "user", "content": "What is the capital of France?"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [
        USER,
        {"role": "assistant", "content": "Paris.\n"},
        {"role": "user", "content": "  Är du 12?"},
    ],
]


def reachable(metadata: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
    """The tokens, with their ids, and the merges that texts of these byte letters can use."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    used = {t for t in tokens if len(t) == 1 or any(t in piece for piece in pieces)}
    rows = [
        [i, token, kind]
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != 1 or token in used
    ]
    merges = [m for m in metadata["tokenizer.ggml.merges"] if m.replace(" ", "", 1) in used]
    return {"tokens": rows, "merges": merges}


def main() -> None:
    """Read the model's tokenizer with transformers and write the file."""
    import tokenizers
    import transformers  # pyright: ignore[reportMissingImports]
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf
    metadata = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    chats = []
    for messages in CHATS:
        for prompt in (True, False):
            given = {"add_generation_prompt": prompt}
            text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
            ids = tokenizer.apply_chat_template(messages, return_dict=False, **given)
            chats.append({"messages": messages, **given, "text": text, "ids": ids})
    texts = [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS]
    every_text = [row["text"] for row in texts + chats if row["text"]]
    pieces = [piece for text in every_text for piece, _ in letters.pre_tokenize_str(text)]
    keep = [k for k in metadata if k.startswith("tokenizer.") and not isinstance(metadata[k], list)]
    golden = {
        "generator": "scripts/make_tokenizer_goldens.py",
        "versions": {m.__name__: m.__version__ for m in (transformers, tokenizers)},
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "metadata": {key: metadata[key] for key in keep},
        **reachable(metadata, pieces),
        "texts": texts,
        "chats": chats,
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, {len(golden['tokens'])} tokens")


if __name__ == "__main__":
    main()
