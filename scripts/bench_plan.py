"""Peak memory of programs as planned and as measured on one GPU, as JSON lines.

    python scripts/bench_plan.py [--only PART] [--out FILE]

Every case runs in a process of its own: it plans with `jaxllm plan`'s own code, compiles the same
program, makes arguments of zeros, calls it three times and reads the allocator's peak. Planning
and compiling run side by side, calls one after the other. `kernels` counts kernel calls, whose
FLOPs a plan takes from the analytic count; `flops_ratio` is what the compiled text executes over
what is needed.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
NARROW = {"param_dtype": "bfloat16", "logit_dtype": "bfloat16"}
TRAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "124M, step of 32 x 1024, bfloat16 state": ("124M", NARROW),
    "1.24B, step of 8 x 2048, bfloat16 state": ("1.24B", NARROW),
    "1.24B, step of 4 x 4096, bfloat16 state": ("1.24B long", NARROW),
    "1.24B, step of 8 x 2048, float32 state, scan, remat full": (
        "1.24B",
        {"layout": "scan", "remat": "full"},
    ),
}
"""Shapes of `bench_train.py` and changes of the run."""
SERVE: dict[str, dict[str, Any]] = {
    "1.24B, decode 1 x 2048": {"batch": 1, "context": 2048},
    "1.24B, decode 32 x 2048": {"batch": 32, "context": 2048},
    "1.24B, decode 8 x 8192": {"batch": 8, "context": 8192},
    "1.24B, decode 1 x 2048, int8": {"batch": 1, "context": 2048, "quantize": "int8"},
    "1.24B, decode 32 x 2048, int8": {"batch": 32, "context": 2048, "quantize": "int8"},
}
"""Options of a plan for serving."""
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "124M, step of 32 x 1024, plain attention": ("124M", NARROW | {"attention": "reference"}),
}
"""Without kernels, so that the compiled text shows all FLOPs."""


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """Only one process of the machine at a time."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def place_here() -> Any:
    """The machine's GPU as a place."""
    import jax

    from jaxllm.plan.place import GPUS, find_place

    kind = jax.devices()[0].device_kind
    names = [name for name, known in GPUS.items() if known == kind]
    if not names:
        raise SystemExit(f"bench_plan: needs one of {', '.join(GPUS.values())}, found {kind}")
    return find_place(f"{names[0]}:1")


def train_case(name: str, place: Any) -> tuple[Any, Any]:
    """(plan of the step, the step)."""
    sys.path.insert(0, str(HERE.parent))
    from bench_train import run_config

    from jaxllm.plan.train import plan_step
    from jaxllm.train.programs import plan_programs

    shape, changes = (TRAIN | EXACT)[name]
    config = run_config(shape, dict(changes))
    return plan_step(config, place), plan_programs(config, None).step


def serve_case(name: str, place: Any) -> tuple[Any, Any]:
    """(plan of decoding, the program)."""
    from jaxllm.infer import programs
    from jaxllm.infer.open import run_policy
    from jaxllm.infer.ready import COMPILER_OPTIONS
    from jaxllm.plan.serve import ServeOptions, plan_serving, serving_setup
    from jaxllm.zoo.families import PRESETS

    options = ServeOptions(dtype="bfloat16", prompt=16, **SERVE[name])
    spec = PRESETS["llama-3.2-1b"]
    plan = plan_serving(spec, place, options, source=name)
    policy = run_policy("bfloat16", platform="gpu", attention=options.attention)
    setup = serving_setup(spec, policy, None, options.quantize)
    setup = dataclasses.replace(setup, options=COMPILER_OPTIONS["gpu"])
    size = {"batch": options.batch, "capacity": options.context}
    program = programs.decode(setup, mode="greedy", tokens=options.steps, **size)
    return plan.programs[1], program


def zeros(args: Any) -> Any:
    """Arguments on the device, made by one program that holds nothing else."""
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), args))()


def measure(name: str, lock: str) -> dict[str, Any]:
    """Plan and run one case in this process."""
    import jax

    jax.config.update("jax_compilation_cache_dir", tempfile.gettempdir() + "/bench_plan")
    place = place_here()
    planned, program = (serve_case if name in SERVE else train_case)(name, place)
    run = program.compile()
    device = jax.devices()[0]

    def peak() -> int:
        return int((device.memory_stats() or {})["peak_bytes_in_use"])

    compiling = peak()
    with alone(lock):
        args = zeros(program.args)
        jax.block_until_ready(args)
        given = peak()
        for _ in range(3):
            out = run(*args)
            held = jax.tree.leaves(out)
            jax.block_until_ready(held)
            # What is donated comes back in the same places of the results.
            args = _again(program, args, out)
        del out, held, args
    found, memory = peak(), planned.memory
    return {
        "case": name,
        "device": device.device_kind,
        "planned_gib": round(memory.total / 2**30, 3),
        "measured_gib": round(found / 2**30, 3),
        "error": round(memory.total / found - 1, 4),
        "compiling_gib": round(compiling / 2**30, 3),
        "arguments_gib": round(given / 2**30, 3),
        "temporaries_gib": round(memory.temporaries / 2**30, 3),
        "flops_ratio": round(planned.counts.flops / planned.needed_flops, 4),
        "kernels": planned.counts.kernels,
        "compile_s": round(planned.compile_s, 1),
    }


def _again(program: Any, args: Any, out: Any) -> Any:
    """Arguments of the next call: results in the places of what was donated."""
    results = list(out) if isinstance(out, tuple) else [out]
    given = iter(results)
    return tuple(next(given) if i in program.donate else x for i, x in enumerate(args))


def one(name: str, lock: str) -> dict[str, Any]:
    """A case in a process of its own."""
    command = [sys.executable, str(HERE), "--measure", name, "--lock", lock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"case": name, "failed": done.stderr.strip().splitlines()[-3:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line a case as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the cases' names")
    parser.add_argument("--lock", default="/tmp/gpu.lock", help="file that calls are held under")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.lock)))
        return
    names = [name for name in (*TRAIN, *SERVE, *EXACT) if given.only in name]
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda name: one(name, given.lock), names):
            print(json.dumps(row), flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
