"""Training on 1, 2, 4 and 8 GPUs of one host: tokens a second a GPU, efficiency, communication.

  python3 scripts/bench_scaling.py --out $OUT/scaling.jsonl [--devices 1 2] [--only CASE…]

Llama shapes of 1.24B (8 x 2048 a GPU), 6.7B (2 x 4096) and 8B (1 x 8192, remat), bfloat16 compute;
FSDP, FSDP x tensor, and tensor alone. Batches grow with the devices of `fsdp`; `tensor` alone keeps
one GPU's batch. Every case runs in a process of its own (those of one GPU side by side) through the
very program that `jaxllm train` compiles, and then traces three more steps: `exposed` is the time
in which a collective runs and nothing else does. Options of the compiler are cases of their own.
One JSON line each, and a table last.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_train import run_python, time_steps

TRACED = 3  # steps
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a GPU gets of a step, and how the layers run."""

    rows: int
    length: int
    layout: str = "unrolled"
    remat: str = "none"
    state: str = "float32"
    kv_heads: int = 8
    ffn: int = 14_336
    vocab: int = 128_256

    @property
    def timed(self) -> dict[str, int]:
        """Steps timed together and rounds: fewer where a step takes a second."""
        return {} if self.state == "float32" else {"count": 3, "rounds": 3}


WIDE = Shape(rows=1, length=8192, state="bfloat16", remat="full")
OLDER = dataclasses.replace(WIDE, rows=2, length=4096, kv_heads=32, ffn=11_008, vocab=32_000)
SHAPES = {
    "1.24B": Shape(rows=8, length=2048),
    "6.7B": OLDER,
    "6.7B kept": dataclasses.replace(OLDER, remat="none"),
    "8B": WIDE,
    "8B kept": dataclasses.replace(WIDE, remat="none"),
    "8B scan": dataclasses.replace(WIDE, layout="scan"),
}
"""Of 6.7B and 8B one GPU holds parameters, moments and gradients in bfloat16 alone, and recomputes
the layers in the backward pass; `kept` recomputes nothing, which takes several GPUs."""

LATENCY = ("xla_gpu_enable_latency_hiding_scheduler", True)
COMBINED = tuple(
    (f"xla_gpu_{kind}_combine_threshold_bytes", 256 * MIB)
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
)
APART = tuple((name, MIB) for name, _ in COMBINED)
DOUBLE = (("xla_gpu_enable_while_loop_double_buffering", True),)
PIPELINED = (("optimization_level", "O1"),)
"""Under this XLA pipelined collectives have no switch of their own: its level O1 turns them on."""
OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "": (),
    "latency hiding": (LATENCY,),
    "NCCL's own buffers": (("xla_gpu_enable_nccl_user_buffers", True),),
    "latency hiding, collectives combined to 256 MiB": (LATENCY, *COMBINED),
    "latency hiding, collectives of 1 MiB": (LATENCY, *APART),
    "latency hiding, loop in two buffers": (LATENCY, *DOUBLE),
    "level O1": PIPELINED,
}


def meshes(devices: int) -> dict[str, int]:
    """Mesh texts of so many devices, and how many times one GPU's rows they take."""
    if devices == 1:
        return {"": 1}
    found = {f"fsdp={devices}": devices, f"tensor={devices}": 1}
    if devices > 2:
        found[f"fsdp={devices // 2},tensor=2"] = devices // 2
    return found


def cases(counts: list[int]) -> dict[str, dict[str, Any]]:
    """Every case by its name."""
    found = {}
    for shape in SHAPES:
        for devices in counts:
            for mesh, times in meshes(devices).items():
                for label, options in OPTIONS.items():
                    loop = SHAPES[shape].layout == "scan"
                    if (label and devices == 1) or ("loop" in label and not loop):
                        continue
                    if devices == 1 and "kept" in shape:
                        continue
                    name = ", ".join(p for p in (shape, mesh or "one GPU", label) if p)
                    found[name] = {
                        "shape": shape,
                        "devices": devices,
                        "mesh": mesh,
                        "times": times,
                        "options": options,
                    }
    return found


def run_config(shape: str, mesh: str, times: int) -> Any:
    """The run of a case."""
    from jaxllm.ops.loss import LossOptions
    from jaxllm.train.config import Optimizer, RunConfig
    from jaxllm.zoo.families import PRESETS

    chosen, small = SHAPES[shape], PRESETS["llama-3.2-1b"]
    spec = small if shape == "1.24B" else wide(small, chosen)
    return RunConfig(
        spec=spec,
        batch=chosen.rows * times,
        length=chosen.length,
        dtype="bfloat16",
        param_dtype=chosen.state,  # type: ignore[arg-type]
        logit_dtype=chosen.state,  # type: ignore[arg-type]
        layout=chosen.layout,  # type: ignore[arg-type]
        fused="tensor" not in mesh,
        remat=chosen.remat,  # type: ignore[arg-type]
        mesh=mesh,
        optimizer=Optimizer(learning_rate=1e-4, b2=0.95),
        loss=LossOptions(chunk_tokens=8192),
    )


def wide(small: Any, shape: Shape) -> Any:
    """Llama 3.1 8B's or Llama 2 7B's spec, from the small one's."""
    from jaxllm.spec.ops import MLP, Attention

    block = small.blocks[0]
    subs = []
    for sub in block.subs:
        nodes = []
        for node in sub.ops:
            op = node.op
            if isinstance(op, Attention):
                op = dataclasses.replace(op, heads=32, kv_heads=shape.kv_heads, head_dim=128)
            if isinstance(op, MLP):
                op = dataclasses.replace(op, width=shape.ffn)
            nodes.append(dataclasses.replace(node, op=op))
        subs.append(dataclasses.replace(sub, ops=tuple(nodes)))
    return dataclasses.replace(
        small,
        width=4096,
        vocab=shape.vocab,
        blocks=(dataclasses.replace(block, subs=tuple(subs)),),
        layers=f"{block.name}*32",
        head=dataclasses.replace(small.head, tied=False),
    )


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    import jax

    from jaxllm.train.profile import communication

    config = run_config(case["shape"], case["mesh"], case["times"])
    chosen = tuple(map(tuple, case["options"])) or None
    line, steps = time_steps(config, chosen, **SHAPES[case["shape"]].timed)
    line["tokens_per_s_per_gpu"] = round(line["tokens_per_s"] / case["devices"])
    if case["devices"] > 1:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                steps(TRACED)
            traced = communication(Path(folder))
        if traced:
            line |= {f"{n} a step": round(traced.pop(n) / TRACED, 2) for n in list(traced)[:3]}
            line["collectives, ms a step"] = {n: round(v / TRACED, 2) for n, v in traced.items()}
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """What was measured, a row a case."""
    alone = {
        line["shape"]: line["tokens_per_s"]
        for line in lines
        if line["devices"] == 1 and "tokens_per_s" in line
    }
    rows = ["| case | tokens/s/GPU | of one | TFLOP/s a GPU | ms | exposed | GiB (plan) |"]
    rows.append("|---|---|---|---|---|---|---|")
    for line in lines:
        if "tokens_per_s" not in line:
            rows.append(f"| {line['case']} | {str(line.get('error', 'nothing'))[-160:]} |")
            continue
        each, one = line["tokens_per_s_per_gpu"], alone.get(line["shape"])
        shown = "" if one is None else f"{each / one:.3f}"
        flops = line["model_tflops"] / line["devices"]
        waits = line.get("exposed_ms a step", "")
        memory = f"{line['measured_gib']} ({line['predicted_gib']})"
        cells = [line["case"], each, shown, f"{flops:.0f}", line["ms"], waits, memory]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", nargs="*", type=int, help="how many GPUs; all that are there")
    parser.add_argument("--only", nargs="*", help="names of cases, in this order")
    parser.add_argument("--plain", action="store_true", help="no cases of compiler options")
    parser.add_argument("--commit", default="")
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return
    counts = options.devices or [1, 2, 4, 8]
    cache, tuned, lines = tempfile.mkdtemp(), tempfile.mkdtemp(), []
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={tuned}"

    def run(name: str, case: dict[str, Any], first: int = 0) -> None:
        visible = ",".join(str(first + i) for i in range(case["devices"]))
        more = {"CUDA_VISIBLE_DEVICES": visible, "XLA_FLAGS": flags.strip()}
        arguments = [__file__, "--out", "-", "--case", json.dumps(case)]
        found = run_python(arguments, cache, options.timeout, **more)
        stamp = {"commit": options.commit, "date": datetime.date.today().isoformat()}
        kept = {key: case[key] for key in ("shape", "devices", "mesh")}
        lines.append({"bench": "scaling", "case": name} | kept | found | stamp)
        print(json.dumps(lines[-1]), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")

    every = cases(counts)
    chosen = options.only or [n for n in every if not (options.plain and every[n]["options"])]
    alone = [name for name in chosen if every[name]["devices"] == 1]
    with ThreadPoolExecutor(max(counts)) as pool:  # each on a GPU of its own
        list(pool.map(run, alone, [every[n] for n in alone], range(len(alone))))
    for name in chosen:
        if name not in alone:
            run(name, every[name])
    print(table(lines), flush=True)


if __name__ == "__main__":
    main()
