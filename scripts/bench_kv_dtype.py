"""What keys and values in pages of 8 bits cost a real model: perplexity of a text through pages.

python scripts/bench_kv_dtype.py smollm2-135m-instruct TEXT.md

One JSON line for each kind of pages: perplexity, the mean Kullback-Leibler divergence from pages in
the compute dtype in nats, the share of places with the same most likely token, bytes of the pages.
Every row of the text is one chunk of a prompt, whose keys are written to pages and read from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm.core.config import require
from jaxllm.core.precision import dtype_of
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.ops.flat import Flat
from jaxllm.ops.pages import PageTable
from jaxllm.state.paged import groups, page_bytes, paged_state
from jaxllm.state.step import flat_step

PAGE = 64


def log_probs(model: Any, rows: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Log probabilities [R, T, V] of every next token of the rows [R, T]."""
    setup, length = model.generator.setup, rows.shape[1]
    spec, policy, pages = setup.spec, setup.policy, -(-length // PAGE)
    names, dtype = groups(spec), dtype_of(policy.compute_dtype)
    how: dict[str, Any] = {"page_size": PAGE, "dtype": dtype, "kv_dtype": kv_dtype}
    counts = {name: pages for name in names}  # noqa: C420 - of no optional numbers
    shapes = paged_state(spec, counts, 1, segments=setup.segments, **how)

    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        one = jnp.ones((1,), jnp.int32)
        table = PageTable(jnp.arange(pages, dtype=jnp.int32)[None], 0 * one)
        flat = Flat(length * one, 0 * one, 0 * one, length)
        step = flat_step(flat, length, dict.fromkeys(names, table))
        hidden, _, _ = api.apply(spec, params, ids[None], step, state, policy=policy)
        logits = api.unembed(spec, params, hidden, policy=policy)[0]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    return np.stack([np.asarray(run(model.generator.params, row)) for row in rows])


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=384, help="tokens of a row")
    given = parser.parse_args()
    model = jaxllm.load(given.source)
    if model.tokenizer is None:
        raise ConfigError(f"{given.source} has no tokenizer")
    ids = model.tokenizer.encode(given.text.read_text("utf-8"))
    count = given.rows * given.length
    require(len(ids) >= count, f"{given.text} has {len(ids)} tokens, {count} are wanted")
    rows = np.asarray(ids[:count], np.int32).reshape(given.rows, given.length)
    exact = None
    for kv_dtype in ("auto", "int8", "fp8"):
        found = log_probs(model, rows, kv_dtype)
        exact = found if exact is None else exact
        next_ones = np.take_along_axis(found[:, :-1], rows[:, 1:, None], axis=2)
        kind = {"page_size": PAGE, "dtype": dtype_of(model.policy.compute_dtype)}
        line = {
            "kv_dtype": kv_dtype,
            "perplexity": round(float(np.exp(-next_ones.mean())), 4),
            "divergence": float((np.exp(exact) * (exact - found)).sum(-1).mean()),
            "same_most_likely": float((found.argmax(-1) == exact.argmax(-1)).mean()),
            "page_bytes": page_bytes(model.spec, kv_dtype=kv_dtype, **kind),
        }
        print(json.dumps(line | {"device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    main()
