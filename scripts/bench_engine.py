"""The serving engine on one accelerator: start, one answer, many answers, host time of a step.

  python3 scripts/bench_engine.py --out $OUT/engine.jsonl [--parts start one many] [--quantize int4]

Random weights of a preset, greedy. This process compiles what the store lacks; `start` starts fresh
ones. `one` decodes an answer by the engine and by `generator.stream` in turn, `steps` runs programs
by themselves, `many` is --requests prompts of 100 to 1,024 random tokens with answers of as many,
all at once. One JSON line each, with the host's share of every step and where it went.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_clock import Clock, host_of, steps

LIMITS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
"""Bytes and bfloat16 FLOPs a second by the vendor's data sheet."""


def opened(given: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """(model, engine, seconds that each took)."""
    begin = time.perf_counter()
    import jax

    import jaxllm
    from jaxllm.serve.config import EngineConfig
    from jaxllm.serve.engine import Engine

    jax.devices()
    imported = time.perf_counter()
    with alone(None if given.child else given.lock):
        model = jaxllm.load(given.source, dtype=given.dtype)
        if given.quantize:
            model = model.quantize(given.quantize)
        jax.block_until_ready(model.params)
    loaded = time.perf_counter()
    names = (
        "context",
        "max_sequences",
        "max_batch_tokens",
        "cache_tokens",
        "decode_steps",
        "kv_dtype",
    )
    engine = Engine(model, EngineConfig(**{name: getattr(given, name) for name in names}))
    jax.block_until_ready(engine.runner.state)
    made = list(engine.runner.executables.values())
    return (
        model,
        engine,
        {
            "import_s": round(imported - begin, 2),
            "model_s": round(loaded - imported, 2),
            "engine_s": round(time.perf_counter() - loaded, 2),
            "programs": len(made),
            "stored": sum(e.stored for e in made),
            "program_s": [round(x, 2) for x in sorted(e.seconds for e in made)],
        },
    )


def since_start() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def child(given: argparse.Namespace) -> None:
    """A start: prints how long it took until ready, and until the first token after."""
    from jaxllm.serve.request import Request

    _, engine, took = opened(given)
    took["ready_s"] = round(since_start(), 2)
    begin = time.perf_counter()
    engine.generate(Request(prompt_ids=tuple(range(1, 100)), max_tokens=1))
    took["first_token_ms"] = round(1e3 * (time.perf_counter() - begin), 1)
    engine.close()
    print("CHILD " + json.dumps(took), flush=True)


def start() -> dict[str, Any]:
    """What a fresh process says."""
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {"bench": "start", "error": "over 60 s"}
    found = [line[6:] for line in done.stdout.splitlines() if line.startswith("CHILD ")]
    if not found:
        return {"bench": "start", "error": done.stderr[-1500:]}
    return {"bench": "start"} | json.loads(found[0])


def prepare(given: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Compile what `generator.stream` will ask for, so that nothing runs meanwhile."""
    from jaxllm.infer import programs
    from jaxllm.infer.programs import bucket

    setup, generator = model.generator.setup, model.generator
    capacity = bucket(given.prompt + min(given.tokens, 128), 256)
    common = {"batch": 1, "capacity": capacity, "mode": "greedy"}
    fresh = programs.prefill(setup, length=bucket(given.prompt), fresh=True, **common)
    decode = programs.decode(setup, tokens=generator.tokens_per_call, **common)
    made = [generator.executable(program) for program in (fresh, decode)]
    return {"bench": "programs of generate", "program_s": [round(e.seconds, 2) for e in made]}


def one(given: argparse.Namespace, model: Any, engine: Any, clock: Clock) -> dict[str, Any]:
    """One answer by the engine and by the compiled loop, in turn."""
    import numpy as np

    import jaxllm
    from jaxllm.serve.request import Request

    prompt = np.random.default_rng(0).integers(0, model.spec.vocab, given.prompt).tolist()
    tokens = given.tokens
    request = Request(prompt_ids=tuple(prompt), max_tokens=tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {"engine": [], "generate": []}
    answers: dict[str, list[int]] = {}
    for round_ in range(1 + given.rounds):
        got: list[int] = []
        begin = 0.0
        for piece in engine.submit(request):
            begin = begin or time.perf_counter()
            got += piece.token_ids
        rates["engine"].append((len(got) - 1) / (time.perf_counter() - begin))
        answers["engine"] = got
        if round_ == 0:
            host_of(engine, clock)
        chunks = model.generator.stream([prompt], jaxllm.Sampling(), tokens)
        got = next(chunks)[0].tolist()
        begin = time.perf_counter()
        for chunk in chunks:
            got += chunk[0].tolist()
        rates["generate"].append((len(got) - 1) / (time.perf_counter() - begin))
        answers["generate"] = got
    host = host_of(engine, clock)
    same = sum(a == b for a, b in zip(answers["engine"], answers["generate"], strict=False))
    medians = {name: round(statistics.median(x[1:]), 1) for name, x in rates.items()}
    return {
        "bench": f"one answer of {tokens} tokens",
        "tokens_per_s": medians,
        "engine_over_generate": round(medians["engine"] / medians["generate"], 3),
        "equal_tokens": [same, tokens],
        **host,
    }


def least_seconds(
    given: argparse.Namespace, model: Any, lengths: list[list[int]]
) -> dict[str, float]:
    """The least time by bytes and by FLOPs: weights once a step, cache once a token drawn."""
    import jax

    limit = next((v for k, v in LIMITS.items() if k in jax.devices()[0].device_kind), None)
    if limit is None:
        return {}
    from jaxllm.spec.cost import num_params
    from jaxllm.state.paged import page_bytes

    pages = {"dtype": model.policy.compute_dtype, "kv_dtype": given.kv_dtype}
    token = sum(page_bytes(model.spec, page_size=1, **pages).values())
    weights = model.nbytes
    cache = sum(token * sum(range(p, p + n)) for p, n in lengths)
    drawn = sum(n for _, n in lengths)
    steps = max(max(n for _, n in lengths), drawn / given.max_sequences)
    flops = 2 * num_params(model.spec) * sum(p + n for p, n in lengths)
    return {"bytes_s": (weights * steps + cache) / limit[0], "matmul_s": flops / limit[1]}


def many(
    given: argparse.Namespace, model: Any, engine: Any, clock: Clock, *, count: int
) -> dict[str, Any]:
    """Requests all at once."""
    import numpy as np

    from jaxllm.serve.request import Request

    random = np.random.default_rng(0)
    lengths = random.integers(100, 1025, (count, 2)).tolist()
    if given.lengths:
        lengths = [given.lengths for _ in range(count)]
    requests = [
        Request(
            prompt_ids=tuple(random.integers(0, model.spec.vocab, p).tolist()),
            max_tokens=n,
            ignore_eos=True,
        )
        for p, n in lengths
    ]
    host_of(engine, clock)
    before, begin = engine.stats(), time.perf_counter()
    streams = [engine.submit(request) for request in requests]
    until = begin + given.seconds_many
    cut = False
    for stream in streams:
        for _ in stream:
            if time.perf_counter() > until:
                cut = True
                stream.cancel()
                break
    took, after = time.perf_counter() - begin, engine.stats()
    drawn = after.drawn_tokens - before.drawn_tokens
    least = least_seconds(given, model, lengths)
    limit = sum(n for _, n in lengths) / max(least.values()) if least else None
    return {
        "bench": f"{count} requests at once",
        "source": given.source,
        "lengths": given.lengths or "100 to 1,024 in and out",
        "cut": cut,
        "seconds": round(took, 2),
        "output_tokens": drawn,
        "output_tokens_per_s": round(drawn / took, 1),
        "least_s": {name: round(value, 3) for name, value in least.items()},
        "limit_tokens_per_s": limit and round(limit, 1),
        "share_of_limit": limit and round(drawn / took / limit, 3),
        "preemptions": after.preemptions - before.preemptions,
        "compilations": after.compilations - before.compilations,
        **host_of(engine, clock),
    }


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Hold a lock that others on the machine ask for too."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The serving engine on one accelerator.")
    parser.add_argument("--source", default="random:llama-3.2-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", help="a format of Model.quantize, such as int4")
    parser.add_argument("--parts", nargs="*", default=["start", "one", "many"])
    parser.add_argument("--shapes", nargs="*", default=[""], help="parts of programs' names")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--requests", type=int, nargs="*", default=[256])
    parser.add_argument("--lengths", type=int, nargs=2, help="tokens in and out of every request")
    parser.add_argument("--kv-dtype", default="auto", help="int8 or fp8 pages")
    parser.add_argument("--tokens", type=int, default=512, help="of one answer")
    parser.add_argument("--prompt", type=int, default=600, help="tokens of one answer's prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--decode-steps", type=int)
    parser.add_argument("--cache-tokens", type=int, default=256 * 2048)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no part after these")
    parser.add_argument("--seconds-many", type=float, default=60.0, help="cut a load off after")
    parser.add_argument("--lock", type=Path, help="a file to lock around what is timed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for."""
    given, began = options(), time.perf_counter()
    if given.child:
        child(given)
        return
    stamp = {"commit": given.commit, "date": datetime.date.today().isoformat()}
    stamp |= {"quantize": given.quantize, "kv_dtype": given.kv_dtype}

    def say(make: Any, *args: Any, **more: Any) -> None:
        if time.perf_counter() - began > given.seconds:
            return
        try:
            line = make(*args, **more)
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {error}"[:1500]}
        line = line | stamp | {"at_s": round(time.perf_counter() - began, 1)}
        print(json.dumps(line), flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    from jaxllm.core.logging import show_notes

    show_notes()
    model, engine, took = opened(given)
    import jax

    stamp["device"] = jax.devices()[0].device_kind
    say(lambda: {"bench": "this process"} | took)
    if "one" in given.parts:
        say(prepare, given, model)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        for _ in range(given.parts.count("start")):
            with alone(given.lock):
                say(start)
        clock = Clock(engine)
        if "one" in given.parts:
            with alone(given.lock):
                say(one, given, model, engine, clock)
        if "steps" in given.parts:
            with alone(given.lock):
                say(steps, given, engine)
        for count in given.requests if "many" in given.parts else []:
            with alone(given.lock):
                say(many, given, model, engine, clock, count=count)


if __name__ == "__main__":
    main()
