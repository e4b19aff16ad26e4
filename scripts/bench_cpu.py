"""Decode and prefill of SmolLM2 in float32 on the CPU, beside llama.cpp and transformers.

  .venv/bin/python scripts/bench_cpu.py --peer-python PEER/bin/python --rounds 5 --out cpu.jsonl

PEER is an environment with llama-cpp-python (compiled from source), torch and transformers. Each
round runs every program once, one after the other, in a process of its own: ratios are of medians.
One JSON line a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DECODE, PREFILL = 128, 512
PROMPT = "Write a long story about a lighthouse keeper."

OURS = """
import json, sys, time
import jaxllm
model = jaxllm.load(sys.argv[1], dtype="float32")
ids = model.prompt_ids(sys.argv[2])
def decode():
    return model.generate(ids, max_tokens=DECODE + 1, temperature=0.0)
decode()
result = decode()
long = (ids * 64)[:PREFILL]
model.generate(long, max_tokens=1)
best = min(model.generate(long, max_tokens=1).timings.time_to_first_token_ms for _ in range(3))
print(json.dumps({"decode": result.timings.tokens_per_second, "prefill": 1e3 * PREFILL / best,
                  "tokens": result.token_ids[:16]}))
"""

LLAMA_CPP = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
ids = json.loads(sys.argv[2])
def decode():
    model.reset()
    model.eval(ids)
    out = [model.sample(temp=0.0)]
    start = time.perf_counter()
    for _ in range(DECODE):
        model.eval([out[-1]])
        out.append(model.sample(temp=0.0))
    return DECODE / (time.perf_counter() - start), out
decode()
rate, out = decode()
long = (ids * 64)[:PREFILL]
def prefill():
    model.reset()
    start = time.perf_counter()
    model.eval(long)
    return PREFILL / (time.perf_counter() - start)
prefill()
print(json.dumps({"decode": rate, "prefill": max(prefill() for _ in range(3)), "tokens": out[:16]}))
"""

TRANSFORMERS = """
import json, os, sys, time
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
folder, name = os.path.split(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
@torch.inference_mode()
def decode():
    out = model(ids, use_cache=True)
    token, cache, tokens = out.logits[:, -1:].argmax(-1), out.past_key_values, []
    start = time.perf_counter()
    for _ in range(DECODE):
        tokens.append(int(token))
        out = model(token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    return DECODE / (time.perf_counter() - start), tokens
decode()
rate, tokens = decode()
long = (ids[0].tolist() * 64)[:PREFILL]
@torch.inference_mode()
def prefill():
    start = time.perf_counter()
    model(torch.tensor([long]), logits_to_keep=1)
    return PREFILL / (time.perf_counter() - start)
prefill()
print(json.dumps({"decode": rate, "prefill": max(prefill() for _ in range(3)),
                  "tokens": tokens[:16]}))
"""


def write_float32_gguf(source: Path, target: Path) -> None:
    """The same model with every tensor in F32, for llama.cpp."""
    import gguf

    from jaxllm.zoo.gguf import open_gguf

    reader = open_gguf(source)
    raw = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), "llama")
    for field in raw.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.file_type":
            writer.add_uint32(field.name, 0)
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for name in reader.tensors:
        writer.add_tensor(name, reader.read(name).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(python: str, program: str, *arguments: str) -> dict:
    """One measurement in a process of its own."""
    code = program.replace("DECODE", str(DECODE)).replace("PREFILL", str(PREFILL))
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{arguments[0]}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def commit() -> str:
    """The commit that is measured, marked when the tree has changes."""
    out = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return out.stdout.strip()


def main() -> None:
    """Measure all in turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import jaxllm
    from jaxllm.zoo.pull import resolve

    source = resolve("smollm2-135m-instruct")
    ids = json.dumps(jaxllm.load(source, dtype="float32").prompt_ids(PROMPT))
    rows: dict[str, list[dict]] = {"jaxllm": [], "llama.cpp f32": [], "transformers f32": []}
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "f32.gguf"
        write_float32_gguf(source, wide)
        for _ in range(options.rounds):
            rows["jaxllm"].append(run(sys.executable, OURS, str(source), PROMPT))
            rows["llama.cpp f32"].append(run(options.peer_python, LLAMA_CPP, str(wide), ids))
            rows["transformers f32"].append(
                run(options.peer_python, TRANSFORMERS, str(source), ids)
            )
    base = {k: statistics.median(r[k] for r in rows["jaxllm"]) for k in ("decode", "prefill")}
    for name, found in rows.items():
        for kind in ("decode", "prefill"):
            values = sorted(r[kind] for r in found)
            median = statistics.median(values)
            line = {
                "bench": f"smollm2 {kind} tokens/s",
                "program": name,
                "median": round(median, 2),
                "spread": [round(values[0], 2), round(values[-1], 2)],
                "jaxllm_over_this": round(base[kind] / median, 3),
                "same_tokens": found[0]["tokens"] == rows["jaxllm"][0]["tokens"],
                "device": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
                "commit": commit(),
                "date": datetime.date.today().isoformat(),
            }
            print(json.dumps(line))
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
