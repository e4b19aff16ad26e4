"""The step of a run compiled for a mesh, to look at: what lies where, how much it takes."""

import functools
import re
import tempfile
from pathlib import Path
from unittest import mock

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store
from jaxllm.core.mesh import make_mesh, parse_mesh
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.train.programs import make_programs
from tests.train.runs import small


def many_heads(width: int = 16, layers: int = 2, ffn: int = 32, vocab: int = 40) -> ModelSpec:
    """Eight heads over two of keys and values: tensor=8 splits the ones, not the others."""
    norm = Norm()
    attention = Attention(heads=8, kv_heads=2, head_dim=max(width // 8, 4))
    subs = (sub("attn", attention, norm_in=norm), sub("mlp", MLP(width=ffn), norm_in=norm))
    return ModelSpec(
        vocab=vocab,
        width=width,
        blocks=(Block(name="G", subs=subs),),
        layers=f"G*{layers}",
        context=1024,
        final_norm=norm,
        head=Head(tied=True),
    )


class _Found(Exception):
    """Carries the compiled step out of `make_programs`; the other programs are not compiled."""


def _only_the_step(program: Program, store: Store) -> None:
    if program.name == "train-step":
        raise _Found(program.compile())


@functools.cache
def compiled_step(mesh: str, spec: ModelSpec, **changes) -> Executable:
    """The step of a run on a mesh, from the run's own `make_programs`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Program, "load", _only_the_step),
    ):
        config = small(Path(folder), spec=spec, mesh=mesh, **changes)
        try:
            make_programs(config, Store.default(), make_mesh(parse_mesh(mesh)))
        except _Found as found:
            return found.args[0]
    raise AssertionError("make_programs compiled no step")


def collectives(step: Executable, kind: str) -> list[tuple[int, ...]]:
    """Shapes that collectives of a kind give in a step's optimised program, those in loops too."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", step.compiled.as_text())
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]
