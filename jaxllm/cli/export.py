"""`jaxllm export`: write a bundle that runs without the model's code."""

from __future__ import annotations

from pathlib import Path

from jaxllm.cli.options import Export
from jaxllm.core.config import require
from jaxllm.core.logging import show_notes

__all__ = ["run"]


def run(options: Export) -> int:
    """Run the subcommand; prints what was written and how large it is."""
    show_notes()
    if options.onnx:
        return _onnx(options)
    from jaxllm.export.bundle import export_bundle
    from jaxllm.export.table import Sizes
    from jaxllm.export.ways import Options

    sizes = Sizes(context=options.context, **_given("prefill", options.prefill))
    wanted = Options(
        meshes=options.mesh,
        sizes=sizes,
        dtype=options.dtype,
        attention=options.attention,
        experts=options.experts,
        native=options.native,
        adapter=options.adapter,
        apart=tuple(map(_named, options.adapter_apart)),
        **_given("platforms", options.platform),
    )
    if options.runner:
        from jaxllm.export.runner import export_runner

        export_runner(options.source, options.bundle, wanted)
        how = f"pjrt_runner {options.bundle} --plugin FILE.so --prompt IDS"
    else:
        export_bundle(options.source, options.bundle, wanted)
        how = f"jaxllm run {options.bundle} generate --prompt ..."
    total, programs = _bytes(options.bundle, ""), _bytes(options.bundle, "programs/")
    shown = f"{total / 1e6:.1f} MB" + (f", {programs / 1e6:.1f} of programs" if programs else "")
    print(f"{options.bundle}: {shown}; {how}")
    return 0


def _onnx(options: Export) -> int:
    default = {"source": options.source, "bundle": options.bundle, "adapter": options.adapter}
    require(
        options == Export(**default, onnx=True, dtype=options.dtype)
        and options.dtype in (None, "float32"),
        "--onnx writes one graph in float32 for all lengths: leave the other options out",
    )
    from jaxllm.export.onnx_graph import export_onnx

    made = export_onnx(options.source, options.bundle, adapter=options.adapter)
    size = sum(p.stat().st_size for p in made.iterdir())
    print(f"{options.bundle}/model.onnx: {size / 1e6:.1f} MB with its weights")
    return 0


def _named(text: str) -> tuple[str, Path]:
    """(name, folder) of an adapter that is kept apart."""
    name, equals, folder = text.partition("=")
    require(bool(name and equals and folder), f"--adapter-apart {text}: write NAME=FOLDER")
    return name, Path(folder)


def _given(name: str, values: tuple) -> dict[str, tuple]:
    """An option that was given; else the house's own default stands."""
    return {name: values} if values else {}


def _bytes(bundle: Path, below: str) -> int:
    if bundle.is_file():
        return 0 if below else bundle.stat().st_size
    return sum(p.stat().st_size for p in (bundle / below).rglob("*") if p.is_file())
