"""`jaxllm quantize`: write a model with its matrices in few bits."""

from __future__ import annotations

from jaxllm.cli.options import Quantize
from jaxllm.core.config import check_new
from jaxllm.core.logging import show_notes

__all__ = ["run"]


def run(options: Quantize) -> int:
    """Run the subcommand; prints what was written and how large it is."""
    show_notes()
    check_new(options.dest, "a new directory")
    from jaxllm.model import load
    from jaxllm.quant.apply import INCLUDE

    model = load(options.source, dtype=options.dtype)
    scheme = {"rows": options.rows, "symmetric": not options.asymmetric}
    scheme["activations"] = options.activations
    if options.group is not None:
        scheme["group"] = options.group
    small = model.quantize(
        options.format, include=options.include or INCLUDE, exclude=options.exclude, **scheme
    )
    small.save(options.dest)
    before, after = model.nbytes / 1e6, small.nbytes / 1e6
    print(f"{options.dest}: {after:.1f} MB of parameters, {before:.1f} before")
    return 0
