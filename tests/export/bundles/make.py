"""Made `v1.tar` and `v1.json` once: `python -m tests.export.bundles.make NAME`.

The file is never made again: it shows that bundles of today's format are read by later code. Where
jax itself no longer reads it (its window is six months), make the next one beside it.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxllm.export.bundle import export_bundle
from jaxllm.export.runtime import Bundle
from jaxllm.export.table import Sizes
from jaxllm.export.ways import Options
from tests.cli.toy import write_toy

HERE = Path(__file__).parent
CASES = ({}, {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5})
QUESTION = [{"role": "user", "content": "hello"}]
COUNT = 12


def tokens(bundle: Bundle, prompt: list[int], options: dict) -> list[int]:
    """New ids."""
    return [i for ids in bundle.stream(prompt, COUNT, **options) for i in ids]


def main(name: str) -> None:
    """Write the bundle and what it gives."""
    with tempfile.TemporaryDirectory() as folder:
        source = str(write_toy(Path(folder) / "toy"))
        options = Options(platforms=("cpu",), sizes=Sizes(context=32, prefill=(32,)))
        path = export_bundle(source, HERE / f"{name}.tar", options)
    bundle = Bundle(path)
    prompt = np.random.default_rng(0).integers(0, 256, 15).tolist()
    record = {
        "jax": jax.__version__,
        "prompt": prompt,
        "cases": [[options, tokens(bundle, prompt, options)] for options in CASES],
        "answer": bundle.answer(QUESTION, max_tokens=COUNT),
    }
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
