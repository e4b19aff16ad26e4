"""`jaxllm perplexity`: score a text file."""

from __future__ import annotations

import json

from jaxllm.cli.options import Perplexity
from jaxllm.core.config import require
from jaxllm.core.logging import show_notes
from jaxllm.errors import ConfigError

__all__ = ["run"]


def run(options: Perplexity) -> int:
    """Run the subcommand."""
    show_notes()
    require(options.window >= 2, f"--window is at least 2 tokens, found {options.window}")
    require(options.num_windows >= 1, f"--num-windows is at least 1, found {options.num_windows}")
    skip = options.skip_fraction
    require(0 <= skip < 1, f"--skip-fraction is in [0, 1), found {skip}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {options.text}: cannot be read as UTF-8 text: {error}") from None
    from jaxllm.eval.perplexity import perplexity
    from jaxllm.model import load

    model = load(options.source, dtype=options.dtype)
    if model.tokenizer is None:
        raise ConfigError(f"{options.source} has no tokenizer to score a text with")
    ids = model.tokenizer.encode(text[int(len(text) * skip) :])
    result = perplexity(
        model.generator, ids, window=options.window, num_windows=options.num_windows
    )
    if options.json:
        print(json.dumps(result))
        return 0
    print(
        f"nll {result['nll']:.5f}  perplexity {result['perplexity']:.3f}  "
        f"tokens {result['num_tokens']}"
    )
    return 0
