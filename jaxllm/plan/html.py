"""A plan as one HTML page without any other file: bars drawn in SVG, and the same tables."""

from __future__ import annotations

import html
from collections.abc import Sequence

from jaxllm.plan.result import Plan, ProgramPlan
from jaxllm.plan.search import Found
from jaxllm.plan.show import VERDICT, gib, milliseconds, percent, quantity

__all__ = ["page"]

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
"""Paul Tol's bright scheme: told apart by colour-blind readers."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: .5rem 0 1.5rem }
figcaption { font-weight: 600 }
"""

_WIDTH, _ROW, _LABEL = 820, 26, 220


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{_text(x)}</td>" for i, x in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{names}</tr>{body}</table>"


def _bars(title: str, rows: Sequence[tuple[str, float, str]], limit: float | None = None) -> str:
    """Horizontal bars (name, length, what is written beside), with a line at a limit."""
    known = [(name, size, said) for name, size, said in rows if size > 0]
    longest = max([size for _, size, _ in known] + [limit or 0.0, 1e-30])
    room = _WIDTH - _LABEL - 120
    parts = []
    for i, (name, size, said) in enumerate(known):
        top, width = i * _ROW, max(1.0, size / longest * room)
        parts.append(
            f'<text x="{_LABEL - 8}" y="{top + 17}" text-anchor="end">{_text(name)}</text>'
            f'<rect x="{_LABEL}" y="{top + 3}" width="{width:.1f}" height="{_ROW - 8}" '
            f'fill="{_COLOURS[i % len(_COLOURS)]}"/>'
            f'<text x="{_LABEL + width + 6:.1f}" y="{top + 17}">{_text(said)}</text>'
        )
    height = max(1, len(known)) * _ROW
    if limit is not None:
        x = _LABEL + limit / longest * room
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c00" '
            'stroke-dasharray="4 3"/>'
        )
    return (
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" font-size="13" role="img" '
        f'aria-label="{_text(title)}">{"".join(parts)}</svg></figure>'
    )


def _program(program: ProgramPlan, devices: int) -> str:
    memory, counts, time = program.memory, program.counts, program.time
    sizes = [(name, float(size), gib(size)) for name, size in memory.parts.items()]
    sizes.append(("total", float(memory.total), gib(memory.total)))
    mark = " (estimated)" if memory.estimated else ""
    limit = None if memory.limit is None else float(memory.limit)
    title = f"Memory of a device{mark}; dashed: {gib(memory.limit)} that it has"
    parts = [f"<h2>{_text(program.name)}</h2>", _bars(title, sizes, limit)]
    if time is not None:
        resources = {
            "compute": time.compute_s, "memory": time.memory_s, "network": time.network_s
        }  # fmt: skip
        rows = [(n, t, milliseconds(t)) for n, t in resources.items() if t is not None]
        if rows:
            parts.append(_bars("Least time of a call by resource", rows))
            rate = program.tokens_per_s
            parts.append(
                f"<p>At most {0 if rate is None else rate:,.0f} tokens/s on {devices} devices; "
                f"MFU at most {percent(time.mfu_bound)}.</p>"
            )
    if counts is not None:
        sent = [
            (f"{c.kind} ({', '.join(c.axes)})", c.sent_bytes, gib(c.sent_bytes))
            for c in counts.collectives
        ]
        if sent:
            parts.append(_bars("Bytes that a device sends in a call", sent))
        largest = [
            (t.name, f"{t.dtype} {'x'.join(map(str, t.shape))}", gib(t.size_bytes))
            for t in (*program.arguments[:5], *counts.largest[:5])
        ]
        parts.append(_table(("largest arrays", "type", "size"), largest))
    return "".join(parts)


def _searched(found: Found) -> str:
    rows = [
        (
            t.config.mesh or "one device",
            t.config.sharding,
            t.config.batch,
            t.config.remat,
            "" if t.step is None else gib(t.step.memory.total),
            "" if t.step is None else quantity(t.step.tokens_per_s or 0),
            t.verdict,
        )
        for t in found.trials[:40]
    ]
    bars = [
        (f"{t.config.mesh} b{t.config.batch} {t.config.remat}", t.step.tokens_per_s or 0.0,
         f"{t.step.tokens_per_s or 0:,.0f}" + ("" if t.step.fits else ", does not fit"))
        for t in found.trials if t.step is not None
    ]  # fmt: skip
    head = ("mesh", "sharding", "batch", "remat", "memory", "tokens/s", "verdict")
    return (
        "<h2>Search</h2>"
        + _bars("At most tokens/s of what was compiled", bars)
        + _table(head, rows)
    )


def page(plan: Plan, lines: Sequence[str] = (), found: Found | None = None) -> str:
    """The page.

    Args:
      plan: what to show.
      lines: of `explain`.
      found: of a search.
    """
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    title = f"{plan.source} on {plan.place}"
    first = (
        f"{quantity(plan.num_params)} parameters, to {plan.purpose} on {plan.devices} x "
        f"{plan.kind}, mesh {mesh}"
    )
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(first)}: <b>{VERDICT[plan.fits]}</b>.</p>",
        _table(("setting", "value"), list(plan.settings.items())),
        *(_program(program, plan.devices) for program in plan.programs),
    ]
    if len(plan.remat) > 1:
        rows = [(name, float(size), gib(size)) for name, size, *_ in plan.remat]
        limit = plan.programs[0].memory.limit
        parts.append(_bars("Memory by remat policy", rows, None if limit is None else float(limit)))
    if plan.serving is not None:
        rows = [(f"{size} tokens", share, percent(share)) for size, share in plan.serving.waste]
        room = plan.serving.kv_capacity_tokens
        said = "unknown" if room is None else f"{room:,} tokens"
        parts.append(f"<h2>Serving</h2><p>Room for keys and values: {said}.</p>")
        parts.append(_bars("Mean padding of prompts by bucket", rows))
    if lines:
        parts.append("<h2>What to change</h2><ul>")
        parts += [f"<li>{_text(line)}</li>" for line in lines]
        parts.append("</ul>")
    if found is not None:
        parts.append(_searched(found))
    if plan.notes:
        parts.append("<h2>Notes</h2><ul>")
        parts += [f"<li>{_text(note)}</li>" for note in plan.notes]
        parts.append("</ul>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
