"""What answers are made with: compiled programs, pages and a scheduler, laid out by a config."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxllm.core.qarray import num_bytes
from jaxllm.errors import UnsupportedError
from jaxllm.infer.generate import Generator
from jaxllm.infer.programs import check_decodes
from jaxllm.serve.config import EngineConfig, check_draft, check_mesh, lay_out, recurrent, table
from jaxllm.serve.ngram import Drafter
from jaxllm.serve.pace import Cadence, Pace
from jaxllm.serve.runner import Runner
from jaxllm.serve.scheduler import Scheduler
from jaxllm.serve.spill import HostPages, accounts
from jaxllm.serve.turn import Limits
from jaxllm.spec.model import ModelSpec
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Parts", "Served", "make_parts"]


@runtime_checkable
class Served(Protocol):
    """What the engine needs of a loaded model; `jaxllm.Model` has it."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def generator(self) -> Generator: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A model ready to answer.

    Attributes:
      config: with every choice made.
      runner: programs, and what is on the device.
      scheduler: sequences and their pages.
      host: pages that were given up on the device, or None.
      draft_share: of a draft model's step in one of the model, by their bytes.
    """

    config: EngineConfig
    runner: Runner
    scheduler: Scheduler
    host: HostPages | None
    draft_share: float

    def drafter(self) -> Pace | None:
        """What says how many tokens of one sequence are guessed, and perhaps which."""
        most, cost = self.config.draft_tokens, self.config.draft_cost or 0.0
        if self.scheduler.limits.guesses:
            return Pace(most, cost, self.draft_share)
        return Drafter(most, cost) if most else None


def make_parts(model: Served, given: EngineConfig, draft: Served | None = None) -> Parts:
    """Load or compile all programs, and lay out pages.

    Args:
      model: a loaded model.
      given: bounds.
      draft: see `Engine`.

    Raises:
      UnsupportedError, CapacityError: see `Engine`.
    """
    check_decodes(model.spec)
    check_mesh(model.spec, model.generator.setup.mesh)
    config, share = given.filled(model.spec, drafts=draft is not None), 0.0
    other: tuple[Any, Any] | None = None
    if draft is not None:
        check_draft(model.spec, draft.spec, config)
        check_mesh(draft.spec, draft.generator.setup.mesh)
        if draft.generator.setup.mesh != model.generator.setup.mesh:
            raise UnsupportedError("the model and its draft model lie on different meshes")
        other = draft.generator.setup, draft.generator.params
        if given.draft_cost is None:
            share = num_bytes(other[1]) / num_bytes(model.generator.params)
    setup, store = model.generator.setup, model.generator.store
    setups = setup, None if other is None else other[0]
    sizes = table(setup, config, setups[1])
    memory = lay_out(setup, config, sizes, store, setups[1])
    spills = config.spill_gib > 0
    runner = Runner(
        setup, model.generator.params, memory, sizes, store=store, draft=other, spills=spills
    )
    host = None
    if runner.transfer is not None:
        host = HostPages(int(config.spill_gib * 2**30), runner.transfer.page_bytes)
    limits = Limits(
        tokens=config.max_batch_tokens or 1,
        sequences=memory.slots,
        longest=max(shape.longest for shape in sizes),
        page_size=memory.page_size,
        prefix_cache=config.prefix_cache and not recurrent(model.spec),
        mixed=config.mixed_tokens if isinstance(config.mixed_tokens, int) else 0,
        drafts=0 if other else config.draft_tokens,
        guesses=tuple(sorted({shape.drafts for shape in sizes} - {0})),
        verified=config.verified_tokens,
        steps=max(shape.steps for shape in sizes),
    )
    cadence = None
    if config.mixed_tokens == "auto":
        cadence = Cadence([s.tokens for s in sizes if s.longest > 1 and not s.every])
    pages = accounts(memory.pages, host)
    scheduler = Scheduler(limits, pages, memory.windows, host, cadence)
    return Parts(config=config, runner=runner, scheduler=scheduler, host=host, draft_share=share)
