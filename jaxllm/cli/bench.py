"""`jaxllm bench serve URL|SOURCE`: how a server, or an engine in this process, bears a load."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import sys
from typing import Any

from jaxllm.cli.draft import draft_of
from jaxllm.cli.options import Bench
from jaxllm.cli.serve import bounds_of, mesh_of
from jaxllm.core.config import require
from jaxllm.core.logging import show_notes

__all__ = ["run"]


async def _measure(target: Any, options: Bench) -> tuple[list[dict[str, Any]], list[Any]]:
    """(numbers, times) of every load, one after another."""
    from jaxllm.serve.bench.load import Load, drive
    from jaxllm.serve.bench.report import Slo, summary, times_of
    from jaxllm.serve.bench.workload import Workload, asks

    names = {f.name for f in dataclasses.fields(Workload)} - {"kind"}
    workload = Workload(kind=options.prompts, **{n: getattr(options, n) for n in names})
    slo = Slo(ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms, e2e_ms=options.slo_e2e_ms)
    loads = [Load(rate=rate) for rate in options.rate]
    loads += [Load(concurrency=n) for n in options.concurrency or (() if loads else (8,))]
    if options.warmup:
        # Other prompts than those that are measured: the prefix cache must not know these.
        other = dataclasses.replace(workload, requests=options.warmup, seed=workload.seed + 10**6)
        await drive(target, asks(other), Load(concurrency=options.warmup))
    runs, times = [], []
    for number, load in enumerate(loads):
        wanted = asks(dataclasses.replace(workload, seed=workload.seed + number))
        before = os.getloadavg()
        records, seconds = await drive(target, wanted, load, seed=workload.seed)
        runs.append(summary(load, records, seconds, slo))
        runs[-1]["load_average"] = [before[0], os.getloadavg()[0]]
        times.append(times_of(records))
        print(f"{load.name}: {seconds:.1f} s", file=sys.stderr)
    return runs, times


async def _over_http(options: Bench) -> Any:
    from jaxllm.serve.bench.load import HttpTarget

    target = HttpTarget(options.target, api_key=options.api_key, temperature=options.temperature)
    async with target:
        return await _measure(target, options), {}


def _in_process(options: Bench) -> Any:
    import jax

    from jaxllm.model import load
    from jaxllm.serve.bench.load import EngineTarget
    from jaxllm.serve.engine import Engine

    how = {"dtype": options.dtype, "mesh": mesh_of(options)}
    model = load(options.target, **how)
    draft = draft_of(options, model, options.target, **how)
    with Engine(model, bounds_of(options), draft=draft) as engine:
        target = EngineTarget(engine, temperature=options.temperature)
        found = asyncio.run(_measure(target, options))
        about = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "engine": dataclasses.asdict(engine.config),
            "stats": dataclasses.asdict(engine.stats()),
        }
        return found, about


def run(options: Bench) -> int:
    """Run the subcommand; returns 1 when requests failed."""
    show_notes()
    require(not (options.rate and options.concurrency), "give either --rate or --concurrency")
    from jaxllm import __version__
    from jaxllm.serve.bench.report import draw, table

    if options.target.startswith(("http://", "https://")):
        (runs, times), about = asyncio.run(_over_http(options))
    else:
        (runs, times), about = _in_process(options)
    print(table(runs))
    if options.out is not None:
        settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "api_key"}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        document = {"jaxllm": __version__, "date": now, "cores": os.cpu_count(), **about}
        document |= {"options": settings, "runs": runs}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
        draw(options.out.with_suffix(".png"), runs, times)
        print(f"{options.out} and {options.out.with_suffix('.png')}", file=sys.stderr)
    return 1 if any(run["failed"] for run in runs) else 0
