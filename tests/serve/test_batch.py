"""A file of requests: every line once, across breaks; refusals are answers too."""

import asyncio
import json

import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve import batch


def line(name, body, url="/v1/completions"):
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def body(ids, **more):
    return {"prompt": ids, "max_tokens": 4, "temperature": 0} | more


def run(engine, tmp_path):
    return asyncio.run(batch.run(engine, tmp_path / "in", tmp_path / "out", name="toy"))


def test_every_line_is_answered_once(toy, engine, tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    lines = [line(f"r{i}", body([i + 1, 2, 3])) for i in range(20)]
    lines += ["", line("chat", chat, "/v1/chat/completions"), line("bad", body([1], top_p=7))]
    lines.append(line("stream", body([1], stream=True)))
    (tmp_path / "in").write_text("\n".join(lines))
    done = [json.dumps({"custom_id": f"r{i}"}) for i in range(5)]
    (tmp_path / "out").write_text("\n".join(done) + '\n{"custom_id": "r5", "resp')
    counts = run(engine, tmp_path)
    assert (counts.total, counts.before, counts.done, counts.refused) == (23, 5, 18, 2)
    found = [json.loads(x) for x in (tmp_path / "out").read_text().splitlines()]
    assert sorted(x["custom_id"] for x in found) == sorted(
        [*(f"r{i}" for i in range(20)), "chat", "bad", "stream"]
    )
    replies = {x["custom_id"]: x.get("response") for x in found}
    for i in range(5, 20):
        wanted = toy.generate([i + 1, 2, 3], max_tokens=4).text
        assert replies[f"r{i}"]["body"]["choices"][0]["text"] == wanted
    assert replies["chat"]["body"]["object"] == "chat.completion"
    assert replies["bad"]["status_code"] == 400
    assert replies["bad"]["body"]["error"]["param"] == "top_p"
    assert run(engine, tmp_path).done == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "line 1: no request"),
        ('{"custom_id": "a"}', "line 1: no request"),
        (line("a", body([1]), "/v1/nothing"), "url is one of"),
        (line("a", body([1])) + "\n" + line("a", body([1])), "comes twice"),
        (line(5, body([1])), "needs custom_id"),
        ("\n" * 11, "at most 10"),
    ],
)
def test_a_bad_file_is_refused_whole(tmp_path, text, match):
    (tmp_path / "in").write_text(text)
    with pytest.raises(ConfigError, match=match):
        batch.read_lines(tmp_path / "in", 10)


def test_answers_of_something_else_are_not_written_to(tmp_path):
    (tmp_path / "out").write_text("a diary\n")
    with pytest.raises(ConfigError, match="something else"):
        batch.answered(tmp_path / "out")
    assert batch.answered(tmp_path / "none") == set()
