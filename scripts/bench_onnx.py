"""Tokens a second of an exported ONNX graph in onnxruntime beside our own programs, on this CPU.

    python scripts/bench_onnx.py smollm2-135m-instruct [--tokens 64] [--rounds 3] [--genai FOLDER]

With --genai also the graph that onnxruntime's own tool makes of the same model, in its own loop:
`python -m onnxruntime_genai.models.builder -i MODEL -o FOLDER -p fp32 -e cpu` wrote the folder from
what `jaxllm.load(source).save(MODEL)` saved; the package onnxruntime-genai has to be there.

All decode greedily from one prompt, in turns, float32, with as many threads as there are cores;
all tokens have to be equal. `cpu_s` is processor time a token: other work on the machine counts
less in it than in wall-clock time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def graph(folder: Path) -> Any:
    """A function (ids, count) -> new ids, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    providers = ["CPUExecutionProvider"]
    run = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    shapes = {x.name: x.shape for x in run.get_inputs()[1:]}
    outputs = [name.replace("past", "present") for name in shapes]

    def greedy(ids: list[int], count: int) -> list[int]:
        feeds = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in shapes.items()}
        found, new = [], ids
        for _ in range(count):
            out: Any = run.run(
                ["logits", *outputs], feeds | {"input_ids": np.array([new], np.int64)}
            )
            new = [int(out[0][0].argmax())]
            found += new
            feeds = dict(zip(shapes, out[1:], strict=True))
        return found

    return greedy


def genai(folder: Path) -> Any:
    """A function (ids, count) -> new ids, by onnxruntime-genai."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def greedy(ids: list[int], count: int) -> list[int]:
        options = og.GeneratorParams(model)
        options.set_search_options(
            max_length=len(ids) + count, min_length=len(ids) + count, do_sample=False
        )
        run = og.Generator(model, options)
        run.append_tokens(np.array(ids, np.int32))
        while not run.is_done():
            run.generate_next_token()
        return [int(i) for i in run.get_sequence(0)[len(ids) :]]

    return greedy


def main() -> None:
    """Print a line a round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--genai", type=Path)
    given = parser.parse_args()
    import jaxllm
    from jaxllm.export.onnx_graph import export_onnx

    model = jaxllm.load(given.source)
    ids = np.random.default_rng(0).integers(0, model.spec.vocab, 32).tolist()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = graph(export_onnx(given.source, Path(folder) / "onnx"))

        def ours(prompt: list[int], count: int) -> list[int]:
            chunks = model.generator.stream([prompt], jaxllm_sampling(), count)
            return [int(i) for chunk in chunks for i in chunk[0]]

        sides = {"onnxruntime": theirs, "jaxllm": ours}
        sides |= {"genai": genai(given.genai)} if given.genai else {}
        found = {name: run(ids, given.tokens) for name, run in sides.items()}
        assert all(tokens == found["jaxllm"] for tokens in found.values()), found
        for _ in range(given.rounds):
            row = {}
            for name, run in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run(ids, given.tokens)
                row[f"{name}_tokens_per_s"] = round(given.tokens / (time.perf_counter() - wall), 1)
                row[f"{name}_cpu_s"] = round((time.process_time() - cpu) / given.tokens, 4)
            row["load"] = round(os.getloadavg()[0], 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(json.dumps({"median": {n: statistics.median(r[n] for r in rows) for n in rows[0]}}))


def jaxllm_sampling() -> Any:
    """Greedy."""
    from jaxllm.infer.sampling import Sampling

    return Sampling()


if __name__ == "__main__":
    main()
