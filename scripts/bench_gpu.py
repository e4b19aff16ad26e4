"""Decode and prefill of a 1.24B Llama shape (random bfloat16 weights) on one GPU.

  python3 scripts/bench_gpu.py --out $OUT/gpu.jsonl [--peer] [--ablate] [--cold]

Prompt 512, 128 new tokens, greedy, batch 1 and 32, through `Model.generate_batch`: what is timed is
what a user calls. `--peer` measures transformers (static cache, torch.compile) on the same card,
`--ablate` takes one ingredient away at a time, and quantizes; `--only "as loaded" int4` compares
two of these; `--cold` starts fresh processes. One JSON line each.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRESET, PROMPT, NEW, REPEATS = "random:llama-3.2-1b", 512, 128, 7
COPY_BYTES_PER_S = 2.8e12
"""What a copy reaches on an H100, read and written bytes together."""

COLD = """
import time, json
import numpy as np
import jaxllm
model = jaxllm.load("random:llama-3.2-1b")
pieces = model.generator.stream([list(range(512))], jaxllm.Sampling(), 9)
next(pieces)
first = time.clock_gettime(time.CLOCK_BOOTTIME)
list(pieces)
from jaxllm.aot import counter
ticks = int(open("/proc/self/stat").read().rsplit(") ", 1)[1].split()[19])
print(json.dumps({"first_token_s": first - ticks / 100, "compilations": counter.compilations(),
                  "traces": counter.traces()}))
"""

PEER = """
import json, statistics, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
config = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    tie_word_embeddings=True, max_position_embeddings=4096, rope_theta=5e5)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = LlamaForCausalLM(config).eval()
torch.set_float32_matmul_precision("high")
out = {}
for batch in (1, 32):
    cache = StaticCache(config=config, max_cache_len=PROMPT + NEW + 8)
    ids = torch.randint(0, 128256, (batch, PROMPT), device="cuda")
    def step(token, position):
        return model(token, past_key_values=cache, cache_position=position,
                     position_ids=position[None].expand(batch, 1)).logits[:, -1:].argmax(-1)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    def run():
        cache.reset()
        positions = torch.arange(PROMPT, device="cuda")
        out = model(ids, past_key_values=cache, cache_position=positions)
        token = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(NEW):
            token = compiled(token.clone(), torch.tensor([PROMPT + i], device="cuda")).clone()
        torch.cuda.synchronize()
        return batch * NEW / (time.perf_counter() - start)
    with torch.inference_mode():
        run(); run()
        out[batch] = statistics.median(run() for _ in range(5))
print(json.dumps(out))
"""


def measure(label: str, batch: int, **changes: Any) -> dict[str, Any]:
    """Tokens a second of one policy, and its prefill milliseconds."""
    import jax
    import numpy as np

    import jaxllm
    from jaxllm.infer.open import run_policy

    per_call = changes.pop("tokens_per_call", 8)
    options, quantized = changes.pop("options", None), changes.pop("quantized", None)
    model = jaxllm.load(PRESET, policy=run_policy("bfloat16", **changes), store=False)
    if quantized is not None:
        model = model.quantize(**quantized)
    generator = dataclasses.replace(model.generator, tokens_per_call=per_call)
    if options is not None:
        setup = dataclasses.replace(generator.setup, options=options)
        generator = dataclasses.replace(generator, setup=setup)
    model = dataclasses.replace(model, generator=generator)
    rows = np.random.default_rng(0).integers(0, model.spec.vocab, (batch, PROMPT)).tolist()
    start = time.perf_counter()
    model.generate_batch(rows, max_tokens=NEW + 1)
    first = time.perf_counter() - start
    rates, prefills = [], []
    for _ in range(REPEATS):
        timings = model.generate_batch(rows, max_tokens=NEW + 1)[0].timings
        rates.append(timings.tokens_per_second)
        prefills.append(timings.time_to_first_token_ms)
    weights = model.nbytes
    return {
        "bench": f"1.24B bfloat16 decode, batch {batch}",
        "variant": label,
        "tokens_per_s": round(statistics.median(rates), 1),
        "spread": [round(min(rates), 1), round(max(rates), 1)],
        "over_byte_limit": round(statistics.median(rates) / batch * weights / COPY_BYTES_PER_S, 3),
        "prefill_ms": round(statistics.median(prefills), 2),
        "compile_s": round(sum(e.report.compile_seconds for e in generator.loaded.values()), 1),
        "first_request_s": round(first, 1),
        "device": jax.devices()[0].device_kind,
    }


def check() -> dict[str, Any]:
    """Logits of the measured policy against float32 with the reference attention, same weights."""
    import jax
    import numpy as np

    import jaxllm
    from jaxllm.infer.open import run_policy

    ids = np.random.default_rng(1).integers(0, 128_256, (1, 64)).astype(np.int32)
    fast = jaxllm.load(PRESET, policy=run_policy("bfloat16"), store=False)
    wide = dataclasses.replace(
        fast.policy, param_dtype="bfloat16", compute_dtype="float32", attention="reference"
    )
    exact = jaxllm.load(PRESET, policy=wide, store=False)
    plain = jaxllm.load(
        PRESET,
        policy=dataclasses.replace(
            fast.policy, attention="reference", matrices="in_out", fused=True
        ),
        store=False,
    )
    want, got, low = (np.asarray(m.logits(ids)) for m in (exact, fast, plain))
    scale = float(np.abs(want).max())
    prompt = ids[0].tolist()
    same = fast.generate(prompt, max_tokens=16).token_ids
    again = fast.generate(prompt, max_tokens=16).token_ids
    return {
        "bench": "logits against float32, relative to the largest",
        "measured_policy": float(np.abs(got - want).max()) / scale,
        "plain_bfloat16": float(np.abs(low - want).max()) / scale,
        "repeatable": same == again,
        "device": jax.devices()[0].device_kind,
    }


_INT4 = {"format": "int4", "group": 128}
_HEAD = _INT4 | {"include": ("layers.*", "embed.table")}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as loaded": {},
    "without concurrent command buffers": {"options": ()},
    "with the reference attention": {"attention": "reference"},
    "with [in, out] weights": {"matrices": "in_out"},
    "with separate projections": {"fused": False},
    "separate and [in, out]": {"fused": False, "matrices": "canonical"},
    "scan over stacked layers": {"fused": False, "matrices": "canonical", "layout": "scan"},
    "1 token a call": {"tokens_per_call": 1},
    "attention op by op": {"attention": "cudnn", "decode": "plain"},
    "decode op by op": {"decode": "plain"},
    "decode in fused kernels": {"decode": "fused"},
    "decode in chains of products": {"decode": "chained"},
    "int4": {"quantized": _INT4},
    "int4 and head": {"quantized": _HEAD},
    "int4 in fused kernels": {"quantized": _INT4, "decode": "fused"},
    "int4 in chains of products": {"quantized": _INT4, "decode": "chained"},
    "int4 and head in chains of products": {"quantized": _HEAD, "decode": "chained"},
    "int4, streamed": {"quantized": _INT4, "codes": "operand"},
    "int4 and head, streamed": {"quantized": _HEAD, "codes": "operand"},
    "nf4, streamed": {"quantized": {"format": "nf4", "double": False}, "codes": "operand"},
    "w8a8": {"quantized": {"format": "w8a8"}},
}


def run_python(code: str) -> dict[str, Any]:
    """The JSON that a fresh process prints last."""
    code = code.replace("PROMPT", str(PROMPT)).replace("NEW", str(NEW))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for flag in ("--peer", "--ablate", "--cold"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", nargs="*", help="of --ablate, the variants to measure")
    options = parser.parse_args()
    stamp = {"commit": options.commit, "date": datetime.date.today().isoformat()}

    def say(line: dict[str, Any]) -> None:
        line = line | stamp
        print(json.dumps(line), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if options.cold:
        for label in ("first start (compiles and stores)", *["start from the store"] * 3):
            say({"bench": f"cold start: {label}"} | run_python(COLD))
    if options.peer:
        label = "transformers, static cache, torch.compile: tokens/s by batch"
        say({"bench": label} | run_python(PEER))
    say(check())
    chosen = options.only or (ABLATIONS if options.ablate else ["as loaded"])
    for label in chosen:
        changes = ABLATIONS[label]
        for batch in (1, 32):
            try:
                say(measure(label, batch, **changes))
            except Exception as error:
                say({"variant": label, "batch": batch, "error": str(error)[:600]})


if __name__ == "__main__":
    main()
