"""Tool calls in answers: the same whatever pieces the text comes in."""

import json
import random

import pytest

from jaxllm.text.tools import Delta, ToolParser, form_of, readable

NAMES = ("add", "look_up")
NAMED = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
SAID = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
TAGGED = "{# <tool_call> #}" + NAMED + SAID
BARE = '{# {"name": f, "parameters": {}} #}' + NAMED + SAID
"""Short ones for a short context."""


def read(form, text, cuts=()):
    """(content, calls) of a text in pieces."""
    parser, out = ToolParser(form, NAMES), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += parser.push(text[begin:end])
    out += parser.finish()
    calls = {}
    for delta in out:
        if delta.call is not None:
            name, arguments = calls.setdefault(delta.call, (delta.name, ""))
            calls[delta.call] = (name, arguments + delta.arguments)
    assert parser.calls == len(calls)
    return "".join(d.content for d in out), [(n, json.loads(a)) for n, a in calls.values()]


def call(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments})


ONE = {"x": [1, {"y": 'a "quoted} \\ brace{'}], "z": None}
CASES = [
    ("tagged", "just < text <tool", "just < text <tool", []),
    ("tagged", f"<tool_call>\n{call('add', ONE)}\n</tool_call>", "", [("add", ONE)]),
    (
        "tagged",
        f"See:\n\n<tool_call>{call('add', {})}</tool_call>\n<tool_call>{call('look_up', ONE)}",
        "See:",
        [("add", {}), ("look_up", ONE)],
    ),
    ("tagged", "<tool_call>nonsense</tool_call> so", "<tool_call>nonsense</tool_call> so", []),
    ("tagged", f"<tool_call>{call('rm', {})}</tool_call>", None, []),
    ("tagged", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "",
     [("add", {"a": 1})]),
    ("tagged", f"<tool_call>{call('add', ONE)}", "", [("add", ONE)]),
    ("tagged", '<tool_call>{"name": "add"', None, []),
    ("bare", " hello {", " hello {", []),
    ("bare", call("add", ONE, "parameters"), "", [("add", ONE)]),
    ("bare", f"\n{call('add', {}, 'parameters')}; {call('look_up', ONE, 'parameters')}", "",
     [("add", {}), ("look_up", ONE)]),
    ("bare", '{"answer": 3}', None, []),
    ("bare", '{"parameters": {}, "name": "add"}', "", [("add", {})]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_any_cut_gives_the_same(form, text, content, calls):
    dice = random.Random(0)
    ways = [(), range(1, len(text))]
    ways += [sorted(dice.sample(range(1, len(text)), min(3, len(text) - 1))) for _ in range(40)]
    for cuts in ways:
        found, made = read(form, text, list(cuts))
        assert found.strip() == (text if content is None else content).strip()
        assert made == calls


def test_arguments_come_as_they_are_written():
    parser = ToolParser("tagged", NAMES)
    assert parser.push('Hm <tool_call>{"name": "add", "argu') == [Delta("Hm")]
    assert parser.push('ments": {"x"') == [
        Delta(call=0, name="add"),
        Delta(call=0, arguments='{"x"'),
    ]
    assert parser.push(": 1}") == [Delta(call=0, arguments=": 1}")]
    assert parser.push("}</tool_call>") == parser.finish() == []


def test_forms_of_templates():
    assert form_of(TAGGED) == "tagged"
    assert form_of(BARE) == "bare"
    assert form_of("{{ messages }}") is None
    assert form_of(None) is None
    assert form_of("{{ tools }}<tool_call><function=x>") is None


def test_earlier_calls_are_opened():
    call = {"id": "1", "function": {"name": "add", "arguments": '{"x": 1}'}}
    (found,) = readable([{"role": "assistant", "tool_calls": [call]}])
    assert found["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    odd = [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}, 5]}, 7]
    assert readable(odd) == odd
    assert readable("x") == "x"
