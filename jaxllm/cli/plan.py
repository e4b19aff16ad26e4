"""`jaxllm plan CONFIG|SOURCE --devices v5e:4x4`: will it fit, how fast at most, on which mesh."""

from __future__ import annotations

import ast
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from jaxllm.cli.options import Plan as Options
from jaxllm.cli.train import load_config
from jaxllm.core.config import from_dict, nearest, require
from jaxllm.core.logging import log, show_notes
from jaxllm.train.config import RunConfig

__all__ = ["run", "run_config"]


def run(options: Options) -> int:
    """Run the subcommand; exit code 1 if the plan does not fit."""
    show_notes()
    from jaxllm.plan.explain import explain
    from jaxllm.plan.place import find_place

    require(
        options.html is None or options.html.parent.is_dir(),
        f"--html {options.html}: there is no folder {options.html and options.html.parent}",
    )
    plan, found = _plan(options, find_place(options.devices))
    lines = explain(plan) if options.explain or plan.fits is False else []
    if options.json:
        said = plan.to_json() | {"explain": lines}
        if found is not None:
            said["search"] = [trial.to_json() for trial in found.trials]
        print(json.dumps(said))
    else:
        from jaxllm.plan.show import print_plan, print_search

        print_plan(plan)
        if found is not None:
            print_search(found.trials)
        for line in lines:
            print(f"- {line}")
    if options.html is not None:
        from jaxllm.plan.html import page

        options.html.write_text(page(plan, lines, found))
        log.info("plan: wrote %s", options.html)
    return 1 if plan.fits is False else 0


def _plan(options: Options, place: Any) -> tuple[Any, Any]:
    """(the plan, what a search found or None)."""
    is_config = options.source.endswith(".py")
    purpose = options.purpose or ("train" if is_config else "serve")
    require(purpose == "train" or not options.search, "--search varies training runs: --for train")
    if purpose == "train":
        require(options.quantize is None, "--quantize is for serving: --for serve")
        require(options.kv_dtype is None, "--kv-dtype is for serving: --for serve")
        return _train_plan(options, place)
    from jaxllm.plan.serve import ServeOptions, plan_serving
    from jaxllm.plan.source import spec_of

    spec = load_config(Path(options.source)).spec if is_config else spec_of(options.source)
    given = {
        name: getattr(options, name)
        for name in (
            "batch",
            "context",
            "prompt",
            "dtype",
            "mesh",
            "attention",
            "quantize",
            "kv_dtype",
        )
        if getattr(options, name) is not None
    }
    context = min(given.get("context", ServeOptions.context), spec.context)
    given |= {"context": context, "prompt": min(given.get("prompt", ServeOptions.prompt), context)}
    return plan_serving(spec, place, ServeOptions(**given), source=options.source), None


def _train_plan(options: Options, place: Any) -> tuple[Any, Any]:
    from jaxllm.plan.train import plan_training, present

    config = run_config(options, here=not place.estimated and place.platform != "tpu")
    if options.search:
        from jaxllm.plan.search import search

        require(options.mesh is None, "--search chooses the mesh: leave --mesh out")
        found = search(config, place, batch=options.batch, tries=options.tries)
        return present(*found.shown, place, source=options.source), found
    plan = plan_training(
        config, place, source=options.source, mesh=options.mesh, every=options.explain
    )
    return plan, None


def run_config(options: Options, *, here: bool) -> RunConfig:
    """The run to plan: of a config file or of a source, with the command line's changes.

    Args:
      options: of the command.
      here: whether the devices are; for others layers are scanned, which compiles in a time that
        does not grow with depth.

    Raises:
      ConfigError: an unknown setting or a wrong value.
    """
    from jaxllm.plan.source import run_of, spec_of

    if options.source.endswith(".py"):
        config = load_config(Path(options.source))
    else:
        config = run_of(spec_of(options.source))
    changes: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("batch", "length", "dtype", "remat", "attention")
        if getattr(options, name) is not None
    }
    changes |= dict(_setting(text) for text in options.set)
    if not here and config.layout == "unrolled" and "layout" not in changes:
        log.info("plan: layers are scanned, for a quick compilation; --set layout=unrolled")
        changes |= {"layout": "scan"}
    tensor = "tensor=" in (options.mesh or "")
    if tensor and config.fused and "fused" not in changes:
        log.info("plan: projections are apart, as a tensor axis needs them")
        changes |= {"fused": False}
    if options.mesh is not None:
        changes |= {"mesh": ""}
    return dataclasses.replace(config, **changes)


def _setting(text: str) -> tuple[str, Any]:
    """(field, value) of `name=value`; nested and unknown ones are refused."""
    name, equals, value = text.partition("=")
    hints = {k: v for k, v in typing.get_type_hints(RunConfig).items() if k != "spec"}
    require(bool(equals), f"--set {text}: write NAME=VALUE")
    require(name in hints, f"--set {text}: unknown field {name!r}; {nearest(name, hints)}")
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        found = value
    return name, from_dict(hints[name], found, f"--set {name}")
