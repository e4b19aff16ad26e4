"""From the JSON of a request to the engine's requests."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.infer.sampling import Sampling
from jaxllm.serve import grammar
from jaxllm.serve.http import schemas
from jaxllm.serve.http.answering import Worded
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.errors import RequestError
from jaxllm.serve.http.fields import Fields
from jaxllm.serve.http.tools import Tools, read_tools
from jaxllm.serve.programs import BIASES, TOP
from jaxllm.serve.request import Request
from jaxllm.text.chat import check_messages
from jaxllm.text.tools import readable

__all__ = [
    "Asked",
    "Vectors",
    "chat",
    "completions",
    "embeddings",
    "format_of",
    "messages_ids",
    "object_of",
    "prompt_rows",
    "requests_of",
    "texts",
    "tokens",
    "with_tools",
]


MAX_IDS = 1 << 24
"""Tokens of a prompt; the body's size and the context are tighter bounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request to the server, read and checked.

    Attributes:
      requests: one a prompt.
      stream: whether pieces are sent as they come.
      usage: whether a stream ends with the token counts.
      tools: that the answers may call, or None.
    """

    requests: tuple[Request, ...]
    stream: bool
    usage: bool
    tools: Tools | None = None


def _sampling(fields: Fields) -> Sampling:
    get = lambda name, low, high, default: (  # noqa: E731
        default if (value := fields.number(name, low, high)) is None else value
    )
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    top_k = fields.integer("top_k", -1, 2**31 - 1) or 0
    return Sampling(
        temperature=get("temperature", 0, 2, 1.0),
        top_k=max(top_k, 0),
        top_p=max(get("top_p", 0, 1, 1.0), 1e-6),  # 0 keeps the most likely token
        min_p=min(get("min_p", 0, 1, 0.0), 1 - 1e-6),
        typical_p=max(get("typical_p", 0, 1, 1.0), 1e-6),
        repetition_penalty=get("repetition_penalty", 0.01, 100, 1.0),
        presence_penalty=get("presence_penalty", -2, 2, 0.0),
        frequency_penalty=get("frequency_penalty", -2, 2, 0.0),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
    )


def _bias(fields: Fields) -> dict[int, float]:
    given = fields.raw("logit_bias", schemas.bias(BIASES))
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > BIASES:
        raise RequestError(
            f"logit_bias must map at most {BIASES} token ids to numbers", param="logit_bias"
        )
    out = {}
    for name, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and number):
            raise RequestError("logit_bias maps token ids to numbers", param="logit_bias")
        if not -100 <= value <= 100:
            raise RequestError("values of logit_bias are in [-100, 100]", param="logit_bias")
        out[int(name)] = float(value)
    return out


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream = fields.flag("stream")
    options = fields.raw("stream_options", schemas.STREAM_OPTIONS)
    if options is None:
        return stream, False
    if not isinstance(options, dict) or not stream:
        raise RequestError("stream_options is an object beside stream", param="stream_options")
    inner = Fields(options)
    usage = inner.flag("include_usage")
    inner.close()
    return stream, usage


def object_of(given: Any, name: str) -> Fields:
    """Fields of a field that is an object itself."""
    if not isinstance(given, dict):
        raise RequestError(f"{name} must be an object", param=name)
    return Fields(given)


def format_of(given: Any, name: str = "response_format") -> grammar.Grammar | None:
    """The grammar of a `response_format`."""
    if given is None:
        return None
    fields = object_of(given, name)
    kind, inner = fields.text("type"), fields.raw("json_schema", schemas.OBJECT)
    fields.close()
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f"{name}.type is text, json_object or json_schema", param=name)
    if kind != "json_schema":
        if inner is not None:
            raise RequestError(f"{name}.json_schema needs the type json_schema", param=name)
        return grammar.json_schema({"type": "object"}) if kind == "json_object" else None
    return named_schema(inner, f"{name}.json_schema")


def named_schema(given: Any, name: str) -> grammar.Grammar:
    """The grammar of a schema with its name and strictness; it is kept strictly always."""
    fields = object_of(given, name)
    fields.text("name", most=64)
    fields.text("description", most=4096)
    fields.flag("strict")
    schema = fields.raw("schema", schemas.SCHEMA)
    fields.close()
    if schema is None:
        raise RequestError(f"{name}.schema is missing", param="response_format")
    return grammar.json_schema(schema)


def _grammar(fields: Fields) -> grammar.Grammar | None:
    """The grammar that any of the fields asks for."""
    inner = fields.raw("structured_outputs", schemas.STRUCTURED)
    more = Fields({}) if inner is None else object_of(inner, "structured_outputs")
    made = {"response_format": format_of(fields.raw("response_format", schemas.FORMAT))}
    for source, prefix in ((fields, "guided_"), (more, "")):
        name = "structured_outputs" if source is more else prefix + "json"
        schema = source.raw(f"{prefix}json", schemas.SCHEMA)
        pattern = source.text(f"{prefix}regex", most=grammar.MAX_REGEX_CHARS)
        texts = source.texts(f"{prefix}choice", grammar.MAX_CHOICES)
        if schema is not None:
            made[name] = grammar.json_schema(schema)
        if pattern is not None:
            made[f"{prefix}regex"] = grammar.regex(pattern)
        if texts:
            made[f"{prefix}choice"] = grammar.choice(texts)
    more.close()
    found = {name: one for name, one in made.items() if one is not None}
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} exclude each other", param=min(found))
    return next(iter(found.values()), None)


def requests_of(
    fields: Fields, prompts: list[list[int]], config: ServerConfig, **more: Any
) -> tuple[Request, ...]:
    """What both kinds of completion share."""
    if not all(prompts):
        raise RequestError("the prompt is empty; give at least one token")
    shared = {
        "n": fields.integer("n", 1, config.max_n) or 1,
        "sampling": _sampling(fields),
        "stop": fields.texts("stop", 16),
        "stop_ids": _ids(fields.raw("stop_token_ids", schemas.token_ids(64)), "stop_token_ids", 64),
        "ignore_eos": fields.flag("ignore_eos"),
        "logit_bias": _bias(fields),
        "grammar": _grammar(fields),
        "priority": fields.integer("priority", -100, 100) or 0,
        **more,
    }
    fields.text("user")
    fields.raw("metadata", schemas.ANY)
    fields.only("store", False)
    fields.only("service_tier", "auto", "default")
    return tuple(Request(prompt_ids=tuple(ids), **shared) for ids in prompts)


def _ids(given: Any, name: str, most: int) -> tuple[int, ...]:
    if given is None:
        return ()
    whole = isinstance(given, list) and len(given) <= most
    if not whole or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= schemas.MAX_TOKEN
        for i in given
    ):
        raise RequestError(f"{name} must be at most {most} token ids", param=name)
    return tuple(given)


def _tokenize(model: Worded, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ConfigError("this model has no tokenizer: give token ids")
    return model.tokenizer.encode(text)


def messages_ids(given: Any, model: Worded, most: int, tools: Tools | None = None) -> list[int]:
    """Token ids of a chat's messages by the model's own template, with the tools there are.

    Raises:
      RequestError, ConfigError: they are no messages, or the template refuses them.
    """
    if model.tokenizer is None:
        raise ConfigError("this model has no tokenizer: use /v1/completions with token ids")
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise RequestError(f"messages must be a list of 1 to {most}", param="messages")
    schemas = None if tools is None else tools.schemas
    return model.tokenizer.apply_chat(check_messages(readable(given)), tools=schemas)


def texts(given: Any, name: str, most: int) -> list[str | list[int]]:
    """Texts of a request: a string, token ids, or a list of either.

    Raises:
      RequestError: it is none of these, or there are too many.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given and all(isinstance(x, int) for x in given):
        return [list(_ids(given, name, MAX_IDS))]
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise RequestError(
            f"{name} must be a string, a list of token ids, or 1 to {most} of them", param=name
        )
    return [x if isinstance(x, str) else list(_ids(x, name, MAX_IDS)) for x in given]


def prompt_rows(given: Any, name: str, model: Worded, most: int) -> list[list[int]]:
    """Token ids of each prompt; see `texts`."""
    rows = texts(given, name, most)
    return [_tokenize(model, x) if isinstance(x, str) else x for x in rows]


def chat(fields: Fields, model: Worded, config: ServerConfig) -> Asked:
    """A request to /v1/chat/completions.

    Raises:
      RequestError, ConfigError: a field is wrong, unknown or not served.
    """
    fields.text("model")
    messages = fields.raw("messages", schemas.messages(config.max_messages), needed=True)
    for name in ("max_completion_tokens", "max_tokens"):
        most = fields.integer(name, 1, config.max_tokens)
        if most is not None:
            break
    fields.integer("max_tokens", 1, config.max_tokens)
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, TOP)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    tools = read_tools(fields, model)
    fields.only("modalities", ["text"])
    stream, usage = _stream(fields)
    sample = {"max_tokens": most or config.max_tokens, "logprobs": (top or 0) if wanted else None}
    (first,) = requests_of(fields, [[0]], config, **sample)
    fields.close()  # the template runs last: it is the costly part
    first = with_tools(first, tools)
    ids = messages_ids(messages, model, config.max_messages, tools)
    request = dataclasses.replace(first, prompt_ids=tuple(ids))
    return Asked(requests=(request,), stream=stream, usage=usage, tools=tools)


def with_tools(request: Request, tools: Tools | None) -> Request:
    """The request held to its tools, where one must be called."""
    if tools is None or tools.grammar is None:
        return request
    if request.grammar is not None:
        raise RequestError("a tool that must be called excludes a response_format")
    return dataclasses.replace(request, grammar=tools.grammar)


def completions(fields: Fields, model: Worded, config: ServerConfig) -> Asked:
    """A request to /v1/completions.

    Raises:
      RequestError, ConfigError: a field is wrong, unknown or not served.
    """
    fields.text("model")
    fields.only("echo", False)
    fields.only("suffix", "")
    fields.only("best_of", 1)
    prompts = prompt_rows(
        fields.raw("prompt", schemas.rows(config.max_prompts, MAX_IDS), needed=True),
        "prompt",
        model,
        config.max_prompts,
    )
    stream, usage = _stream(fields)
    requests = requests_of(
        fields,
        prompts,
        config,
        max_tokens=fields.integer("max_tokens", 1, config.max_tokens) or 16,
        logprobs=fields.integer("logprobs", 0, TOP),
    )
    fields.close()
    return Asked(requests=requests, stream=stream, usage=usage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
    """A request to /v1/embeddings, read and checked.

    Attributes:
      texts: or token ids.
      packed: `float` or `base64`.
    """

    texts: list[str | list[int]]
    packed: str


def embeddings(fields: Fields, model: Worded, config: ServerConfig) -> Vectors:
    """A request to /v1/embeddings.

    Raises:
      RequestError: a field is wrong, unknown or not served.
    """
    fields.text("model")
    given = fields.raw("input", schemas.rows(config.max_prompts, MAX_IDS), needed=True)
    packed = fields.only("encoding_format", "float", "base64")
    fields.only("dimensions", model.spec.width)
    fields.text("user")
    fields.close()
    return Vectors(texts=texts(given, "input", config.max_prompts), packed=packed or "float")


def tokens(fields: Fields, model: Worded, config: ServerConfig) -> list[int]:
    """A request to /tokenize.

    Raises:
      RequestError, ConfigError: a field is wrong or unknown, or the template refuses the messages.
    """
    fields.text("model")
    prompt = fields.raw("prompt", {"type": "string"})
    messages = fields.raw("messages", schemas.messages(config.max_messages))
    fields.close()
    if (prompt is None) == (messages is None) or not isinstance(prompt, (str, type(None))):
        raise RequestError("give either prompt, a string, or messages")
    if prompt is not None:
        return prompt_rows(prompt, "prompt", model, 1)[0]
    return messages_ids(messages, model, config.max_messages)
