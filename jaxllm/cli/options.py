"""Options of every subcommand: one frozen dataclass each. The model source is always first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["COMMANDS", "Chat", "Doctor", "Generate", "Perplexity", "Pull", "Quantize", "Train"]

Source = tyro.conf.Positional[str]
Dtype = Literal["float32", "bfloat16", "float16"]
Many = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampling:
    max_tokens: int = 256
    """At most this many new tokens."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens of this total probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and the answer become less likely."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that is in the answer."""
    frequency_penalty: float = 0.0
    """Taken off the logit for each time a token is in the answer."""
    seed: int = 0
    """The same seed gives the same tokens."""
    stop: Many = ()
    """A string that ends the answer; may be given several times."""
    dtype: Dtype | None = None
    """Of weights and activations; what suits the device by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(_Sampling):
    """Answer one prompt."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    prompt: str | None = None
    """A user's message, put through the model's chat template."""
    raw_prompt: str | None = None
    """Plain text to continue, without the template."""
    messages: Path | None = None
    """JSON file with a list of messages ({"role": ..., "content": ...})."""
    json: bool = False
    """Print one JSON object instead of the streamed text."""
    report: bool = False
    """After the answer, print timings, what came from the store and how much was compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(_Sampling):
    """Talk with a model over several turns."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    system: str | None = None
    """A system message before the first turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Score a text file: mean negative log likelihood over windows."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    text: Path
    """UTF-8 text file."""
    window: int = 512
    """Tokens of a window; each is scored alone."""
    num_windows: int = 16
    """Consecutive windows from the start."""
    skip_fraction: float = 0.0
    """Start this far into the file's characters."""
    dtype: Dtype | None = None
    """Of weights and activations; what suits the device by default."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train as a config file says; its fields are options too."""

    config: Source
    """Python file with a function config() that returns a RunConfig."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch a model or data into the cache."""

    name: Source
    """Catalogue name, org/name on the Hugging Face hub (safetensors only), or data:NAME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a model with its matrices in few bits."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    dest: tyro.conf.Positional[Path]
    """Directory to write."""
    format: Literal["int8", "int4", "nf4", "fp4", "mxfp4", "fp8"] = "int4"
    """What a value is rounded to."""
    group: int | None = None
    """Inputs of one scale; 0 is a whole row. By default what suits the format."""
    rows: int = 1
    """Outputs of one scale; 0 is all of them (fp8)."""
    asymmetric: bool = False
    """Spread each group's range over all codes, with an offset (int8, int4)."""
    include: Many = ()
    """Glob over unstacked paths (layers.*.mlp.down); all matrices of the layers by default."""
    exclude: Many = ()
    """Glob that takes out of these."""
    dtype: Dtype | None = None
    """Of what stays unquantized; what suits the device by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show devices, versions, chosen implementations and caches; fail if something is missing."""

    json: bool = False
    """Print one JSON object."""


COMMANDS = {
    "generate": Generate,
    "chat": Chat,
    "perplexity": Perplexity,
    "train": Train,
    "pull": Pull,
    "quantize": Quantize,
    "doctor": Doctor,
}
