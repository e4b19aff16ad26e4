#!/usr/bin/env python3
"""Golden tables of tests/oracle/ropes.json: frequencies of transformers' own functions.

    python scripts/make_rope_goldens.py

Needs torch and transformers, and imports nothing of jaxllm. A table holds a config.json in the
words of the file, and for each length the inverse frequencies and the factor on cos and sin.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from golden_ropes import TABLES
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PATH = Path(__file__).resolve().parents[1] / "tests/oracle/ropes.json"


def table(config: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """What transformers makes of a config at these lengths."""
    found = LlamaConfig(**json.loads(json.dumps(config)))
    rows = []
    for length in lengths:
        # As the model calls it: a tensor, and for dynamic scaling one of at least the context.
        freqs, magnitude = ROPE_INIT_FUNCTIONS[found.rope_parameters["rope_type"]](
            found, None, seq_len=torch.tensor(length)
        )
        rows.append(
            {
                "length": length,
                "frequencies": [float(f"{x:.9g}") for x in freqs.tolist()],
                "magnitude": float(magnitude),
            }
        )
    return {"config": config, "rows": rows}


def main() -> None:
    """Write all tables."""
    tables = {}
    for name, changes in TABLES.items():
        config = {"head_dim": 128, "max_position_embeddings": 8192} | changes
        tables[name] = table(config, config.pop("lengths", [1]))
    about = {
        "generator": "scripts/make_rope_goldens.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps({"provenance": about, "tables": tables}, separators=(",", ":"))
    PATH.write_text(text.replace('"config"', '\n"config"') + "\n")
    print(f"{len(tables)} tables, {len(text)} bytes")


if __name__ == "__main__":
    main()
