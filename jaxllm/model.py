"""Model: the public face. A thin frozen value over spec, params and tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator as Pieces
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxllm.aot import counter
from jaxllm.aot.store import Store
from jaxllm.core.config import nearest, require
from jaxllm.core.policy import Policy
from jaxllm.core.qarray import num_bytes
from jaxllm.core.quantize import Scheme
from jaxllm.errors import ShapeError
from jaxllm.infer import programs
from jaxllm.infer.embed import Text, embed, pooling_of, token_rows
from jaxllm.infer.generate import Generator
from jaxllm.infer.leaves import host_leaf, plain_leaf, quantized_paths
from jaxllm.infer.open import open_source, run_policy
from jaxllm.infer.programs import row_length
from jaxllm.infer.ready import generator_of
from jaxllm.infer.reply import Generation, Prompt, prompt_ids, reply, sampling_of, whole
from jaxllm.infer.timings import Timings
from jaxllm.quant.apply import INCLUDE, quantize_params
from jaxllm.spec.model import ModelSpec, Pooling
from jaxllm.text.answer import Answer
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.zoo.load import save_checkpoint

__all__ = ["Generation", "Model", "Prompt", "load"]


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    mesh: Any = None,
    store: bool = True,
    policy: Policy | None = None,
    packed: bool | None = None,
) -> Model:
    """Load a model.

    Args:
      source: a catalogue name (`smollm2-135m-instruct`), a Hugging Face directory, a GGUF file,
        `org/name` from the local Hugging Face cache, or `random:PRESET`.
      dtype: `float32`, `bfloat16` or `float16`, of weights and activations; what suits the device
        by default.
      mesh: a mesh of `core.mesh.make_mesh` to shard over, or None for one device.
      store: keep weights in run layout and compiled programs in the user's cache.
      policy: how to run, in place of `dtype` and the device's defaults.
      packed: keep quantized tensors as they are (GGUF: Q4_0, Q4_1, Q8_0) instead of expanding them
        to `dtype`; by default those of a directory are kept and those of a GGUF file expanded.

    Raises:
      ConfigError, WeightsError, UnsupportedError: the source is unknown, damaged or of a kind that
        is not read.
    """
    counter.start()
    require(policy is None or dtype is None, "give dtype or policy, not both")
    policy = policy or run_policy(dtype, mesh=mesh)
    kept = Store.default() if store else None
    opened = open_source(str(source), policy=policy, mesh=mesh, store=kept, packed=packed)
    generator = generator_of(opened.spec, opened.params, policy, mesh, kept)
    return Model(
        spec=opened.spec,
        params=opened.params,
        tokenizer=opened.tokenizer,
        policy=policy,
        eos_ids=opened.eos_ids,
        generator=generator,
        weights_stored=opened.stored,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      spec: what it is.
      params: what it knows, in the layout of the run (see `core.tree`).
      tokenizer: or None.
      policy: how it runs.
      eos_ids: tokens that end generation.
      generator: runs its compiled programs.
      weights_stored: whether the weights came from the cache.
    """

    spec: ModelSpec
    params: Any
    tokenizer: Tokenizer | None
    policy: Policy
    eos_ids: tuple[int, ...]
    generator: Generator
    weights_stored: bool = False

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits of every position.

        Args:
          tokens: [B, T] integers.

        Returns:
          float32 [B, T, V]. Programs are compiled for lengths rounded up to a power of two; the
          padding is after the tokens, where a causal model does not look. A rope that follows the
          length of a sequence has programs of exact lengths.

        Raises:
          ShapeError: not [B, T] integers within the vocabulary, or longer than the context.
        """
        ids = self._ids(tokens)
        batch, length = ids.shape
        exact = self.spec.follows_length and self.spec.decodes
        size = length if exact else row_length(self.spec, length)
        padded = np.zeros((batch, size), np.int32)
        padded[:, :length] = ids
        program = programs.logits(self.generator.setup, batch=batch, length=padded.shape[1])
        lengths = () if self.spec.decodes else (np.full((batch,), length, np.int32),)
        out = self.generator.executable(program)(self.params, padded, *lengths)
        return np.asarray(out)[:, :length]

    def embed(
        self, texts: Text | Sequence[Text], *, pooling: Pooling | str | None = None
    ) -> np.ndarray:
        """One vector a text.

        Args:
          texts: strings or lists of token ids, in any number; a single one gives one row.
          pooling: `mean`, `cls`, `last` or a `Pooling`, in place of the model's own. An encoder
            without its own takes the mean over a text's tokens, without scaling it.

        Returns:
          float32 [B, D]. Strings are cut to `pooling.max_tokens`, or the model's context.

        Raises:
          ConfigError: a decoder without pooling, strings without a tokenizer; ShapeError: ids that
            are none or too many.
        """
        if isinstance(texts, str) or (len(texts) and isinstance(texts[0], (int, np.integer))):
            texts = [cast("Text", texts)]
        how = pooling_of(self.spec, pooling)
        rows = token_rows(cast("Sequence[Text]", texts), self.tokenizer, self.spec, how)
        return embed(self.generator, rows, how)

    def _ids(self, tokens: Any) -> np.ndarray:
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
            raise ShapeError(f"tokens are integers [B, T], found {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.spec.vocab:
            raise ShapeError(
                f"token ids are in 0..{self.spec.vocab - 1}, found {ids.min()}..{ids.max()}"
            )
        if ids.shape[1] > self.spec.context:
            raise ShapeError(
                f"{ids.shape[1]} tokens exceed the model's context of {self.spec.context}"
            )
        return ids.astype(np.int32)

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt.

        Args:
          prompt: a string is a user's message where the tokenizer has a chat template, else plain
            text; messages go through the template; ids are taken as they are.
          raw: take a string as plain text in any case.

        Raises:
          ConfigError: text without a tokenizer, messages without a template, nothing at all.
        """
        return prompt_ids(prompt, self.tokenizer, self.spec.vocab, raw=raw)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        draft: Model | int | tuple[Model, int] | None = None,
        **sampling: Any,
    ) -> Pieces[str, None, Generation]:
        """Yield the answer's text as it comes; the generator's return value is the `Generation`.

        Args:
          prompt: see `prompt_ids`.
          max_tokens: at most this many new tokens.
          stop: strings that end the answer and are not part of it.
          raw: a string prompt without the chat template.
          draft: guesses tokens ahead, which changes how fast they come, not which: a model of the
            same vocabulary (smaller, or this one in few bits), or (model, tokens a step), 3 by
            default; or a number of tokens, looked up where the last ones came before.
          **sampling: `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`,
            `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `seed`; see `Sampling`.

        Raises:
          UnsupportedError: the model is an encoder, or cannot take a guess back, or the draft does
            not go with it; ConfigError: an option out of its range; CapacityError: the prompt
            exceeds the context.
        """
        programs.check_decodes(self.spec)
        options = sampling_of(sampling, "max_tokens", "stop", "raw", "draft")
        answer = Answer(
            self.tokenizer, self.eos_ids, [stop] if isinstance(stop, str) else list(stop)
        )
        ids = self.prompt_ids(prompt, raw=raw)
        timings = Timings()
        if draft is not None:
            from jaxllm.serve.single import drafted, drafting_of

            new = drafted(self, drafting_of(draft), ids, options, max_tokens, timings)
            return reply(ids, new, answer, timings)
        chunks = self.generator.stream([ids], options, max_tokens, timings)
        return reply(ids, (chunk[0].tolist() for chunk in chunks), answer, timings)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate an answer; takes what `stream` takes."""
        return whole(self.stream(prompt, **options))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        raw: bool = False,
        **sampling: Any,
    ) -> list[Generation]:
        """Answers to several prompts in one batch, each as if it were alone.

        Takes what `stream` takes, without `stop`; row i draws with seed + i.
        """
        programs.check_decodes(self.spec)
        options = sampling_of(sampling, "max_tokens", "raw")
        rows = [self.prompt_ids(p, raw=raw) for p in prompts]
        answers = [Answer(self.tokenizer, self.eos_ids, []) for _ in rows]
        timings = Timings()
        left = [min(max_tokens, self.spec.context - len(ids)) for ids in rows]
        for chunk in self.generator.stream(rows, options, max_tokens, timings):
            for i, tokens in enumerate(chunk):
                answers[i].push(tokens[: left[i]].tolist())
                left[i] = 0 if answers[i].finished else max(left[i] - len(tokens), 0)
            if not any(left):
                break
        for answer in answers:
            answer.flush()
        return [
            Generation(
                text=a.text,
                token_ids=a.token_ids,
                prompt_token_ids=ids,
                finish_reason="stop" if a.finished else "length",
                timings=timings,
            )
            for a, ids in zip(answers, rows, strict=True)
        ]

    def leaf(self, path: str) -> np.ndarray:
        """One parameter by its unstacked path (`layers.3.mlp.down`), canonical and on the host."""
        return plain_leaf(host_leaf(self.spec, self.params, path))

    def quantize(
        self,
        format: str = "int4",
        *,
        include: Sequence[str] = INCLUDE,
        exclude: Sequence[str] = (),
        **scheme: Any,
    ) -> Model:
        """The same model with matrices rounded to nearest in few bits.

        Args:
          format: `int8`, `int4`, `nf4`, `fp4`, `mxfp4` or `fp8`; `w8a8` rounds activations too.
          include: globs over unstacked paths (`layers.3.mlp.down`); by default all matrices of the
            layers. `embed.table` and `head.kernel` are the others.
          exclude: globs that take out of these.
          **scheme: `group`, `rows`, `symmetric`, `double`, `activations`; see `Scheme`.
            Without `group` int4 takes 128, or 64 or 32 where 128 does not divide the inputs.

        Raises:
          ConfigError: an unknown format, or rules that take nothing; ShapeError: a group that does
            not divide a matrix's inputs.
        """
        known = {field.name for field in dataclasses.fields(Scheme)} - {"format"}
        for name in scheme:
            require(name in known, f"unknown option {name!r}; {nearest(name, known)}")
        setup = self.generator.setup
        params = quantize_params(
            self.spec,
            self.params,
            Scheme(format=format, **scheme),
            policy=self.policy,
            rules=(tuple(include), tuple(exclude)),
            group_given=scheme.get("group") is not None,
        )
        generator = generator_of(self.spec, params, self.policy, setup.mesh, self.generator.store)
        return dataclasses.replace(self, params=params, generator=generator)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters on the devices."""
        return num_bytes(self.params)

    def save(self, directory: str | Path) -> None:
        """Write config.json, safetensors and tokenizer. Loads back bit-equal.

        The layout is Hugging Face's where a public family can say the spec, else our own; quantized
        matrices lie packed beside plain tensors.

        Raises:
          CapacityError: no space.
        """
        directory = Path(directory)
        save_checkpoint(
            directory,
            self.spec,
            lambda path: host_leaf(self.spec, self.params, path),
            dtype=self.policy.param_dtype,
            eos_ids=self.eos_ids,
            quantized=quantized_paths(self.params),
        )
        if self.tokenizer is not None:
            self.tokenizer.save(directory)
