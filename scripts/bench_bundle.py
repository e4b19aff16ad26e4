"""A bundle and the native runner of one model, checked against the model itself and timed.

    python scripts/bench_bundle.py FOLDER --platform cuda
    python scripts/bench_bundle.py FOLDER --platform cuda --runner build/pjrt_runner/pjrt_runner \\
        --plugin PATH/jax_plugins/xla_cuda13/xla_cuda_plugin.so

Draws Llama 3.2 1B's shape (2.5 GB; `--toy` shrinks it), exports a bundle with executables of two
programs, answers from it in fresh processes (seconds since each began, and which step had been
reached by then; `tokens_per_s` holds the loading of the decoding program), and compares the ids
with those of `Model.generate` under the same policy; then the same for the runner. One JSON line a
result. What is there in FOLDER from an earlier call is used again.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SIZE = 256
"""Of the context, of the only prefill bucket, and of the state."""
PROMPT, NEW = list(range(1, 151)), 100


def say(**row: Any) -> None:
    """Print a result."""
    print(json.dumps(row), flush=True)


def draw(folder: Path, toy: bool, dtype: str) -> None:
    """Random weights as a checkpoint."""
    import jax.numpy as jnp

    from jaxllm.spec.table import layer_paths
    from jaxllm.zoo.families import PRESETS
    from jaxllm.zoo.load import save_checkpoint

    spec = PRESETS["llama-3.2-1b"]
    spec = dataclasses.replace(spec, layers="G*2", vocab=512) if toy else spec
    paths, noise = layer_paths(spec), np.random.default_rng(0).standard_normal(2**24, np.float32)
    places = {path: i for i, path in enumerate(paths)}

    def read(path: str) -> Any:
        d = paths[path]
        size = int(np.prod(d.shape))
        drawn = np.resize(np.roll(noise, 7919 * places[path]), size).reshape(d.shape)
        leaf = drawn * np.float32(1.5 * d.std) if d.std else d.fill + np.float32(0.3) * drawn
        return leaf if d.wide else leaf.astype(jnp.dtype(dtype))

    save_checkpoint(folder, spec, read, dtype=dtype)


def model_of(source: Path, platform: str, dtype: str) -> Any:
    """The model itself, with the kernels of a bundle."""
    import jaxllm
    from jaxllm.export.ways import Options, ways

    (way,) = ways(Options(platforms=(platform,), dtype=dtype))
    return jaxllm.load(source, policy=way.policy, store=False)


def far(model: Any, ids: list[int], found: list[int]) -> dict[str, Any]:
    """How far an answer is from the model's own: where they part, and how much less likely than
    the most likely token its tokens are at most, of the logits' standard deviations.

    Two compilations choose their products apart, so that near ties can fall either way.
    """
    same = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), None)
    if same is None:
        return {"equals_the_model": len(ids) == len(found)}
    logits = model.logits([[*PROMPT, *found]])[0, len(PROMPT) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(found)[:, None], axis=1)[:, 0]
    gaps = (logits.max(axis=1) - chosen) / logits.std()
    return {
        "equals_the_model": False,
        "parts_at": same,
        "gap_there": round(float(gaps[same]), 4),
        "largest_gap": round(float(gaps.max()), 4),
    }


def export(source: Path, bundle: Path, platform: str, dtype: str) -> None:
    """A bundle of the two programs that a short greedy answer takes, compiled here."""
    import jaxllm.export.table
    from jaxllm.export.bundle import export_bundle
    from jaxllm.export.table import Sizes
    from jaxllm.export.ways import Options

    jaxllm.export.table._MODES = ("greedy",)
    sizes = Sizes(context=SIZE, prefill=(SIZE,))
    options = Options(platforms=(platform,), sizes=sizes, dtype=dtype, native=True)
    export_bundle(str(source), bundle, options)


def first(bundle: str, count: int) -> None:
    """In a fresh process: the ids of a bundle, and when the first of them came."""
    passed = {"python": since_start()}
    import jax

    passed["jax"] = since_start()
    from jaxllm.aot import counter
    from jaxllm.export.model import load_bundle

    passed["imports"] = since_start()
    jax.devices()
    passed["devices"] = since_start()
    model = load_bundle(bundle)
    passed["loaded"] = since_start()
    stream = model.bundle.stream(PROMPT, count)
    found = list(next(stream))
    passed["first_token"] = since_start()
    found += [i for ids in stream for i in ids]
    stream = model.bundle.stream(PROMPT, count)  # again, with every program loaded
    known = len(next(stream))
    start = time.perf_counter()
    rate = (sum(map(len, stream)) - known) / (time.perf_counter() - start)
    stored = [program.stored for program in model.bundle.ready.values()]
    compiled = counter.compilations()
    say(ids=found, passed=passed, compiled=compiled, stored=stored, tokens_per_s=round(rate, 1))


def since_start() -> float:
    """Seconds since this process began, by the kernel's clock."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return round(now - ticks / os.sysconf("SC_CLK_TCK"), 3)


def fresh(*arguments: str) -> dict[str, Any]:
    """The JSON that a process prints last."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def starts(bundle: Path, ids: list[int], runs: int) -> None:
    """Starts of a bundle: the first hashes the weights, later ones know them."""
    rows = [
        fresh(sys.executable, str(HERE / "bench_bundle.py"), str(bundle), "--first", str(NEW))
        for _ in range(runs + 1)
    ]
    times = [row["passed"]["first_token"] for row in rows]
    say(
        what="bundle",
        equals_the_model=all(row["ids"] == ids for row in rows),
        tokens=len(ids),
        distinct=len(set(ids)),
        compiled=[row["compiled"] for row in rows],
        stored=all(all(row["stored"]) for row in rows),
        first_token_s={"hashed": times[0], "median": statistics.median(times[1:]), "all": times},
        passed_s=[row["passed"] for row in rows],
        tokens_per_s=[row["tokens_per_s"] for row in rows],
    )


def native(given: Any, source: Path, dtype: str, model: Any, ids: list[int]) -> None:
    """The runner: executables made first, then two answers."""
    folder = given.folder / "runner"
    if not folder.exists():
        options = ["--runner", "--platform", given.platform, "--dtype", dtype]
        options += ["--context", str(SIZE), "--prefill", str(SIZE)]
        command = [sys.executable, "-m", "jaxllm.cli.main", "export", str(source), str(folder)]
        settings = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, *options], check=True, env=settings)
    client = [] if given.platform == "cpu" else ["--option", "preallocate=false"]
    command = [str(given.runner), str(folder), "--plugin", str(given.plugin), *client]
    subprocess.run([*command, "--build"], check=True)
    ask = ["--native", "--ignore-end", "--prompt", ",".join(map(str, PROMPT))]
    for _ in range(2):
        run = [*command, *ask, "--max-tokens", str(NEW)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode:
            return say(what="runner", failed=done.stderr.strip().splitlines()[-1:])
        found = [int(i) for i in done.stdout.split()]
        times = json.loads(done.stderr.strip().splitlines()[-1])
        say(what="runner", **far(model, ids, found), **times)
    return None


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--runner", type=Path)
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first is not None:
        return first(str(given.folder), given.first)
    given.folder.mkdir(parents=True, exist_ok=True)
    source, bundle = given.folder / "source", given.folder / "bundle"
    dtype = "bfloat16" if given.platform == "cuda" else "float32"
    if not source.exists():
        draw(source, given.toy, dtype)
    if not bundle.exists():
        export(source, bundle, given.platform, dtype)
    model = model_of(source, given.platform, dtype)
    ids = model.generate(PROMPT, max_tokens=NEW).token_ids
    starts(bundle, ids, given.runs)
    if given.runner is not None:
        native(given, source, dtype, model, ids)
    return None


if __name__ == "__main__":
    main()
