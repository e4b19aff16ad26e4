"""Options of every subcommand: one frozen dataclass each. The model source is always first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = [
    "COMMANDS",
    "Batch",
    "Bench",
    "Chat",
    "Doctor",
    "Draft",
    "Export",
    "Generate",
    "Perplexity",
    "Plan",
    "Pull",
    "Quantize",
    "Run",
    "Serve",
    "Train",
]

Source = tyro.conf.Positional[str]
Dtype = Literal["float32", "bfloat16", "float16"]
Many = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Kernel = Literal["reference", "cudnn", "mosaic_gpu", "mosaic_tpu"]


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
    typical_p: float = 1.0
    """Keep the tokens of nearly the expected surprise, of this total probability."""
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
class Draft:
    """What guesses tokens ahead."""

    draft_tokens: int = 0
    """Tokens of an answer guessed ahead by what followed the same words before, or by --draft (3 by
    default); 0 guesses none."""
    draft: str | None = None
    """A source whose model guesses tokens ahead: a smaller one of the same vocabulary."""
    draft_format: Literal["int8", "int4", "nf4", "fp4", "mxfp4", "fp8"] | None = None
    """Few bits for the draft model: the source itself can so be its own draft."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(_Sampling, Draft):
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
    format: Literal["int8", "int4", "nf4", "fp4", "mxfp4", "fp8", "w8a8"] = "int4"
    """What a value is rounded to; w8a8 is int8 with --activations."""
    group: int | None = None
    """Inputs of one scale; 0 is a whole row. By default what suits the format."""
    rows: int = 1
    """Outputs of one scale; 0 is all of them (fp8)."""
    asymmetric: bool = False
    """Spread each group's range over all codes, with an offset (int8, int4)."""
    activations: bool = False
    """Round what is multiplied too, each token by a scale of its own (int8, fp8), or each of its
    128 inputs (fp8 with --rows 128 --group 128)."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Engine(Draft):
    dtype: Dtype | None = None
    """Of weights and activations; what suits the device by default."""
    mesh: str | None = None
    """Devices to split the model over, such as tensor=2; one by default."""
    max_sequences: int | None = None
    """Answers on their way at once; 8 on a CPU, 256 elsewhere by default."""
    max_batch_tokens: int | None = None
    """Tokens of one step; 256 on a CPU, 2048 elsewhere by default."""
    mixed_tokens: int | Literal["auto"] | None = None
    """Tokens of a step that computes prompts while others decode: fewer keep their tokens even;
    auto measures how many keep it within twice a step without prompts."""
    context: int | None = None
    """Most tokens of prompt and answer; the model's own (on a CPU at most 8192) by default."""
    cache_tokens: int | None = None
    """Tokens that the page cache holds; by the memory there is by default."""
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Of keys and values in pages: 8 bits hold nearly twice the tokens of 16 and are less exact."""
    decode_steps: int | None = None
    """Steps that the device takes by itself where all answers are greedy; 1 on a CPU, else 4."""
    batch_invariant: bool = False
    """The same bits for a request whatever else is on its way: all steps are one program of
    max-batch-tokens (64 on a CPU, 256 elsewhere by default), so that each costs what that does."""
    no_prefix_cache: bool = False
    """Prompts do not look for pages that earlier ones left."""
    spill_gib: float = 0.0
    """GiB of host memory for pages that this cache gives up on the device, to come back from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listen:
    """Where a server listens, and to whom."""

    host: str = "127.0.0.1"
    """Address to bind to; one that other machines reach needs an API key."""
    port: int = 8000
    """0 takes a free one."""
    name: str | None = None
    """The model's name for clients; the source's by default."""
    api_key: Many = ()
    """Opens every route but /health and /ready; may be given several times."""
    api_key_file: Path | None = None
    """More keys, one a line."""
    drain_s: float = 30.0
    """Seconds that running requests get after SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(_Engine, Listen):
    """Answer over HTTP, as OpenAI's API does."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    pin_prefix: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A text, or messages as .json, that many prompts begin with: computed once, kept for ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Answer a file of requests in OpenAI's batch format; may be run again after a break."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    requests: tyro.conf.Positional[Path]
    """One JSON object a line: custom_id, method, url, body."""
    answers: tyro.conf.Positional[Path]
    """Where answers are added, one a line; requests that have one are left out."""
    max_lines: int = 100_000
    """More are refused."""
    dtype: Dtype | None = None
    """Of weights and activations; what suits the device by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a bundle: weights, tokenizer and programs that run without the model's code."""

    source: Source
    """Catalogue name, Hugging Face directory, .gguf file, or org/name that was pulled."""
    bundle: tyro.conf.Positional[Path]
    """Directory to write, or a file whose name ends in .tar."""
    platform: Many = ()
    """cpu, cuda or tpu; may be given several times; all three by default."""
    mesh: Many = ()
    """Programs for a mesh such as data=2,tensor=4; may be given several times; else one device."""
    context: int | None = None
    """Most tokens of prompt and answer; the model's own, at most 4096, by default."""
    prefill: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """A length to which prompts are padded; may be given several times; 32 to 2048 by default."""
    dtype: Dtype | None = None
    """Of weights and activations; what suits each platform by default."""
    attention: Kernel | None = None
    """A kernel, on the platform that has it; by default what runs on every device."""
    experts: Literal["ragged_dot", "mosaic_gpu", "mosaic_tpu"] | None = None
    """A kernel, on the platform that has it; by default what runs on every device."""
    native: bool = False
    """Also compile for this very machine and put the executables into the bundle."""
    adapter: Path | None = None
    """Folder of a LoRA adapter as PEFT saves it, merged into the weights."""
    adapter_apart: Many = ()
    """NAME=FOLDER of one that is kept beside them, for jaxllm run --adapter NAME; several times."""
    runner: bool = False
    """Write a folder for scripts/pjrt_runner instead, which needs no Python: one --platform."""
    onnx: bool = False
    """Write an ONNX graph with its weights instead: float32, for models of the usual shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Run a bundle: jaxllm run BUNDLE generate|chat|serve|batch, with these commands' options."""

    bundle: Source
    """What jaxllm export wrote: a directory or a .tar."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Say before a device is rented whether a run fits, how fast it is at most, on which mesh."""

    source: Source
    """Config file of a run (.py), or a model: a folder with config.json, .gguf, random:PRESET …"""
    devices: str
    """What to plan for: v5e:4x4, v5p:8x8x8, v6e:16x16, tpu7x:2x2x1, h100:8, a100:8, cpu:8 …"""
    purpose: Annotated[Literal["train", "serve"] | None, tyro.conf.arg(name="for")] = None
    """The training step, or prefill and decoding; by default a config trains, a model serves."""
    mesh: str | None = None
    """Devices by axis, data=2,tensor=4; by default fsdp to train, heads over tensor to serve."""
    batch: int | None = None
    """Rows of a step, or sequences at once."""
    length: int | None = None
    """Tokens of a training row."""
    context: int | None = None
    """Slots of a served sequence; 4096 by default."""
    prompt: int | None = None
    """Tokens of a prompt; 1024 by default."""
    dtype: Dtype | None = None
    """Of activations (and of served weights); what suits the device by default."""
    quantize: Literal["int8", "int4", "nf4", "fp4", "mxfp4", "fp8"] | None = None
    """Serve with the layers' matrices in this format."""
    kv_dtype: Literal["auto", "int8", "fp8"] | None = None
    """Keys and values in pages of 8 bits, as of `jaxllm serve`: says how many tokens fit."""
    remat: Literal["none", "save_dots", "save_attention", "full", "auto"] | None = None
    """What the backward pass computes again; `auto` takes the first policy that fits."""
    attention: Kernel | Literal["auto", "mosaic_gpu_deterministic"] | None = None
    """Implementation of softmax attention."""
    set: Many = ()
    """Another field of the run's config, NAME=VALUE; may be given several times."""
    explain: bool = False
    """Say what bounds the run and what to change; compiles every remat policy of a step."""
    search: bool = False
    """Try mesh shapes, sharding tables, batch and remat; plan the fastest that fits."""
    tries: int = 4
    """How many of them a search compiles."""
    html: Path | None = None
    """Write a page with plots to this file."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(_Engine):
    """Measure a server, or an engine in this process, under load."""

    what: tyro.conf.Positional[Literal["serve"]]
    """What is measured."""
    target: tyro.conf.Positional[str]
    """http://… of a server with OpenAI's API, or a source as of `jaxllm serve` (no HTTP then)."""
    prompts: Literal["random", "shared-prefix", "text"] = "random"
    """Random token ids; random ones behind one prefix; pieces of --text."""
    concurrency: tuple[int, ...] = ()
    """Requests on their way at once, one measurement each; 8 by default."""
    rate: tuple[float, ...] = ()
    """Requests a second at random times (Poisson), one measurement each."""
    requests: int = 64
    """Of each measurement."""
    input_tokens: int = 256
    """Of a prompt, in the mean."""
    output_tokens: int = 64
    """Of an answer, in the mean."""
    spread: float = 0.0
    """Lengths are uniform within this share of the mean."""
    shared: float = 0.9
    """Share of a prompt that all have, with shared-prefix."""
    long_share: float = 0.0
    """Share of the requests whose prompts have --long-tokens instead."""
    long_tokens: int = 2048
    """Of these prompts."""
    text: Path | None = None
    """UTF-8 file for --prompts text; four characters count as a token."""
    vocab: int = 4096
    """Random token ids are below it."""
    temperature: float = 0.0
    """Of every request."""
    slo_ttft_ms: float | None = None
    """For goodput: time to the first token at most."""
    slo_tpot_ms: float | None = None
    """For goodput: time of a later token at most."""
    slo_e2e_ms: float | None = None
    """For goodput: time of the whole answer at most."""
    warmup: int = 2
    """Requests before the measurements."""
    seed: int = 0
    """Of prompts, lengths and times."""
    api_key: str = ""
    """For a server that needs one."""
    out: Path | None = None
    """JSON file to write; a plot goes beside it as .png."""


COMMANDS = {
    "generate": Generate,
    "chat": Chat,
    "perplexity": Perplexity,
    "serve": Serve,
    "batch": Batch,
    "bench": Bench,
    "train": Train,
    "plan": Plan,
    "pull": Pull,
    "quantize": Quantize,
    "export": Export,
    "run": Run,
    "doctor": Doctor,
}
