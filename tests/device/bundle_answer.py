"""Run in a process of its own: python -m tests.device.bundle_answer BUNDLE IDS COUNT [--trust]."""

import json
import sys

from jaxllm.aot import counter
from jaxllm.export.model import load_bundle
from tests.device.fresh import alone


def main(path: str, ids: str, count: str, *trust: str) -> None:
    """Print the new tokens, which programs were stored, and how much was compiled."""
    model = load_bundle(path, trust=bool(trust))
    bundle = model.bundle
    for name, entry in bundle.way["programs"].items():  # compiled while others may have the GPU
        bundle.ready[name] = bundle.build(entry)
    with alone():
        result = model.generate(json.loads(ids), max_tokens=int(count))
    stored = [program.stored for program in bundle.ready.values()]
    print(
        json.dumps(
            {"tokens": result.token_ids, "stored": stored, "compiled": counter.compilations()}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
