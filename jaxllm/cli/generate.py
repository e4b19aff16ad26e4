"""`jaxllm generate`: answer one prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.cli.draft import check_draft_options, draft_of
from jaxllm.cli.options import Generate
from jaxllm.core.config import require
from jaxllm.core.logging import show_notes
from jaxllm.errors import ConfigError
from jaxllm.infer.sampling import Sampling

__all__ = ["answer", "prompt_of", "run", "sampling_of"]


def sampling_of(options: Any) -> dict[str, Any]:
    """Keyword arguments of `Model.stream` from a command's options, checked before any load."""
    require(options.max_tokens >= 1, f"--max-tokens is at least 1, found {options.max_tokens}")
    names = [f.name for f in dataclasses.fields(Sampling)]
    given = {name: getattr(options, name) for name in names}
    try:
        Sampling(**given)
    except ConfigError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None
    return {**given, "max_tokens": options.max_tokens, "stop": options.stop}


def _messages(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--messages {path}: cannot be read as JSON: {error}") from None


def prompt_of(options: Generate) -> tuple[Any, bool]:
    """(prompt, raw) from exactly one of --prompt, --raw-prompt, --messages."""
    given = [x for x in (options.prompt, options.raw_prompt, options.messages) if x is not None]
    require(len(given) == 1, "give one of --prompt, --raw-prompt and --messages")
    if options.messages is not None:
        return _messages(options.messages), False
    return given[0], options.raw_prompt is not None


def run(options: Generate) -> int:
    """Run the subcommand."""
    show_notes()
    check_draft_options(options)

    def load() -> Any:
        from jaxllm.model import load

        return load(options.source, dtype=options.dtype)

    return answer(options, load)


def answer(options: Generate, load: Callable[[], Any]) -> int:
    """Print the answer of a model, which is loaded once all options are checked."""
    prompt, raw = prompt_of(options)
    sampling = sampling_of(options)
    model = load()
    if not raw and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    pieces = model.stream(prompt, raw=raw, **sampling, **_guesses(options, model))
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            result = end.value
            break
        if not options.json:
            print(piece, end="", flush=True)
    if options.json:
        print(json.dumps(as_json(result)))
        return 0
    print()
    if options.report:
        print(report(model, result))
    return 0


def _guesses(options: Generate, model: Any) -> dict[str, Any]:
    """`draft` of `Model.stream`, where the command line asks for one."""
    draft = draft_of(options, model, options.source, dtype=options.dtype)
    if draft is None:
        return {"draft": options.draft_tokens} if options.draft_tokens else {}
    return {"draft": (draft, options.draft_tokens or 3)}


def as_json(result: Any) -> dict[str, Any]:
    """The JSON object of a generation."""
    timings = dataclasses.asdict(result.timings)
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason,
        "usage": result.usage,
        "timings": timings | {"tokens_per_second": result.timings.tokens_per_second},
    }


def report(model: Any, result: Any) -> str:
    """What the run took and where its parts came from."""
    from jaxllm.aot import counter

    bundle = getattr(model, "bundle", None)
    loaded = list((model.generator.loaded if bundle is None else bundle.ready).values())
    if bundle is None and (single := model.generator.kept.get("single")) is not None:
        loaded += single.parts.runner.executables.values()
    stored = [p for p in loaded if p.stored]
    timings = result.timings
    mapped = bundle is not None or model.weights_stored
    weights = "stored in run layout, memory-mapped" if mapped else "imported"
    drafted, kept = timings.drafted_tokens, timings.accepted_tokens
    guessed = [f"drafted tokens: {drafted}, of which {kept} were right"] if drafted else []
    return "\n".join(
        [
            "",
            (
                f"time to first token: {timings.time_to_first_token_ms:.0f} ms "
                f"(programs {timings.build_ms:.0f} ms)"
            ),
            f"tokens per second: {timings.tokens_per_second:.1f}",
            *guessed,
            f"compile seconds: {counter.compile_seconds():.1f}",
            f"programs from the store: {len(stored)} of {len(loaded)}",
            f"weights: {weights}",
            f"compilations: {counter.compilations()} (traces: {counter.traces()})",
            f"start to answer: {_since_start():.1f} s",
        ]
    )


def _since_start() -> float:
    """Seconds since this process began, by the kernel's clock where it tells."""
    import os
    import time

    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return float("nan")
