"""Peak memory of programs as planned and as measured on one GPU, as JSON lines.

    python scripts/bench_plan.py [--only PART] [--out FILE]

Every case is planned by `jaxllm plan`'s own code and compiled again as the trainer or the
generator does it, several at a time; then each program gets arguments of zeros and is called three
times, the small ones first, so that the allocator's peak, which only rises, is that of the case.
`kernels` counts kernel calls, whose FLOPs a plan takes from the analytic count; `flops_ratio` is
what the compiled text executes over what is needed. `--toy` shrinks the models, to try the script.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import tempfile
import time
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
}
"""Shapes of `bench_train.py` and changes of the run."""
SERVE: dict[str, dict[str, Any]] = {
    "1.24B, decode 128 x 2048": {"batch": 128, "context": 2048},
    "1.24B, decode 8 x 65536": {"batch": 8, "context": 65_536},
    "1.24B, decode 160 x 2048, int8": {"batch": 160, "context": 2048, "quantize": "int8"},
}
"""Options of a plan for serving; large enough to stand above the 5.2 GiB that XLA takes to choose
products."""
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "124M, step of 8 x 1024, plain attention": (
        "124M",
        NARROW | {"attention": "reference", "batch": 8},
    ),
}
"""Without kernels, so that the compiled text shows all FLOPs."""


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """Only one process of the machine at a time."""
    with open(path, "w") as file:
        if path != os.devnull:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def place_here() -> Any:
    """The machine's first device as a place."""
    import jax

    from jaxllm.plan.place import GPUS, find_place

    kind = jax.devices()[0].device_kind
    names = {known: name for name, known in GPUS.items()} | {"cpu": "cpu"}
    if kind not in names:
        raise SystemExit(f"bench_plan: needs one of {', '.join(GPUS.values())}, found {kind}")
    return find_place(f"{names[kind]}:1")


def shrunk(spec: Any) -> Any:
    """Two layers and a small vocabulary of a model."""
    return dataclasses.replace(spec, layers="G*2", vocab=512, context=min(spec.context, 4096))


def train_case(name: str, place: Any, toy: bool) -> tuple[Any, Any]:
    """(plan of the step, the step)."""
    sys.path.insert(0, str(HERE.parent))
    from bench_train import run_config

    from jaxllm.plan.train import plan_step
    from jaxllm.train.programs import plan_programs

    shape, changes = (TRAIN | EXACT)[name]
    config = run_config(shape, dict(changes))
    if toy:
        config = dataclasses.replace(config, spec=shrunk(config.spec), batch=1, length=64)
    return plan_step(config, place), plan_programs(config, None).step


def serve_case(name: str, place: Any, toy: bool) -> tuple[Any, Any]:
    """(plan of decoding, the program)."""
    from jaxllm.infer import programs
    from jaxllm.infer.open import run_policy
    from jaxllm.infer.ready import COMPILER_OPTIONS
    from jaxllm.plan.serve import ServeOptions, plan_serving, serving_setup
    from jaxllm.zoo.families import PRESETS

    given: dict[str, Any] = SERVE[name] | ({"batch": 1, "context": 256} if toy else {})
    options = ServeOptions(dtype="bfloat16", prompt=16, **given)
    spec = PRESETS["llama-3.2-1b"]
    spec = shrunk(spec) if toy else spec
    plan = plan_serving(spec, place, options, source=name)
    policy = run_policy("bfloat16", platform=place.platform, attention=options.attention)
    setup = serving_setup(spec, policy, None, options.quantize)
    setup = dataclasses.replace(setup, options=COMPILER_OPTIONS.get(place.platform, ()))
    size = {"batch": options.batch, "capacity": options.context}
    program = programs.decode(setup, mode="greedy", tokens=options.steps, **size)
    return plan.programs[1], program


@dataclasses.dataclass(frozen=True)
class Ready:
    """A case that waits for the device."""

    name: str
    plan: Any
    program: Any
    run: Any


def ready(name: str, place: Any, toy: bool) -> Ready:
    """Plan and compile a case."""
    plan, program = (serve_case if name in SERVE else train_case)(name, place, toy)
    run = program.compile()
    print(f"compiled: {name}", file=sys.stderr, flush=True)
    return Ready(name, plan, program, run)


def zeros(args: Any) -> Any:
    """Arguments on the device, made by one program that holds nothing else."""
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), args))


def stats(what: str) -> int:
    """A figure of the allocator; 0 where nobody keeps it."""
    import jax

    return int((jax.devices()[0].memory_stats() or {}).get(what, 0))


def measure(case: Ready, make: Any, lock: str) -> dict[str, Any]:
    """Call a case's program."""
    import jax

    with alone(lock):
        start = time.perf_counter()
        before, earlier = stats("bytes_in_use"), stats("peak_bytes_in_use")
        args = make()
        jax.block_until_ready(args)
        for _ in range(3):
            out = case.run(*args)
            jax.block_until_ready(out)
            args = again(case.program, args, out)
        found = stats("peak_bytes_in_use")
        del out, args
        seconds = time.perf_counter() - start
    memory = case.plan.memory
    return {
        "case": case.name,
        "device": jax.devices()[0].device_kind,
        "planned_gib": round(memory.total / 2**30, 3),
        "measured_gib": round(found / 2**30, 3),
        "error": round(memory.total / found - 1, 4) if found > earlier else None,
        "held_before_gib": round(before / 2**30, 3),
        "temporaries_gib": round(memory.temporaries / 2**30, 3),
        "flops_ratio": round(case.plan.counts.flops / case.plan.needed_flops, 4),
        "kernels": case.plan.counts.kernels,
        "compile_s": round(case.plan.compile_s, 1),
        "device_s": round(seconds, 2),
    }


def again(program: Any, args: Any, out: Any) -> Any:
    """Arguments of the next call: results in the places of what was donated."""
    given = iter(out if isinstance(out, tuple) else (out,))
    return tuple(next(given) if i in program.donate else x for i, x in enumerate(args))


def main() -> None:
    """Print a line a case as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the cases' names")
    parser.add_argument("--lock", default=os.devnull, help="file that calls are held under")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import jax

    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="bench_plan-"))
    place = place_here()
    names = [name for name in (*TRAIN, *SERVE, *EXACT) if given.only in name]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(lambda name: ready(name, place, given.toy), names))
    found.sort(key=lambda case: case.plan.memory.total)
    makers = [zeros(case.program.args).lower().compile() for case in found]
    for case, make in zip(found, makers, strict=True):
        try:
            row = measure(case, make, given.lock)
        except jax.errors.JaxRuntimeError as error:  # others may hold the memory
            row = {"case": case.name, "failed": str(error).splitlines()[0]}
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
