"""Training steps on one GPU: tokens a second, model TFLOP/s, memory predicted and measured.

  python3 scripts/bench_train.py --out $OUT/train.jsonl [--ablate] [--only CASE…]

Cases of two devices, and of models that live by a kernel, are measured when they are named.

bfloat16 matmuls on random tokens. Each case runs in a process of its own, through the very programs
that `jaxllm train` compiles; those of float32 state and of several devices twice: compiled cold,
then from the store. A peer is transformers with torch.compile and fused AdamW on the same card. One
JSON line each.

Model FLOPs of a step: 6 x parameters of a token x tokens + 6 x attention layers x rows x length^2 x
attention width; recurrences are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, ROUNDS, PEAK_FLOPS = 8, 5, 989e12
"""Steps timed together, as in a run, where the device never waits; rounds, of which the median is
taken; an H100's dense bfloat16 peak."""

LLAMA, GPT, MAMBA, OLMOE = "1.24B", "124M", "Mamba-2 1.3B", "OLMoE, half"
SHAPES = {LLAMA: (8, 2048), "1.24B long": (4, 4096), GPT: (32, 1024)}
OTHERS = {MAMBA: (8, 2048), OLMOE: (8, 2048)}
"""Model and (rows, length)."""

HIDING = (("xla_gpu_enable_latency_hiding_scheduler", True),)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{shape}, {dtype} state": (shape, {"param_dtype": dtype, "logit_dtype": dtype})
    for shape in SHAPES
    for dtype in ("bfloat16", "float32")
}
"""Of narrow state the logits are narrow too, as the peer's are."""
MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.24B, 2 devices, fsdp=2": (LLAMA, {"mesh": "fsdp=2", "batch": 16}),
    "1.24B, 2 devices, data=2": (LLAMA, {"mesh": "data=2", "batch": 16}),
    "1.24B, 2 devices, tensor=2": (LLAMA, {"mesh": "tensor=2", "fused": False}),
}
"""Weak scaling over devices that copy or shard the state, strong over those that split layers."""
_NARROW = {"param_dtype": "bfloat16", "logit_dtype": "bfloat16"}
_SCANNED = _NARROW | {"layout": "scan", "remat": "save_dots"}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba-2 1.3B": (MAMBA, _SCANNED),
    "Mamba-2 1.3B, chunked": (MAMBA, _SCANNED | {"scan": "chunked"}),
    "Mamba-2 1.3B, unrolled": (MAMBA, _NARROW | {"remat": "save_dots"}),
    "Mamba-2 1.3B, full": (MAMBA, _SCANNED | {"remat": "full"}),
    "Mamba-2 1.3B, chunked, full": (MAMBA, _SCANNED | {"scan": "chunked", "remat": "full"}),
    "OLMoE, half": (OLMOE, _NARROW),
    "OLMoE, half, ragged_dot": (OLMOE, _NARROW | {"experts": "ragged_dot"}),
    "OLMoE, half, save_dots": (OLMOE, _NARROW | {"remat": "save_dots"}),
}
"""Models whose time is in a kernel, by it and by the plain form that it stands for."""
PEERS = {f"{shape}, peer": shape for shape in SHAPES}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "1.24B, separate projections": (LLAMA, {"fused": False}),
    "1.24B, scan": (LLAMA, {"layout": "scan"}),
    "1.24B, scan, save_dots": (LLAMA, {"layout": "scan", "remat": "save_dots"}),
    "1.24B, save_dots": (LLAMA, {"remat": "save_dots"}),
    "1.24B, save_attention": (LLAMA, {"remat": "save_attention"}),
    "1.24B, full": (LLAMA, {"remat": "full"}),
    "1.24B, offload": (LLAMA, {"layout": "scan", "remat": "offload"}),
    "1.24B, loss chunks of 1,024": (LLAMA, {"chunk_tokens": 1024}),
    "1.24B, 2 devices, fsdp=2, latency hiding": (
        LLAMA,
        {"mesh": "fsdp=2", "batch": 16, "options": HIDING},
    ),
    "1.24B, 2 devices, tensor=2, latency hiding": (
        LLAMA,
        {"mesh": "tensor=2", "fused": False, "options": HIDING},
    ),
}

PEER = """
import json, statistics, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
kind, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_default_dtype(torch.bfloat16)
torch.set_float32_matmul_precision("high")
with torch.device("cuda"):
    if kind == "124M":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_positions=1024, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, hidden_size=2048,
            intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, use_cache=False,
            max_position_embeddings=8192, rope_theta=5e5, attn_implementation="sdpa"))
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
vocab = model.config.vocab_size
ids = torch.randint(0, vocab, (rows, length), device="cuda")
compiled = torch.compile(model)
def step():
    compiled(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
times = []
for _ in range(ROUNDS + 1):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    times.append((time.perf_counter() - start) / STEPS)
ms = statistics.median(times[1:]) * 1e3
print(json.dumps({"ms": round(ms, 2), "tokens_per_s": round(rows * length / ms * 1e3),
    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}))
"""


def specs(name: str) -> Any:
    """The model of a shape."""
    from jaxllm.spec.model import Block, Head, ModelSpec, sub
    from jaxllm.spec.ops import MLP, Attention, Norm
    from jaxllm.zoo.families import PRESETS

    if name == MAMBA:
        return mamba()
    if name == OLMOE:
        return olmoe()
    if name != GPT:
        return PRESETS["llama-3.2-1b"]
    norm = Norm(type="layer", bias=True)
    subs = (
        sub("attn", Attention(heads=12, kv_heads=12, head_dim=64), norm_in=norm),
        sub("mlp", MLP(width=3072, gated=False, activation="gelu_tanh"), norm_in=norm),
    )
    return ModelSpec(
        vocab=50_304,
        width=768,
        blocks=(Block(name="G", subs=subs),),
        layers="G*12",
        context=1024,
        final_norm=norm,
        head=Head(tied=True),
    )


def mamba() -> Any:
    """The shape of the published Mamba-2 of 1.3 billion parameters."""
    from jaxllm.spec.model import Block, Head, ModelSpec, sub
    from jaxllm.spec.ops import Norm
    from jaxllm.spec.state_space import StateSpaceDual

    norm = Norm()
    op = StateSpaceDual(heads=64, head_dim=64, state=128)
    return ModelSpec(
        vocab=50_288,
        width=2048,
        blocks=(Block(name="M", subs=(sub("ssm", op, norm_in=norm),)),),
        layers="M*48",
        context=2048,
        final_norm=norm,
        head=Head(tied=True),
    )


def olmoe() -> Any:
    """The shape of OLMoE with half of its layers: 64 experts, 8 a token."""
    from jaxllm.spec.model import Block, Head, ModelSpec, sub
    from jaxllm.spec.moe import MoE
    from jaxllm.spec.ops import MLP, Attention, Norm

    norm = Norm()
    attn = Attention(heads=16, kv_heads=16, head_dim=128)
    moe = MoE(experts=64, active=8, mlp=MLP(width=1024))
    subs = (sub("attn", attn, norm_in=norm), sub("moe", moe, norm_in=norm))
    return ModelSpec(
        vocab=50_304,
        width=2048,
        blocks=(Block(name="E", subs=subs),),
        layers="E*8",
        context=4096,
        final_norm=norm,
        head=Head(),
    )


def run_config(shape: str, changes: dict[str, Any]) -> Any:
    """The run that a case stands for."""
    from jaxllm.ops.loss import LossOptions
    from jaxllm.train.config import Optimizer, RunConfig

    rows, length = (SHAPES | OTHERS)[shape]
    config = RunConfig(
        spec=specs(shape),
        batch=rows,
        length=length,
        dtype="bfloat16",
        layout="unrolled",
        fused=True,
        optimizer=Optimizer(learning_rate=1e-4, b2=0.95),
        loss=LossOptions(chunk_tokens=changes.pop("chunk_tokens", 8192)),
    )
    return dataclasses.replace(config, **changes)


def model_flops(spec: Any, rows: int, length: int) -> float:
    """Of one training step, counted as in the head of this file."""
    from jaxllm.spec.cost import num_active_params
    from jaxllm.spec.ops import Attention

    ops = [named.op for part in spec.block(0).subs for named in part.ops]
    wide = sum(op.heads * op.head_dim for op in ops if isinstance(op, Attention))
    pairs = spec.num_layers * rows * length**2 * wide
    return 6 * num_active_params(spec) * rows * length + 6 * pairs


def measure(shape: str, changes: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of one case in this process, or only store its programs."""
    options = changes.pop("options", None)
    config = run_config(shape, changes)
    return time_steps(config, options, count=given.steps, rounds=given.rounds)[0]


def time_steps(
    config: Any, options: Any = None, *, count: int = STEPS, rounds: int = ROUNDS
) -> tuple[dict[str, Any], Any]:
    """Times of a run's training step in this process, and a function that takes more steps."""
    import jax
    import numpy as np

    from jaxllm.aot.store import Store
    from jaxllm.core.mesh import make_mesh, parse_mesh
    from jaxllm.data.batch import Batch
    from jaxllm.train.programs import plan_programs

    rows, length = config.batch, config.length
    mesh = make_mesh(parse_mesh(config.mesh)) if config.mesh else None
    planned, store, start = plan_programs(config, mesh), Store.default(), time.perf_counter()
    program = planned.step
    if options is not None:
        program = dataclasses.replace(program, options=options)
    step = program.load(store)
    ready = time.perf_counter() - start
    init = planned.init.load(store)
    if not rounds:
        return {"compile_s": round(step.report.compile_seconds, 1)}, None
    state = init(np.uint32(0))
    ids = np.random.default_rng(0).integers(0, config.spec.vocab, (2, rows, length + 1))
    ids = ids.astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    where = jax.tree.map(lambda s: s.sharding, planned.step.args[1])
    batches = [
        jax.device_put(Batch(i[:, :-1].copy(), i[:, 1:].copy(), weights), where) for i in ids
    ]

    def steps(count: int) -> float:
        nonlocal state
        for index in range(count):
            state, metrics = step(state, batches[index % 2])
        return float(metrics.loss)

    losses, times = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        losses.append(steps(count))
        times.append(1e3 * (time.perf_counter() - start) / count)
    ms = statistics.median(times[1:])
    flops = model_flops(config.spec, rows, length)
    devices = 1 if mesh is None else mesh.size
    stats = jax.devices()[0].memory_stats() or {}
    line = {
        "ms": round(ms, 2),
        "spread_ms": [round(min(times[1:]), 2), round(max(times[1:]), 2)],
        "tokens_per_s": round(rows * length / ms * 1e3),
        "model_tflops": round(flops / ms / 1e9, 1),
        "mfu_by_this_count": round(flops / ms * 1e3 / PEAK_FLOPS / devices, 3),
        "predicted_gib": round(step.report.peak_bytes / 2**30, 2),
        "measured_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
        "compile_s": round(step.report.compile_seconds, 1),
        "ready_s": round(ready, 2),
        "stored": step.stored,
        "loss_after_first_and_last_round": [round(losses[0], 4), round(losses[-1], 4)],
        "device": jax.devices()[0].device_kind,
    }
    return line, steps


def run_python(arguments: list[str], cache: str, timeout_s: float, **more: str) -> dict[str, Any]:
    """The JSON that a fresh process prints last; `more` is added to its environment."""
    environment = (
        os.environ
        | more
        | {
            "JAXLLM_CACHE": cache,
            "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }
    )
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"over {timeout_s} s"}
    if done.returncode:
        return {"error": done.stderr[-800:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--only", nargs="*", help="cases to measure")
    parser.add_argument("--commit", default="")
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0: only compile and store")
    parser.add_argument("--cache", help="where programs are stored; a new folder by default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = CASES | MESHES | KERNELS | ABLATIONS
    if options.case:
        shape, changes = every[options.case]
        print(json.dumps(measure(shape, dict(changes), options)))
        return
    stamp = {"commit": options.commit, "date": datetime.date.today().isoformat()}

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(line | stamp) + "\n")

    cache = options.cache or tempfile.mkdtemp()
    chosen = options.only if options.only is not None else [*CASES, *PEERS]
    for name in chosen + (list(ABLATIONS) if options.ablate else []):
        if name in PEERS:
            numbers = [str(n) for n in SHAPES[PEERS[name]]]
            code = PEER.replace("STEPS", str(options.steps))
            code = code.replace("ROUNDS", str(options.rounds))
            arguments = ["-c", code, PEERS[name], *numbers]
        else:
            arguments = [__file__, "--out", "-", "--case", name]
            arguments += ["--steps", str(options.steps), "--rounds", str(options.rounds)]
        twice = "float32" in name or name in MESHES
        for start in ("cold", "from the store") if twice else ("cold",):
            found = run_python(arguments, cache, options.timeout)
            say({"bench": f"train step {name}", "start": start} | found)


if __name__ == "__main__":
    main()
