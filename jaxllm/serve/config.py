"""How an engine is laid out: bounds, and the memory that goes to the cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from jaxllm.aot.program import Program
from jaxllm.core.config import require
from jaxllm.core.precision import dtype_of
from jaxllm.errors import CapacityError, UnsupportedError
from jaxllm.infer.programs import Setup
from jaxllm.ops.paged import obstacle
from jaxllm.serve import programs
from jaxllm.serve.programs import Memory, Shape, guessing, shapes, verifying
from jaxllm.serve.transfer import IN_FLIGHT_PAGES
from jaxllm.spec.latent import LatentAttention
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.state.paged import attentions, check_kv_dtype, groups, page_bytes

__all__ = ["EngineConfig", "check_draft", "check_mesh", "lay_out", "table"]

RECURRENT_CHUNK = 64
"""Tokens of one sequence in a step where recurrences follow it one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Bounds of an engine; None leaves a choice to the device.

    Attributes:
      max_sequences: that run at once.
      max_batch_tokens: of one step.
      mixed_tokens: of a step that computes prompts while others decode; None is max_batch_tokens,
        `auto` what keeps such a step within twice one that decodes alone, as measured.
      context: most tokens of a sequence; the model's own by default, but at most 8192 on a CPU.
      page_size: tokens a page.
      kv_dtype: of keys and values in pages: `int8` or `fp8` with a scale a token and head, or
        `auto` for the compute dtype.
      cache_tokens: that all pages together hold.
      prefix_cache: whether prompts find pages that earlier ones left.
      spill_gib: memory of the host for pages that the prefix cache gives up; 0 for none.
      ahead: steps dispatched before the last one's tokens are read.
      decode_steps: that the device takes by itself where all sequences decode without options;
        their tokens come so many at a time. 1 on a CPU, 4 elsewhere by default.
      batch_invariant: all steps are one program, whose rows know nothing of each other: a request
        gets the same bits whatever else is on its way. A step of one token then costs what one of
        max_batch_tokens does, which is 64 on a CPU and 256 elsewhere by default.
      draft_tokens: most that are drafted of a sequence in a step, by prompt lookup or by a draft
        model; 0 for none, where there is a draft model for 3.
      draft_cost: of one more token in a step, as a share of a step of one; by the device and the
        draft model's size.
      max_queue: requests that wait.
      max_queued_tokens: of their prompts.
    """

    max_sequences: int | None = None
    max_batch_tokens: int | None = None
    mixed_tokens: int | str | None = None
    context: int | None = None
    page_size: int | None = None
    kv_dtype: str = "auto"
    cache_tokens: int | None = None
    prefix_cache: bool = True
    spill_gib: float = 0.0
    ahead: int = 1
    decode_steps: int | None = None
    batch_invariant: bool = False
    draft_tokens: int = 0
    draft_cost: float | None = None
    max_queue: int = 1024
    max_queued_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            free = ("prefix_cache", "ahead", "batch_invariant", "draft_tokens", "draft_cost")
            least = 0 if field.name in (*free, "spill_gib") else 1
            number = not isinstance(value, (str, type(None)))
            require(not number or value >= least, f"{field.name} is at least {least}")
        require(
            not isinstance(self.mixed_tokens, str) or self.mixed_tokens == "auto",
            f"mixed_tokens is a number or auto, found {self.mixed_tokens!r}",
        )
        check_kv_dtype(self.kv_dtype)
        require(self.draft_tokens <= 31, "draft_tokens is at most 31")
        require(self.prefix_cache or not self.spill_gib, "spill_gib needs the prefix cache")
        require(
            self.spill_gib * 2**30 <= _host_bytes(),
            f"spill_gib {self.spill_gib} is more than this machine's {_host_bytes() / 2**30:.0f} "
            "GiB of memory",
        )
        require((self.decode_steps or 1) <= 16, "decode_steps is at most 16")
        self._check_invariant()

    def _check_invariant(self) -> None:
        """What asks for steps of another size is refused where all are of one."""
        others = {
            "draft_tokens": self.draft_tokens,
            "mixed_tokens": self.mixed_tokens is not None,
            "decode_steps": (self.decode_steps or 1) > 1,
        }
        for name, given in others.items():
            require(
                not (self.batch_invariant and given),
                f"batch_invariant runs one program for all steps, {name} asks for another: "
                f"leave out {name}",
            )

    def filled(self, spec: ModelSpec, *, drafts: bool = False) -> EngineConfig:
        """The same with every choice but the cache's size made for this device.

        Args:
          spec: of the model.
          drafts: whether there is a draft model.

        Raises:
          UnsupportedError: drafts for a model that cannot take tokens back, or pages on the host
            of one whose prefixes cannot be shared.
        """
        if drafts and self.batch_invariant:
            raise UnsupportedError(
                "batch_invariant runs one program for all steps, a draft model needs others: leave "
                "out one of them"
            )
        if self.batch_invariant and recurrent(spec):
            raise UnsupportedError(
                "batch_invariant: this model has layers whose state holds all tokens in one (state "
                "space, convolution, linear attention), and how many come in a step shows in its "
                "last bits; serve it without batch_invariant"
            )
        if drafts and not self.draft_tokens:
            return dataclasses.replace(self, draft_tokens=3).filled(spec, drafts=True)
        if self.draft_tokens and recurrent(spec):
            raise UnsupportedError(
                "draft_tokens: this model has layers whose state holds all tokens in one (state "
                "space, convolution, linear attention): a draft that was wrong cannot be taken "
                "back; serve it with draft_tokens 0"
            )
        if self.spill_gib and recurrent(spec):
            raise UnsupportedError(
                "spill_gib: this model has layers whose state is no pages (state space, "
                "convolution, linear attention), so that it has no prefix cache to spill"
            )
        on_cpu = jax.default_backend() == "cpu"
        context = min(self.context or (8192 if on_cpu else spec.context), spec.context)
        sequences = self.max_sequences or (8 if on_cpu else 256)
        most = (64, 256) if self.batch_invariant else (256, 2048)
        tokens = self.max_batch_tokens or most[0 if on_cpu else 1]
        return dataclasses.replace(
            self,
            max_sequences=sequences,
            max_batch_tokens=max(tokens, sequences),
            context=context,
            page_size=self.page_size or (16 if on_cpu else 64),
            draft_cost=self.draft_cost or (0.2 if on_cpu else 0.02),
            decode_steps=self.decode_steps or (1 if on_cpu or self.batch_invariant else 4),
        )

    @property
    def verified_tokens(self) -> int:
        """Most tokens of a step with drafts; 0 without any. Each has logits of its own."""
        sequences = self.max_sequences or 1
        return min(256, sequences * (1 + self.draft_tokens)) if self.draft_tokens else 0


def recurrent(spec: ModelSpec) -> bool:
    """Whether something is remembered that is not in pages, so that prefixes cannot be shared."""
    from jaxllm.state.dense import KINDS

    return bool({type(op) for op in spec.ops} & (set(KINDS) - {Attention, LatentAttention}))


def _reads_whole_tables(setup: Setup, config: EngineConfig) -> bool:
    """Whether some layer's work follows the width of the page table, not what is remembered."""
    if jax.default_backend() == "cpu":
        return False
    facts: dict[str, Any] = {"dtype": str(dtype_of(setup.policy.compute_dtype))}
    facts |= {"page_size": config.page_size or 1, "codes": config.kv_dtype != "auto"}
    for op in attentions(setup.spec):
        latent = isinstance(op, LatentAttention)
        widths = (op.kv_rank + op.rope_dim, op.kv_rank) if latent else (op.head_dim, op.head_dim)
        if obstacle(widths=widths, mask=op.mask, latent=latent, **facts) is not None:
            return True
    return False


def check_mesh(spec: ModelSpec, mesh: Any) -> None:
    """Refuse a mesh over which an engine cannot split a model.

    Raises:
      UnsupportedError: other axes than `tensor`, or heads of keys that it does not divide.
    """
    sizes = {} if mesh is None else {name: n for name, n in mesh.shape.items() if n > 1}
    tensor = sizes.pop("tensor", 1)
    if sizes:
        raise UnsupportedError(
            f"an engine is split over the axis tensor alone, found {', '.join(sizes)}; take a mesh "
            f"such as tensor={max(tensor, *sizes.values())}, and other engines for more devices"
        )
    heads = [op.kv_heads for op in spec.ops if isinstance(op, Attention)]
    if any(count % tensor for count in heads):
        fits = [n for n in range(1, max(heads) + 1) if all(count % n == 0 for count in heads)]
        near = min(fits, key=lambda n: (abs(n - tensor), n))
        raise UnsupportedError(
            f"mesh tensor={tensor}: the model has {', '.join(map(str, sorted(set(heads))))} heads "
            f"of keys, which do not divide by it; the nearest that works is tensor={near}"
        )


def check_draft(spec: ModelSpec, draft: ModelSpec, config: EngineConfig) -> None:
    """Refuse a draft model that cannot guess for another; `config` is filled.

    Raises:
      UnsupportedError: why.
    """
    context = config.context or 1
    if draft.vocab != spec.vocab:
        raise UnsupportedError(
            f"the draft model has {draft.vocab} tokens, the model {spec.vocab}: a draft must have "
            "the same vocabulary; take a smaller model of the same family, or the model in 4 bits"
        )
    if recurrent(draft):
        raise UnsupportedError(
            "the draft model has layers whose state holds all tokens in one (state space, "
            "convolution, linear attention): a guess that was wrong cannot be taken back"
        )
    if draft.context < context:
        raise UnsupportedError(
            f"the draft model's context is {draft.context} tokens, the engine's {context}; serve "
            f"with context {draft.context}"
        )


def table(setup: Setup, config: EngineConfig, draft: Setup | None = None) -> tuple[Shape, ...]:
    """The programs of a filled config."""
    spec, on_cpu = setup.spec, jax.default_backend() == "cpu"
    tokens, context = config.max_batch_tokens or 1, config.context or 1
    longest = min(tokens, RECURRENT_CHUNK) if recurrent(spec) else tokens
    if config.batch_invariant:
        rows = config.max_sequences or 1
        return (Shape(tokens=tokens, rows=rows, longest=longest, context=context),)
    contexts = {context}
    setups = [setup] if draft is None else [setup, draft]
    if any(_reads_whole_tables(one, config) for one in setups):
        contexts |= {512 * 4**i for i in range(8) if 512 * 4**i < context}
    verified: tuple[Shape, ...] = ()
    if config.draft_tokens:
        for most in sorted(contexts):
            verified += (verifying if draft is None else guessing)(
                tokens=config.verified_tokens,
                sequences=config.max_sequences or 1,
                drafts=config.draft_tokens,
                context=most,
                greedy=not on_cpu,
            )
    sizes = verified + shapes(
        tokens=tokens,
        sequences=config.max_sequences or 1,
        longest=longest,
        contexts=tuple(sorted(contexts)),
        greedy=0 if on_cpu and config.decode_steps == 1 else config.decode_steps or 1,
    )
    return _with_mixed(sizes, config.mixed_tokens)


AUTO = (8, 32, 128, 512)
"""Tokens of more mixed steps, between those that there are, to choose from by time."""


def _with_mixed(sizes: tuple[Shape, ...], tokens: int | str | None) -> tuple[Shape, ...]:
    """The table with programs for exactly `mixed_tokens`: a step would else cost what the next
    larger one does, and fewer tokens would make nothing more even."""
    if isinstance(tokens, str):
        for more in AUTO:
            sizes = _with_mixed(sizes, more) if more < sizes[-1].tokens else sizes
        return sizes
    if tokens is None or any(s.tokens == tokens and s.longest > 1 for s in sizes):
        return sizes
    larger = [s for s in sizes if s.tokens > tokens and s.longest > 1 and not s.every]
    least = min((s.tokens for s in larger), default=0)
    made = [
        dataclasses.replace(
            s, tokens=tokens, rows=min(s.rows, tokens), longest=min(s.longest, tokens)
        )
        for s in larger
        if s.tokens == least and s.rows > 1
    ]
    return (*dict.fromkeys(made), *sizes)


def lay_out(
    setup: Setup,
    config: EngineConfig,
    sizes: Sequence[Shape],
    store: Any,
    draft: Setup | None = None,
) -> Memory:
    """Pages of every group: as many as there is memory for, or as `cache_tokens` says.

    A page of a group has a place in the pool of each of its layers, those of a draft model too.

    Raises:
      UnsupportedError: a mask that pages cannot serve; CapacityError: there is no room for a single
        sequence.
    """
    size, largest = config.page_size or 1, sizes[-1]
    spec = setup.spec
    windows = groups(spec) | ({} if draft is None else groups(draft.spec))
    sequences, context = config.max_sequences or 1, config.context or 1
    facts: dict[str, Any] = {"page_size": size, "windows": windows, "slots": sequences}
    facts["kv_dtype"] = config.kv_dtype
    small = Memory(pages=dict.fromkeys(windows, 1), **facts)
    pages = {
        group: 2 * sequences * width
        for group, width in largest.widths(small).items()
        if windows[group] is not None
    }
    if "all" in windows:
        wanted = config.cache_tokens or min(2 * sequences * context, 1 << 21)
        pages["all"] = -(-wanted // size)
    if config.cache_tokens is None and windows:
        bytes_of = dict.fromkeys(windows, 0)
        for one in [setup] if draft is None else [setup, draft]:
            dtype = dtype_of(one.policy.compute_dtype)
            held = page_bytes(one.spec, page_size=size, dtype=dtype, kv_dtype=config.kv_dtype)
            for group, count in held.items():
                bytes_of[group] += count // _parts(one)
        largest_ones = [*[s for s in sizes if s.every][-1:], largest]
        steps = [programs.step(setup, small, shape, draft) for shape in largest_ones]
        budget = _budget(steps, store)
        if config.spill_gib:
            budget -= IN_FLIGHT_PAGES * sum(bytes_of.values())
        total = sum(bytes_of[group] * count for group, count in pages.items())
        share = min(1.0, budget / total)
        pages = {group: _round(int(count * share)) for group, count in pages.items()}
    least = largest.widths(small)
    short = [group for group, count in pages.items() if count < least[group]]
    if short:
        raise CapacityError(
            f"the cache has {pages[short[0]]} pages of {size} tokens, one sequence of {context} "
            f"needs {least[short[0]]}; lower context or raise cache_tokens"
        )
    return Memory(pages=pages, **facts)


def _parts(setup: Setup) -> int:
    """In how many parts devices hold a page; vectors of latent attention are whole on each."""
    latent = any(isinstance(op, LatentAttention) for op in setup.spec.ops)
    return 1 if setup.mesh is None or latent else setup.mesh.shape["tensor"]


def _round(count: int) -> int:
    """Down to three leading bits: a little more or less free memory asks for the same programs."""
    drop = max(0, count.bit_length() - 3)
    return max(1, count >> drop << drop)


def _host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _budget(largest: Sequence[Program], store: Any) -> int:
    """Bytes for pages: what the largest programs and the parameters leave."""
    if jax.default_backend() == "cpu":
        return _host_bytes() // 8
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 1 << 33) - stats.get("bytes_in_use", 0)
    reports = [program.load(store).report for program in largest]
    return int(0.92 * free) - max(r.temporary_bytes + r.output_bytes for r in reports)
