"""Tools of a request: read, and held to by a grammar where one must be called."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from jaxllm.serve import grammar
from jaxllm.serve.http import schemas
from jaxllm.serve.http.answering import Worded
from jaxllm.serve.http.errors import RequestError
from jaxllm.serve.http.fields import Fields
from jaxllm.text.tools import CLOSE, OPEN, Form, ToolParser, form_of

__all__ = ["Tools", "read_tools"]

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Tools:
    """Functions that an answer may call.

    Attributes:
      schemas: as the template takes them.
      names: of the functions.
      form: in which calls are written.
      grammar: where one must be called, or None.
    """

    schemas: list[dict[str, Any]]
    names: tuple[str, ...]
    form: Form
    grammar: grammar.Grammar | None

    def parser(self) -> ToolParser:
        """One for each answer."""
        return ToolParser(self.form, self.names)


def _function(given: Any, where: str) -> dict[str, Any]:
    """One function's name, description and parameters."""
    if not isinstance(given, dict):
        raise RequestError(f"{where} must be an object", param="tools")
    fields = Fields(given)
    name, parameters = fields.text("name"), fields.raw("parameters", schemas.OBJECT)
    description = fields.text("description", most=1 << 14)
    fields.flag("strict")
    fields.close()
    if name is None or not _NAME.fullmatch(name):
        raise RequestError(f"{where}.name is 1 to 64 letters, digits, _, - or .", param="tools")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"{where}.parameters must be a JSON schema", param="tools")
    out = {"name": name, "parameters": parameters or {"type": "object", "properties": {}}}
    return out if description is None else {**out, "description": description}


def _functions(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > schemas.MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {schemas.MAX_TOOLS}", param="tools")
    out = []
    for i, item in enumerate(given):
        if not isinstance(item, dict) or item.get("type") != "function":
            raise RequestError(f"tools[{i}].type is served only as function", param="tools")
        flat = {name: value for name, value in item.items() if name != "type"}
        inner = item.get("function", flat)  # flat as /v1/responses has it
        out.append(_function(inner, f"tools[{i}]"))
    names = [function["name"] for function in out]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", param="tools")
    return out


def _choice(given: Any, names: list[str]) -> str | list[str]:
    """`none`, `auto`, or the functions one of which must be called."""
    if given in (None, "auto", "none"):
        return given or "auto"
    if given == "required":
        return names
    inner = given.get("function", given) if isinstance(given, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if name not in names:
        raise RequestError(
            "tool_choice is none, auto, required, or names one of the tools", param="tool_choice"
        )
    return [name]


def _grammar(functions: list[dict[str, Any]], form: Form, several: bool) -> grammar.Grammar:
    """One call or more of any of the functions."""
    calls, rules = [], []
    key = "arguments" if form == "tagged" else "parameters"
    for i, function in enumerate(functions):
        grammar.json_schema(function["parameters"])  # bounded
        schema = {**function["parameters"], "x-guidance": grammar.JSON_OPTIONS}
        begun = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        calls.append(f"call{i}")
        rules += [
            f'call{i}: {json.dumps(begun)} args{i} "}}"',
            f"args{i}: %json {json.dumps(schema)}",
        ]
    one = " | ".join(calls)
    if form == "tagged":
        one = f"{json.dumps(OPEN + chr(10))} ({one}) {json.dumps(chr(10) + CLOSE)}"
    more = r' ("\n" one)*' if several and form == "tagged" else ""
    return grammar.lark("\n".join([f"start: one{more}", f"one: {one}", *rules]))


def read_tools(fields: Fields, model: Worded) -> Tools | None:
    """The tools of a request; None without any, or where none may be called.

    Raises:
      RequestError: they are wrong, or the model's template has no known way to write calls.
    """
    functions = _functions(fields.raw("tools", schemas.TOOLS))
    given = fields.raw("tool_choice", schemas.TOOL_CHOICE)
    several = fields.raw("parallel_tool_calls", {"type": "boolean"})
    if several is not None and not isinstance(several, bool):
        raise RequestError("parallel_tool_calls is true or false", param="parallel_tool_calls")
    names = [function["name"] for function in functions]
    if not functions:
        if given not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return None
    choice = _choice(given, names)
    if choice == "none":
        return None
    tokenizer = model.tokenizer
    template = tokenizer and (tokenizer.tool_template or tokenizer.chat_template)
    form = form_of(template)
    if form is None:
        raise RequestError(
            "this model's chat template has no known way to write tool calls",
            param="tools",
            code="unsupported",
        )
    held = None
    if isinstance(choice, list):
        chosen = [function for function in functions if function["name"] in choice]
        held = _grammar(chosen, form, several is not False and given == "required")
    shown = [{"type": "function", "function": function} for function in functions]
    return Tools(shown, tuple(names), form, held)
