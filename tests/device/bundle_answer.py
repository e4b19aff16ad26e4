"""Run in a process of its own: python -m tests.device.bundle_answer BUNDLE IDS COUNT [--trust]."""

import json
import sys

from jaxllm.aot import counter
from jaxllm.export.model import load_bundle


def main(path: str, ids: str, count: str, *trust: str) -> None:
    """Print the new tokens, which programs were stored, and how much was compiled."""
    model = load_bundle(path, trust=bool(trust))
    result = model.generate(json.loads(ids), max_tokens=int(count))
    ready = model.bundle.ready.values()
    print(
        json.dumps(
            {
                "tokens": result.token_ids,
                "stored": [program.stored for program in ready],
                "compiled": counter.compilations(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
